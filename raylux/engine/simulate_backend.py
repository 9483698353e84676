"""The engine's backend on a simulated cluster: the real pool, and factor shards that live in this process and die."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from raylux.engine.pool import Notify, Pool
from raylux.engine.simulate import Node, Ref, SimulatedCluster
from raylux.engine.work import Lost, Work
from raylux.errors import RayluxError

# A job that ends its shard this often is not tried again.
_DEATHS = 4
ShardFate = Literal["before", "after"]


def _no_fate(shard: int, method: str) -> ShardFate | None:
    return None


@dataclass(frozen=True)
class ShardBehaviour:
    """How factor shards are made, how long they take, and when they die.

    Attributes:
        make: shard -> a new one, with ``FactorShard``'s methods and no state.
        seconds: (method, arguments) -> how long the answer takes.
        fate: (shard, method) -> whether it dies of the call, before it does anything or after it did everything.
        spread: shards live on the nodes and go with them; otherwise where nothing is preempted.
    """

    make: Callable[[int], Any]
    seconds: Callable[[str, tuple[Any, ...]], float] = lambda method, args: 0.0
    fate: Callable[[int, str], ShardFate | None] = _no_fate
    spread: bool = False


@dataclass
class _Shard:
    actor: Any
    node: Node | None
    dead: str = ""

    @property
    def reason(self) -> str:
        """Why it is dead; empty while it lives."""
        gone = self.node is not None and not self.node.alive
        return self.dead or ("its node went away" if gone else "")


@dataclass
class SimulatedBackend:
    """A ``Backend``.

    Args:
        cluster: where the workers run.
        workers: how many to start with.
        shards: how many factor shards.
        shard: how these behave.
        timeout: seconds, as ``engine.timeout``.
        notify: told of what happens to workers and shards.
    """

    cluster: SimulatedCluster
    planned: int
    shards: int
    shard: ShardBehaviour
    timeout: float = 600.0
    notify: Notify = lambda *_, **__: None
    _pool: Pool | None = None
    _shards: dict[int, _Shard] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._shards = {number: self._start(number) for number in range(self.shards)}

    @property
    def workers(self) -> int:
        return len(self._pool) if self._pool else self.planned

    def open(self, method: str, parts: bool = False) -> AbstractContextManager[Work]:
        if self._pool is None:
            self._pool = Pool(self.cluster, self.planned, self.timeout, self.notify)
        return self._pool.open(method, 1 + self.shards if parts else 1)

    def share(self, value: Any) -> Any:
        return value

    def gone(self, handles: Sequence[Any]) -> list[bool]:
        return [handle.lost for handle in handles]

    def crash_shard(self, number: int) -> None:
        """A shard's process ends by itself, and what it held is gone."""
        self._shards[number].dead = "its process ended"

    def ask(self, method: str, args: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        self.cluster.sleep(max((self.shard.seconds(method, call) for call in args.values()), default=0.0))
        return {number: self._answer(number, method, call) for number, call in args.items()}

    def _answer(self, number: int, method: str, args: tuple[Any, ...]) -> Any:
        shard = self._shards[number]
        fate = self.shard.fate(number, method)
        if fate == "before" and not shard.dead:
            shard.dead = f"its process ended in {method}"
        if not shard.reason:
            if any(isinstance(value, Ref) and value.lost for value in args):
                return Lost(False, "an argument went away with its node")
            values = [self.cluster.get(value) if isinstance(value, Ref) else value for value in args]
            answer = getattr(shard.actor, method)(*values)
            if fate is None:
                return answer
            shard.dead = f"its process ended after {method}"
        self.notify("shard", shard=number, state="died", reason=shard.reason, method=method)
        self._shards[number] = self._start(number)
        return Lost(True, shard.reason)

    def _start(self, number: int) -> _Shard:
        nodes = list(self.cluster.nodes.values()) if self.shard.spread else []
        return _Shard(self.shard.make(number), nodes[number % len(nodes)] if nodes else None)

    def shard_stream(self, method: str, jobs: Iterable[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        waiting, deaths = deque(jobs), dict[tuple[Any, ...], int]()
        while waiting:
            calls = {number: waiting.popleft() for number in range(min(self.shards, len(waiting)))}
            for number, answer in self.ask(method, calls).items():
                job = calls[number]
                if not isinstance(answer, Lost):
                    yield job, answer
                    continue
                deaths[job] = deaths.get(job, 0) + 1
                if deaths[job] >= _DEATHS:
                    raise RayluxError(f"{method} of {job[0]} ended {_DEATHS} factor shards (last: {answer.reason})")
                waiting.appendleft(job)

    def tasks(self, function: Any, jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
        return [function(*args) for args in jobs]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
