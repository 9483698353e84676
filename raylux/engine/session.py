"""Ray itself: connecting, checking demand against supply, and the backend of actors."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from raylux.engine.backend import Job
from raylux.engine.demand import Demand
from raylux.engine.plan import GIB
from raylux.engine.shard import FactorShard, ShardSpec
from raylux.engine.worker import GradientWorker, WorkerSpec
from raylux.errors import RayluxError, UserError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray announces a change of this default at every start of an actor without a GPU.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

# Jobs in flight per worker: one runs, one waits.
_WINDOW = 2
# A wait that is woken this often can tell what it waits for.
_POLL = 5.0


def connect() -> bool:
    """Join the cluster of RAY_ADDRESS, the one already joined, or start one here; True if one was started."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
            return False
        ray.init(include_dashboard=False, num_cpus=os.cpu_count(), **quiet)
    except (ConnectionError, RayError) as error:
        where = os.environ.get("RAY_ADDRESS", "this machine")
        raise UserError(f"Ray: no cluster at {where} ({_first_line(error)})") from None
    return True


def size(demand: Demand) -> tuple[int, int]:
    """Workers and shards that fit the cluster.

    Raises:
        UserError: what is asked for, or a single worker, does not fit; with demand and supply in numbers.
    """
    supply = ray.cluster_resources()
    cpus, gpus, memory = supply.get("CPU", 0.0), supply.get("GPU", 0.0), supply.get("memory", 0.0)
    by_cpu = int(gpus) if demand.gpu else int(cpus // demand.threads)
    by_memory = int((memory - demand.shards_bytes) // demand.worker_bytes)
    workers = demand.workers if isinstance(demand.workers, int) else max(1, min(by_cpu, by_memory))
    if workers > by_cpu:
        kind, have = ("GPU", f"{gpus:g}") if demand.gpu else ("CPU", f"{cpus:g}")
        need = workers if demand.gpu else workers * demand.threads
        raise UserError(
            f"not enough {kind}s on the cluster: {workers} workers need {need}, it has {have}; "
            f"set engine.workers to {by_cpu or 1} or fewer, or engine.threads lower"
        )
    need_bytes = workers * demand.worker_bytes + demand.shards_bytes
    if need_bytes > memory:
        raise UserError(
            f"not enough memory on the cluster: {workers} worker{'s' * (workers > 1)} and the factor shards need "
            f"{need_bytes / GIB:.1f} GiB, it has {memory / GIB:.1f} GiB; use fewer engine.workers, a larger cluster, "
            f"fewer model.layers or fewer queries"
        )
    shards = demand.shards if isinstance(demand.shards, int) else workers
    return workers, shards


class RayBackend:
    """Workers and shards as actors."""

    def __init__(
        self, worker: WorkerSpec, shards: Sequence[ShardSpec], workers: int, timeout: float, started: bool
    ) -> None:
        self.workers, self.shards = workers, len(shards)
        self._timeout, self._started = timeout, started
        self._worker_spec, self._shard_specs = worker, list(shards)
        self._started_actors: dict[str, list[Any]] = {}

    @property
    def _workers(self) -> list[Any]:
        """The gradient workers, started when first needed: a stage without gradients loads no model."""
        if "workers" not in self._started_actors:
            plan = self._worker_spec.plan
            gpus = 1 if plan.device == "cuda" else 0
            make = ray.remote(GradientWorker).options(num_cpus=plan.threads, num_gpus=gpus)
            spec = ray.put(self._worker_spec)
            self._started_actors["workers"] = [make.remote(spec) for _ in range(self.workers)]
        return self._started_actors["workers"]

    @property
    def _shards(self) -> list[Any]:
        """The factor shards. They work while workers wait and the other way round: they take no CPU of their own."""
        if "shards" not in self._started_actors:
            make = ray.remote(FactorShard).options(num_cpus=0, scheduling_strategy="SPREAD")
            self._started_actors["shards"] = [make.remote(spec) for spec in self._shard_specs]
        return self._started_actors["shards"]

    def map(
        self, method: str, jobs: Iterable[Job], parts: bool = False, ordered: bool = False
    ) -> Iterator[tuple[Any, Any, list[Any]]]:
        returns = 1 + self.shards if parts else 1
        queue = enumerate(jobs)
        free = deque(range(self.workers))
        for _ in range(_WINDOW - 1):
            free.extend(range(self.workers))
        running: dict[Any, tuple[int, int, Any, list[Any]]] = {}
        done: dict[int, tuple[Any, Any, list[Any]]] = {}
        due, more = 0, True
        # Ordered results are held back until their turn: the window bounds how many.
        window = 2 * _WINDOW * self.workers
        while more or running:
            while more and free and len(running) + len(done) < window:
                try:
                    index, (name, args) = next(queue)
                except StopIteration:
                    more = False
                    break
                worker = free.popleft()
                refs = getattr(self._workers[worker], method).options(num_returns=returns).remote(*args)
                head, *tail = refs if parts else [refs]
                running[head] = worker, index, name, tail
            if not running:
                break
            for ref in self._wait(list(running), f"{method} of {len(running)} units"):
                worker, index, name, tail = running.pop(ref)
                free.append(worker)
                done[index] = name, self._get(ref), tail
            if ordered:
                while due in done:
                    yield done.pop(due)
                    due += 1
            else:
                for index in sorted(done):
                    yield done.pop(index)

    def everyone(self, method: str, *args: Any) -> list[Any]:
        refs = [getattr(worker, method).remote(*args) for worker in self._workers]
        return [self._get(ref, f"{method} of worker {index}") for index, ref in enumerate(refs)]

    def shard_calls(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        refs = [getattr(shard, method).remote(*job) for shard, job in zip(self._shards, args, strict=True)]
        return [self._get(ref, f"{method} of shard {index}") for index, ref in enumerate(refs)]

    def shard_stream(
        self, method: str, jobs: Mapping[int, Sequence[tuple[Any, ...]]]
    ) -> Iterator[tuple[int, tuple[Any, ...], Any]]:
        waiting = {shard: deque(calls) for shard, calls in jobs.items() if calls}
        running: dict[Any, tuple[int, tuple[Any, ...]]] = {}

        def start(shard: int) -> None:
            if waiting[shard]:
                call = waiting[shard].popleft()
                running[getattr(self._shards[shard], method).remote(*call)] = shard, call

        for shard in waiting:
            start(shard)
        while running:
            for ref in self._wait(list(running), f"{method} of {len(running)} shards"):
                shard, call = running.pop(ref)
                start(shard)
                yield shard, call, self._get(ref)

    def tasks(self, function: Any, jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
        # The workers hold the CPUs while they live, and wait meanwhile: a task takes none of its own.
        remote = ray.remote(function).options(num_cpus=0)
        results: list[Any] = []
        running: deque[Any] = deque()
        for args in jobs:
            if len(running) >= self.workers:
                results.append(self._get(running.popleft(), function.__name__))
            running.append(remote.remote(*args))
        results += [self._get(ref, function.__name__) for ref in running]
        return results

    def close(self) -> None:
        for actors in self._started_actors.values():
            for actor in actors:
                ray.kill(actor)
        if self._started:
            ray.shutdown()

    def _wait(self, refs: list[Any], what: str) -> list[Any]:
        """The references that are ready, at least one."""
        deadline = time.monotonic() + self._timeout
        while True:
            ready, _ = ray.wait(refs, num_returns=1, timeout=_POLL, fetch_local=False)
            if ready:
                # Those that are ready by now too, without waiting.
                more, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
                return list(more)
            if time.monotonic() > deadline:
                raise RayluxError(
                    f"nothing came back in {self._timeout:.0f} s while waiting for {what}; "
                    f"free CPUs: {ray.available_resources().get('CPU', 0):g} of "
                    f"{ray.cluster_resources().get('CPU', 0):g} (engine.timeout sets the limit)"
                )

    def _get(self, ref: Any, what: str = "a unit") -> Any:
        try:
            return ray.get(ref, timeout=self._timeout)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RayluxError):
                raise cause from None
            raise
        except GetTimeoutError:
            raise RayluxError(
                f"{what} did not answer in {self._timeout:.0f} s (engine.timeout sets the limit)"
            ) from None
        except RayActorError as error:
            raise RayluxError(f"{what}: the process that ran it died ({_first_line(error)}); run again") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
