"""The seam between the stages and where their work runs: the same stage code in process and on Ray.

A backend has D workers and S shards. Results of ``map`` come with *handles*: on Ray references to objects
that the driver never holds, in process the objects themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from raylux.engine.shard import FactorShard, ShardSpec
from raylux.engine.worker import GradientWorker, WorkerSpec

Job = tuple[Any, tuple[Any, ...]]
"""(name of the job, arguments of the worker's method)"""


class Backend(Protocol):
    """What a stage may ask for."""

    workers: int
    shards: int

    def map(
        self, method: str, jobs: Iterable[Job], parts: bool = False, ordered: bool = False
    ) -> Iterator[tuple[Any, Any, list[Any]]]:
        """Run a worker's method on each job: yields (name, result, handles of its parts).

        Args:
            method: of ``GradientWorker``.
            jobs: taken a bounded window ahead of what has been yielded.
            parts: the method returns a head and one part per shard; the parts come as handles.
            ordered: yield in the order of the jobs, otherwise as they finish.
        """
        ...

    def everyone(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker and wait for all."""
        ...

    def shard_calls(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of every shard, shard s with ``args[s]`` (handles allowed), and wait for all."""
        ...

    def shard_stream(
        self, method: str, jobs: Mapping[int, Sequence[tuple[Any, ...]]]
    ) -> Iterator[tuple[int, tuple[Any, ...], Any]]:
        """Call a method of each shard for each of its jobs, shards side by side: yields (shard, job, result)."""
        ...

    def tasks(self, function: Any, jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Run a plain function over jobs, results in the order of the jobs."""
        ...

    def close(self) -> None:
        """Give back what was started."""
        ...


class LocalBackend:
    """Everything in this process, one worker and one shard."""

    workers = 1
    shards = 1

    def __init__(self, worker: WorkerSpec, shards: Sequence[ShardSpec]) -> None:
        self._threads = _Threads(worker.plan.threads)
        self._threads.__enter__()
        self._worker_spec = worker
        self._worker: GradientWorker | None = None
        (shard,) = shards
        self._shard = FactorShard(shard)

    @property
    def worker(self) -> GradientWorker:
        if self._worker is None:
            self._worker = GradientWorker(self._worker_spec)
        return self._worker

    def map(
        self, method: str, jobs: Iterable[Job], parts: bool = False, ordered: bool = False
    ) -> Iterator[tuple[Any, Any, list[Any]]]:
        for name, args in jobs:
            result = getattr(self.worker, method)(*args)
            yield (name, result[0], list(result[1:])) if parts else (name, result, [])

    def everyone(self, method: str, *args: Any) -> list[Any]:
        return [getattr(self.worker, method)(*args)]

    def shard_calls(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(self._shard, method)(*args[0])]

    def shard_stream(
        self, method: str, jobs: Mapping[int, Sequence[tuple[Any, ...]]]
    ) -> Iterator[tuple[int, tuple[Any, ...], Any]]:
        for args in jobs.get(0, ()):
            yield 0, args, getattr(self._shard, method)(*args)

    def tasks(self, function: Any, jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
        return [function(*args) for args in jobs]

    def close(self) -> None:
        self._worker = None
        self._threads.__exit__(None, None, None)


class _Threads(AbstractContextManager[None]):
    """torch's thread count for a while: it is global to the process, and it changes bits."""

    def __init__(self, threads: int) -> None:
        self._wanted, self._before = threads, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self._wanted)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)
