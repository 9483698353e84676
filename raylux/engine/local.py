"""Everything in this process: one gradient worker, one factor shard."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from raylux import profiling
from raylux.engine.pool import Notify
from raylux.engine.shard import FactorShard, ShardSpec
from raylux.engine.work import Job, Result, Work
from raylux.engine.worker import GradientWorker, WorkerSpec


class LocalBackend:
    """A backend without Ray. What dies here takes the driver with it: nothing is replaced."""

    workers = 1
    shards = 1

    def __init__(self, worker: WorkerSpec, shards: Sequence[ShardSpec], notify: Notify = lambda *_, **__: None) -> None:
        self._notify = notify
        self._threads = Threads(worker.plan.threads)
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
            facts, spent = profiling.untimed(self._worker.timed("prepare", False))
            self._numerics = facts["numerics"]
            self._notify("worker", slot=0, state="started", **facts, **profiling.facts(spent))
        return self._worker

    @contextmanager
    def open(self, method: str, parts: bool = False) -> Iterator[Work]:
        yield _Inline(self, method, parts)

    def run(self, job: Job, method: str, parts: bool) -> Result:
        with profiling.of("wait"):
            answer = self.worker.timed(method, parts, *job.args)
        first, tail = (answer[0], list(answer[1:])) if parts else (answer, [])
        head, spent = profiling.untimed(first)
        self._notify("unit", method=method, unit=job.name, slot=0, **profiling.facts(spent))
        return Result(job, head, tail, self._numerics)

    def share(self, value: Any) -> Any:
        return value

    def gone(self, handles: Sequence[Any]) -> list[bool]:
        return [False] * len(handles)

    def ask(self, method: str, args: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        return {shard: self._asked(method, call) for shard, call in args.items()}

    def _asked(self, method: str, args: tuple[Any, ...]) -> Any:
        with profiling.of("ask"):
            value, spent = profiling.untimed(self._shard.timed(method, *args))
        profiling.helped(spent)
        return value

    def shard_stream(self, method: str, jobs: Iterable[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        for args in jobs:
            with profiling.of("ask"):
                value, spent = profiling.untimed(self._shard.timed(method, *args))
            self._notify("unit", method=method, unit=args[0], shard=0, **profiling.facts(spent))
            yield args, value

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


class Threads(AbstractContextManager[None]):
    """torch's thread count for a while: it is global to the process, and it changes bits."""

    def __init__(self, threads: int) -> None:
        self._wanted, self._before = threads, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self._wanted)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)
