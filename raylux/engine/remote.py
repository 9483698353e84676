"""Workers and shards as Ray actors, and how Ray tells of their deaths."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.experimental import get_object_locations

from raylux import profiling
from raylux.engine.pool import Notify, Pool
from raylux.engine.shard import FactorShard, ShardSpec
from raylux.engine.transport import WorkerDied
from raylux.engine.work import Lost, Work
from raylux.engine.worker import GradientWorker, WorkerSpec
from raylux.errors import RayluxError

# A job that ends its shard's process this often is not tried again.
_SHARD_DEATHS = 4
_POLL = 5.0


class RayTransport:
    """Gradient workers as actors. Ray restarts nothing by itself: the pool knows what a death means.

    Args:
        spec: what a worker is made from.
        capacity: how many fit the cluster as it is now; None: their number is fixed.
        kind: of the workers; something with ``GradientWorker``'s ``prepare`` and ``timed``.
        labels: of the nodes on which they may run; none: any.
        gpus: of each, where the run is on GPUs.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        capacity: Callable[[], int | None],
        kind: type = GradientWorker,
        labels: Mapping[str, str] | None = None,
        gpus: int = 1,
    ) -> None:
        plan = spec.plan
        self._name = kind.__name__
        self._make: Any = ray.remote(kind).options(
            num_cpus=plan.threads,
            num_gpus=gpus if plan.device == "cuda" else 0,
            label_selector=dict(labels or {}),
        )
        self._spec = ray.put(spec)
        self._capacity = capacity
        self._watched: dict[Any, None] = {}

    def now(self) -> float:
        return time.monotonic()

    def start(self) -> Any:
        return self._make.remote(self._spec)

    def call(self, worker: Any, method: str, args: tuple[Any, ...], returns: int) -> list[Any]:
        # Named, so that Ray's dashboard tells calls apart: they all go through one method.
        timed = worker.timed.options(num_returns=returns, name=f"{self._name}.{method}")
        refs = timed.remote(method, returns > 1, *args)
        return list(refs) if returns > 1 else [refs]

    def watch(self, ref: Any) -> None:
        self._watched[ref] = None

    def unwatch(self, ref: Any) -> None:
        self._watched.pop(ref, None)

    def wait(self, timeout: float) -> list[Any]:
        refs = list(self._watched)
        if not refs:
            time.sleep(timeout)
            return []
        # All that are ready by now, without waiting: the more a busy driver finds at once, the fewer times it looks.
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        if not ready:
            ready, _ = ray.wait(refs, num_returns=1, timeout=timeout, fetch_local=False)
        return list(ready)

    def get(self, ref: Any) -> Any:
        try:
            return ray.get(ref, timeout=_POLL * 12)
        except (
            RayActorError,
            WorkerCrashedError,
            OutOfMemoryError,
            NodeDiedError,
            GetTimeoutError,
            ObjectLostError,
        ) as e:
            raise _death(e) from None
        except RayTaskError as error:
            if isinstance(error.cause, RayluxError):
                raise error.cause from None
            if isinstance(error.cause, MemoryError) or type(error.cause).__name__ == "OutOfMemoryError":
                raise WorkerDied("memory", f"out of memory ({first_line(error.cause)})") from None
            raise

    def kill(self, worker: Any) -> None:
        ray.kill(worker)

    def capacity(self) -> int | None:
        return self._capacity()

    def supply(self) -> str:
        return supply()


def supply() -> str:
    """Free and total CPUs."""
    free, total = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
    return f"{free:g} of {total:g} CPUs are free"


def _death(error: RayError) -> WorkerDied:
    """What Ray says of a dead actor, as a cause: its node's end, a preemption and a lost connection are not its own."""
    text = str(error)
    node = isinstance(error, NodeDiedError | ObjectLostError) or getattr(error, "preempted", False)
    if node or any(sign in text for sign in ("node has died", "node is dead", "node was dead", "unavailable")):
        return WorkerDied("node", "its node went away")
    if isinstance(error, GetTimeoutError):
        return WorkerDied("timeout", "its answer did not arrive")
    if isinstance(error, OutOfMemoryError):
        return WorkerDied("memory", "Ray ended it: the node ran out of memory")
    return WorkerDied("process", "its process ended")


def _is_error(ref: Any) -> bool:
    """Whether an object on the driver's node stands for one that is lost: Ray puts an error there in its place."""
    try:
        # From the node's shared memory, without a copy, and let go of at once.
        ray.get(ref, timeout=0)
    except ObjectLostError:
        return True
    except RayError:  # not known in no time; whoever asks for the value will see
        return False
    return False


class RayBackend:
    """Workers and shards as actors, started when first asked for: a stage without gradients loads no model."""

    def __init__(
        self,
        worker: WorkerSpec,
        shards: Sequence[ShardSpec],
        workers: int,
        timeout: float,
        started: bool,
        capacity: Callable[[], int | None],
        notify: Notify,
        welcome: Callable[[dict[str, Any]], None],
        kind: type = GradientWorker,
        worker_labels: Mapping[str, str] | None = None,
        shard_labels: Mapping[str, str] | None = None,
        gpus: int = 1,
    ) -> None:
        self._kind, self._gpus = kind, gpus
        self._worker_labels, self._shard_labels = worker_labels, dict(shard_labels or {})
        self._planned, self.shards = workers, len(shards)
        self._timeout, self._started = timeout, started
        self._worker_spec, self._shard_specs = worker, list(shards)
        self._capacity, self._notify, self._welcome = capacity, notify, welcome
        self._pool: Pool | None = None
        self._shards: list[Any] = []

    @property
    def workers(self) -> int:
        return len(self._pool) if self._pool else self._planned

    def open(self, method: str, parts: bool = False) -> AbstractContextManager[Work]:
        if self._pool is None:
            transport = RayTransport(self._worker_spec, self._capacity, self._kind, self._worker_labels, self._gpus)
            self._pool = Pool(transport, self._planned, self._timeout, self._notify, self._welcome)
        return self._pool.open(method, 1 + self.shards if parts else 1)

    def share(self, value: Any) -> Any:
        return ray.put(value)

    def gone(self, handles: Sequence[Any]) -> list[bool]:
        # The driver owns them: it answers from its own table. Small objects travel with the answer and have no node.
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        here = ray.get_runtime_context().get_node_id()
        known = get_object_locations(list(handles))
        places = [set() if known[handle]["did_spill"] else set(known[handle]["node_ids"]) for handle in handles]
        return [
            _is_error(handle) if nodes == {here} else bool(nodes) and not nodes & alive
            for handle, nodes in zip(handles, places, strict=True)
        ]

    # shards

    def _shard(self, index: int) -> Any:
        if not self._shards:
            self._shards = [self._start_shard(spec) for spec in self._shard_specs]
            pids = [shard.pid.remote() for shard in self._shards]
            for number, ref in enumerate(pids):
                answer = self._answer(number, ref, "start", self._timeout)
                self._notify("shard", shard=number, state="started", pid=None if isinstance(answer, Lost) else answer)
        return self._shards[index]

    def _start_shard(self, spec: ShardSpec) -> Any:
        # Shards work while workers wait and the other way round: they take no CPU of their own.
        return (
            ray.remote(FactorShard)
            .options(num_cpus=0, scheduling_strategy="SPREAD", label_selector=self._shard_labels)
            .remote(spec)
        )

    def ask(self, method: str, args: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        refs = {shard: self._call(shard, method, call) for shard, call in args.items()}
        return {shard: self._answer(shard, ref, method, self._timeout) for shard, ref in refs.items()}

    def shard_stream(self, method: str, jobs: Iterable[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        waiting = deque(jobs)
        deaths: dict[tuple[Any, ...], int] = {}
        running: dict[Any, tuple[int, tuple[Any, ...], float]] = {}
        idle = deque(range(self.shards))
        while waiting or running:
            while waiting and idle:
                shard, job = idle.popleft(), waiting.popleft()
                running[self._call(shard, method, job)] = shard, job, time.monotonic()
            with profiling.of("ask"):
                ready, _ = ray.wait(list(running), num_returns=1, timeout=_POLL, fetch_local=False)
            late = [ref for ref, (_, _, since) in running.items() if time.monotonic() - since > self._timeout]
            for ref in dict.fromkeys([*ready, *late]):
                shard, job, since = running.pop(ref)
                idle.append(shard)
                answer, spent = self._timed(shard, ref, f"{method} of {job[0]}", _POLL)
                if not isinstance(answer, Lost):
                    self._notify(
                        "unit", method=method, unit=job[0], shard=shard, seconds=time.monotonic() - since,
                        **profiling.facts(spent),
                    )  # fmt: skip
                    yield job, answer
                    continue
                deaths[job] = deaths.get(job, 0) + (not answer.node)
                if deaths[job] >= _SHARD_DEATHS:
                    raise RayluxError(
                        f"{method} of {job[0]} ended {_SHARD_DEATHS} factor shards (last: {answer.reason}); "
                        "give them more memory or a larger engine.timeout, and run the same command again"
                    )
                self._notify("repeated", units=1, unit=job[0])
                # Behind the others: what dies by chance beside it is not counted against it again at once.
                waiting.append(job)

    def _call(self, shard: int, method: str, args: tuple[Any, ...]) -> Any:
        return self._shard(shard).timed.options(name=f"FactorShard.{method}").remote(method, *args)

    def _answer(self, shard: int, ref: Any, what: str, timeout: float) -> Any:
        """As ``_timed``, its time told to the driver's clock."""
        answer, spent = self._timed(shard, ref, what, timeout)
        profiling.helped(spent)
        return answer

    def _timed(self, shard: int, ref: Any, what: str, timeout: float) -> tuple[Any, profiling.Spent | None]:
        """A shard's answer; ``Lost`` where it died (a new one stands in its place) or an argument is gone."""
        cause = "process"
        try:
            with profiling.of("ask"):
                return profiling.untimed(ray.get(ref, timeout=timeout))
        except RayTaskError as error:
            if isinstance(error.cause, RayluxError):
                raise error.cause from None
            if isinstance(error.cause, ObjectLostError):
                return Lost(False, first_line(error.cause)), None
            raise
        except ObjectLostError as error:
            return Lost(False, first_line(error)), None
        except GetTimeoutError:
            reason = f"{what} did not answer in {timeout:.0f} s (engine.timeout sets the limit)"
            cause = "timeout"
        except (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
            death = _death(error)
            reason, cause = death.reason, death.cause
        ray.kill(self._shards[shard])
        self._notify("shard", shard=shard, state="died", cause=cause, reason=reason, method=what)
        self._shards[shard] = self._start_shard(self._shard_specs[shard])
        return Lost(True, reason, cause == "node"), None

    # the rest

    def tasks(self, function: Any, jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
        # The workers hold the CPUs while they live, and wait meanwhile: a task takes none of its own. Ray runs
        # a task again by itself when its process or node dies.
        remote = ray.remote(function).options(num_cpus=0)
        results: list[Any] = []
        running: deque[Any] = deque()
        for args in jobs:
            if len(running) >= self.workers:
                results.append(self._task(running.popleft(), function.__name__))
            running.append(remote.remote(*args))
        return results + [self._task(ref, function.__name__) for ref in running]

    def _task(self, ref: Any, what: str) -> Any:
        try:
            with profiling.of("wait"):
                return ray.get(ref, timeout=self._timeout)
        except RayTaskError as error:
            if isinstance(error.cause, RayluxError):
                raise error.cause from None
            raise
        except GetTimeoutError:
            raise RayluxError(
                f"{what} did not answer in {self._timeout:.0f} s (engine.timeout sets the limit); {supply()}"
            ) from None
        except RayError as error:
            raise RayluxError(f"{what} died on every node that tried it ({first_line(error)})") from None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        for shard in self._shards:
            ray.kill(shard)
        if self._started:
            ray.shutdown()


def first_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
