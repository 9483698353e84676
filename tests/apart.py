"""A run over many workers and shards without their processes: real ones, each by itself, on a simulated cluster.

What Ray does for a run is what is simulated: which worker gets a call, when it answers and in what order, and that
processes die. Workers and shards are the real ones, one of each kind per process that there would be; they share
nothing, and what goes to them and comes from them is pickled as Ray does it, with arrays that cannot be written to.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray.cloudpickle
import torch

from raylux.engine import session
from raylux.engine.pool import Notify
from raylux.engine.shard import FactorShard, ShardSpec
from raylux.engine.simulate import Behaviour, Fate, SimulatedCluster
from raylux.engine.simulate_backend import ShardBehaviour, ShardFate, SimulatedBackend
from raylux.engine.worker import GradientWorker, WorkerSpec

# Of all calls that begin; so few that none dies often enough to be given up.
_DEADLY = (2, 9)


def sent(value: Any) -> Any:
    """A value as another process gets it from Ray."""
    buffers: list[pickle.PickleBuffer] = []
    raw = ray.cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(raw, buffers=[bytes(buffer.raw()) for buffer in buffers])


class _Apart:
    """A worker or a shard behind a process's wall."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return lambda *args: sent(getattr(self._actor, name)(*sent(args)))


@dataclass
class Processes:
    """What happened to them.

    Attributes:
        workers: number of a worker -> times that a model was loaded there; those that stand for dead ones included.
        shards: as well, how often each was started.
        died: workers and shards, each with the method it died of.
    """

    workers: Counter[int] = field(default_factory=Counter)
    shards: Counter[int] = field(default_factory=Counter)
    died: list[tuple[str, str]] = field(default_factory=list)
    _begun: int = 0
    _asked: Counter[int] = field(default_factory=Counter)

    def backend(
        self,
        worker: WorkerSpec,
        shards: list[ShardSpec],
        workers: int,
        timeout: float,
        started: bool,
        capacity: Any,
        notify: Notify,
        *_: Any,
        **__: Any,
    ) -> SimulatedBackend:
        """In the place of ``RayBackend``, with its arguments."""

        def worker_made(number: int) -> _Apart:
            self.workers[number] += 1
            return _Apart(GradientWorker(sent(worker)))

        def shard_made(number: int) -> _Apart:
            self.shards[number] += 1
            return _Apart(FactorShard(sent(shards[number])))

        behaviour = Behaviour(
            service=lambda draw, method, args: draw.uniform(1, 100),
            startup=lambda draw: draw.uniform(1, 300),
            make=worker_made,
            fate=self._worker_dies,
        )
        cluster = SimulatedCluster([1] * workers, behaviour, seed=workers, elastic=False)
        # The virtual clock is no measure of a hang.
        return SimulatedBackend(
            cluster, workers, len(shards), ShardBehaviour(shard_made, fate=self._shard_dies), 1e9, notify
        )

    def _worker_dies(self, method: str, args: tuple[Any, ...]) -> Fate | None:
        if method == "prepare":
            return None
        self._begun += 1
        if self._begun not in _DEADLY:
            return None
        self.died.append(("worker", method))
        return "process"

    def _shard_dies(self, shard: int, method: str) -> ShardFate | None:
        """Each once, the first in the middle of its first sums."""
        self._asked[shard] += 1
        if self._asked[shard] != 3 + 4 * shard:
            return None
        self.died.append(("shard", method))
        return "before" if shard % 2 else "after"


class _Unmetered:
    def __init__(self, run: str) -> None: ...

    def __call__(self, kind: str, facts: Any) -> None: ...

    def close(self) -> None: ...


@contextmanager
def processes() -> Iterator[Processes]:
    """Runs within, with ``engine.backend=ray`` and numbers of workers and shards, are over such processes."""
    found, threads = Processes(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "connect", lambda: False)
        patch.setattr(session, "size", lambda demand, patience=0.0: (demand.workers, demand.shards))
        patch.setattr(session, "settled", lambda demand: demand)
        patch.setattr("raylux.engine.remote.RayBackend", found.backend)
        patch.setattr("raylux.engine.metrics.Meter", _Unmetered)
        try:
            yield found
        finally:
            torch.set_num_threads(threads)
    assert len(found.workers) > 1 and found.died
