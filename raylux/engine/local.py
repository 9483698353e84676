"""Everything in this process: one gradient worker, one factor shard."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from raylux.engine.shard import FactorShard, ShardSpec
from raylux.engine.work import Job, Result, Work
from raylux.engine.worker import GradientWorker, WorkerSpec


class LocalBackend:
    """A backend without Ray. What dies here takes the driver with it: nothing is replaced."""

    workers = 1
    shards = 1

    def __init__(self, worker: WorkerSpec, shards: Sequence[ShardSpec]) -> None:
        self._threads = _Threads(worker.plan.threads)
        self._threads.__enter__()
        self._worker_spec = worker
        self._worker: GradientWorker | None = None
        self._numerics: dict[str, Any] = {}
        (shard,) = shards
        self._shard = FactorShard(shard)

    @property
    def worker(self) -> GradientWorker:
        if self._worker is None:
            self._worker = GradientWorker(self._worker_spec)
            self._numerics = self._worker.prepare()["numerics"]
        return self._worker

    @contextmanager
    def open(self, method: str, parts: bool = False) -> Iterator[Work]:
        yield _Inline(self, method, parts)

    def run(self, job: Job, method: str, parts: bool) -> Result:
        value = getattr(self.worker, method)(*job.args)
        head, tail = (value[0], list(value[1:])) if parts else (value, [])
        return Result(job, head, tail, self._numerics)

    def share(self, value: Any) -> Any:
        return value

    def gone(self, handles: Sequence[Any]) -> list[bool]:
        return [False] * len(handles)

    def ask(self, method: str, args: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        return {shard: getattr(self._shard, method)(*call) for shard, call in args.items()}

    def shard_stream(self, method: str, jobs: Iterable[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        for args in jobs:
            yield args, getattr(self._shard, method)(*args)

    def tasks(self, function: Any, jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
        return [function(*args) for args in jobs]

    def close(self) -> None:
        self._worker = None
        self._threads.__exit__(None, None, None)


class _Inline:
    """Jobs run when their result is asked for."""

    losses = 0

    def __init__(self, backend: LocalBackend, method: str, parts: bool) -> None:
        self._backend, self._method, self._parts = backend, method, parts
        self._queue: deque[Job] = deque()

    @property
    def room(self) -> bool:
        return not self._queue

    @property
    def pending(self) -> int:
        return len(self._queue)

    def submit(self, job: Job) -> None:
        self._queue.append(job)

    def next(self) -> Result:
        return self._backend.run(self._queue.popleft(), self._method, self._parts)


class _Threads(AbstractContextManager[None]):
    """torch's thread count for a while: it is global to the process, and it changes bits."""

    def __init__(self, threads: int) -> None:
        self._wanted, self._before = threads, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self._wanted)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)
