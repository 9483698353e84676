"""A cluster that is only thought of: what Ray does for the engine, on a virtual clock, with drawn times and faults.

The pool, the passes, the shards' sums and the run folder around it are the real ones. Nothing sleeps: a wait jumps
to the next event. Calls compute whatever ``Behaviour.compute`` says, so that bits can be compared, or nothing at all.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from raylux.engine.transport import Cause, WorkerDied

Fate = Literal["process", "memory", "hang"]


def _nothing(method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return ()


def _no_fate(method: str, args: tuple[Any, ...]) -> Fate | None:
    return None


@dataclass(frozen=True)
class Behaviour:
    """How long things take, what they return, and what dies of them.

    Attributes:
        service: draws the seconds of a call.
        startup: draws the seconds from a worker's place on a node to its loaded model.
        compute: what a call returns, one value per reference (missing ones are None); it may raise.
        fate: asked as a call begins to run: whether its worker dies of it, or hangs.
        numerics: of a node, by its number.
        tick: seconds within which a driver takes finished calls together; above 0 it needs fewer turns.
        call: seconds that a call takes of the driver, whatever its worker does.
        make: of a worker, by its number, once it has a place: something with ``GradientWorker``'s ``prepare`` and
            ``timed``, which answers all its calls; None: ``compute`` answers, without a process's own state.
    """

    service: Callable[[random.Random, str, tuple[Any, ...]], float] = lambda draw, method, args: 60.0
    startup: Callable[[random.Random], float] = lambda draw: 90.0
    compute: Callable[[str, tuple[Any, ...]], tuple[Any, ...]] = _nothing
    fate: Callable[[str, tuple[Any, ...]], Fate | None] = _no_fate
    numerics: Callable[[int], dict[str, Any]] = lambda node: {"torch": "", "device": "simulated", "threads": 1}
    tick: float = 0.0
    call: float = 0.0
    make: Callable[[int], Any] | None = None


@dataclass
class Seconds:
    """Device seconds by what they went to.

    Attributes:
        starting: until models were loaded, or the worker died before.
        working: calls that finished.
        lost: calls whose worker died, hung or was ended.
    """

    starting: float = 0.0
    working: float = 0.0
    lost: float = 0.0

    @property
    def total(self) -> float:
        return self.starting + self.working + self.lost


@dataclass(eq=False)
class Node:
    """A machine: how many workers it takes, and which are there."""

    number: int
    places: int
    alive: bool = True
    workers: dict[Worker, None] = field(default_factory=dict)


@dataclass(eq=False)
class Ref:
    """A value to come. The first of a call travels with the answer, the others rest on the node that made them."""

    inline: bool
    done: bool = False
    watched: bool = False
    value: Any = None
    error: Exception | None = None
    node: Node | None = None

    @property
    def lost(self) -> bool:
        """Whether it went away with its node."""
        return not self.inline and self.node is not None and not self.node.alive


@dataclass(eq=False)
class _Call:
    method: str
    args: tuple[Any, ...]
    refs: list[Ref]


@dataclass(eq=False)
class Worker:
    """A process, waiting for its place while it has no node. Its first call is the one that runs."""

    number: int
    node: Node | None = None
    calls: deque[_Call] = field(default_factory=deque)
    since: float = 0.0
    dead: WorkerDied | None = None
    actor: Any = None


class SimulatedCluster:
    """A ``Transport`` on a virtual clock.

    Args:
        places: workers that each node takes.
        behaviour: of calls.
        seed: of everything that is drawn.
        elastic: whether the number of workers follows the nodes (``engine.workers: auto``).
        driver: a clock of what the driver itself takes, in seconds; as much of the virtual time goes by between two
            waits. None: the driver takes no time, and equal seeds give equal histories.
    """

    def __init__(
        self,
        places: Sequence[int],
        behaviour: Behaviour,
        seed: int = 0,
        elastic: bool = True,
        driver: Callable[[], float] | None = None,
    ) -> None:
        self.behaviour, self.draw = behaviour, random.Random(seed)
        self.seconds = Seconds()
        self.nodes: dict[int, Node] = {}
        self.started = 0
        self._elastic = elastic
        self._driver = driver
        self._driven = driver() if driver else 0.0
        # Seconds that the driver has taken for calls since the last wait.
        self._owed = 0.0
        self._now = 0.0
        self._count = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._waiting: deque[Worker] = deque()
        self._free: dict[Node, None] = {}
        # Watched references that are done.
        self._ready: dict[Ref, None] = {}
        self._numbers = itertools.count()
        for size in places:
            self.join(size)

    # as Transport

    def now(self) -> float:
        return self._now

    def start(self) -> Worker:
        worker = Worker(self.started)
        self.started += 1
        self._waiting.append(worker)
        self._place()
        return worker

    def call(self, worker: Worker, method: str, args: tuple[Any, ...], returns: int) -> list[Ref]:
        self._owed += self.behaviour.call
        call = _Call(method, args, [Ref(inline=place == 0) for place in range(returns)])
        if worker.dead is not None:
            self._fail(call, worker.dead)
            return call.refs
        worker.calls.append(call)
        if worker.node is not None and len(worker.calls) == 1:
            self._begin(worker)
        return call.refs

    def watch(self, ref: Ref) -> None:
        ref.watched = True
        if ref.done:
            self._ready[ref] = None

    def unwatch(self, ref: Ref) -> None:
        ref.watched = False
        self._ready.pop(ref, None)

    def wait(self, timeout: float) -> list[Ref]:
        if self._driver is not None:
            self.sleep(self._driver() - self._driven)
        owed, self._owed = self._owed, 0.0
        self.sleep(owed)
        deadline = self._now + timeout
        while not self._ready and self._step(deadline):
            pass
        if self._ready and self.behaviour.tick:
            self.sleep(self.behaviour.tick)
        if self._driver is not None:
            self._driven = self._driver()
        return list(self._ready)

    def get(self, ref: Ref) -> Any:
        assert ref.done, "it was not waited for"
        if ref.error is not None:
            raise ref.error
        if ref.lost:
            raise WorkerDied("node", "its node went away")
        return ref.value

    def kill(self, worker: Worker) -> None:
        self._end(worker, WorkerDied("process", "its process was ended"))

    def capacity(self) -> int | None:
        return sum(node.places for node in self.nodes.values()) if self._elastic else None

    def supply(self) -> str:
        total = sum(node.places for node in self.nodes.values())
        used = sum(len(node.workers) for node in self.nodes.values())
        return f"{total - used} of {total} places are free"

    # what happens to it

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        """Have something happen at a time of the virtual clock. What it raises ends the driver's wait."""
        heapq.heappush(self._events, (max(seconds, self._now), next(self._count), action))

    def sleep(self, seconds: float) -> None:
        """Let time go by, with all that happens meanwhile."""
        deadline = self._now + seconds
        while self._step(deadline):
            pass

    def join(self, places: int) -> Node:
        """A node comes."""
        node = Node(next(self._numbers), places)
        self.nodes[node.number] = node
        if places:
            self._free[node] = None
        self._place()
        return node

    def lose(self, node: Node) -> None:
        """A node goes, with its workers and the objects that rest on it."""
        if not node.alive:
            return
        node.alive = False
        del self.nodes[node.number]
        self._free.pop(node, None)
        for worker in list(node.workers):
            self._end(worker, WorkerDied("node", "its node went away"))

    def crash(self, worker: Worker, cause: Cause = "process") -> None:
        """A worker's process ends by itself."""
        self._end(worker, WorkerDied(cause, "its process ended"))

    @property
    def workers(self) -> list[Worker]:
        """Those that have a place, in the order of their nodes."""
        return [worker for node in self.nodes.values() for worker in node.workers]

    # how it goes on

    def _step(self, deadline: float) -> bool:
        """Go on to the next event up to a time; False: to that time, where there is none."""
        if not self._events or self._events[0][0] > deadline:
            self._now = max(self._now, deadline)
            return False
        self._now, _, action = heapq.heappop(self._events)
        action()
        return True

    def _place(self) -> None:
        while self._waiting and self._free:
            worker = self._waiting.popleft()
            if worker.dead is not None:
                continue
            node = next(iter(self._free))
            node.workers[worker] = None
            if len(node.workers) == node.places:
                del self._free[node]
            worker.node = node
            if worker.calls:
                self._begin(worker)

    def _begin(self, worker: Worker) -> None:
        call = worker.calls[0]
        worker.since = self._now
        starting = call.method == "prepare"
        behaviour = self.behaviour
        seconds = behaviour.startup(self.draw) if starting else behaviour.service(self.draw, call.method, call.args)
        fate = behaviour.fate(call.method, call.args)
        if fate == "hang":
            return
        if fate is not None:
            reason = "its process ended" if fate == "process" else "out of memory"
            death = WorkerDied(fate, reason)
            self.at(self._now + seconds * self.draw.random(), lambda: self._runs(worker, call, death))
            return
        self.at(self._now + seconds, lambda: self._finish(worker, call))

    def _runs(self, worker: Worker, call: _Call, death: WorkerDied) -> None:
        if worker.calls and worker.calls[0] is call:
            self._end(worker, death)

    def _finish(self, worker: Worker, call: _Call) -> None:
        if not worker.calls or worker.calls[0] is not call:
            return
        worker.calls.popleft()
        self._spent(worker, call, "working")
        assert worker.node is not None
        values: tuple[Any, ...] = ()
        error: Exception | None = None
        try:
            values = self._answer(worker, call)
        except Exception as raised:  # as Ray does, it goes to whoever asks for the value
            error = raised
        for ref, value in itertools.zip_longest(call.refs, values):
            ref.value, ref.error, ref.node = value, error, worker.node
            self._is_done(ref)
        if worker.calls:
            self._begin(worker)

    def _answer(self, worker: Worker, call: _Call) -> tuple[Any, ...]:
        behaviour = self.behaviour
        if behaviour.make is None:
            return self._facts(worker) if call.method == "prepare" else behaviour.compute(call.method, call.args)
        worker.actor = worker.actor or behaviour.make(worker.number)
        parts = len(call.refs) > 1
        value = worker.actor.timed(call.method, parts, *call.args)
        return tuple(value) if parts else (value,)

    def _facts(self, worker: Worker) -> tuple[dict[str, Any]]:
        assert worker.node is not None
        number = worker.node.number
        facts = {"pid": worker.number, "host": f"node{number}", "weights": ""}
        return ({**facts, "numerics": self.behaviour.numerics(number)},)

    def _spent(self, worker: Worker, call: _Call, what: Literal["working", "lost"]) -> None:
        kind = "starting" if call.method == "prepare" else what
        setattr(self.seconds, kind, getattr(self.seconds, kind) + self._now - worker.since)

    def _end(self, worker: Worker, death: WorkerDied) -> None:
        if worker.dead is not None:
            return
        worker.dead, worker.actor = death, None
        if worker.node is not None:
            if worker.calls:
                self._spent(worker, worker.calls[0], "lost")
            del worker.node.workers[worker]
            if worker.node.alive:
                self._free[worker.node] = None
        for call in worker.calls:
            self._fail(call, death)
        worker.calls.clear()
        self._place()

    def _fail(self, call: _Call, death: WorkerDied) -> None:
        for ref in call.refs:
            ref.error = death
            self._is_done(ref)

    def _is_done(self, ref: Ref) -> None:
        ref.done = True
        if ref.watched:
            self._ready[ref] = None
