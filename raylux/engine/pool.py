"""A pool of gradient workers, every one of which may die at any moment.

A worker's calls run one after the other, so when it dies the oldest unfinished call was the one that ran:
it alone is a suspect, and only if its process died (not its node), and it runs again alone in a fresh worker.
What dies there three times is given up and comes back as a failure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

from raylux import profiling
from raylux.engine.roster import Flight, Roster, Slot
from raylux.engine.transport import Transport, WorkerDied
from raylux.engine.waiting import Waiting
from raylux.engine.work import Failure, Job, Result
from raylux.errors import RayluxError

# Calls queued at a worker: one runs, one waits where calls are so short that fetching the next would count.
WINDOW = 2
SHORT = 10.0
# Jobs of all kinds that wait here, per worker.
AHEAD = 4
# Deaths of a suspect, alone in a fresh worker, after which it is given up.
DEATHS = 3
# Workers that die one after the other before any has loaded the model.
STARTS = 8
# A wait that is woken this often can look after the pool.
_POLL = 2.0
_TEND_EVERY = 5.0

Notify = Callable[..., None]


class Pool:
    """Workers that are replaced when they die, added where they fit, and waited for with a limit.

    Args:
        transport: the cluster.
        workers: how many to start with.
        timeout: seconds in which a worker has to finish a job, and the first worker to start.
        notify: told ``(event, **facts)`` of what happens to workers.
        welcome: looks at a new worker's facts and raises where it may not take part.
    """

    def __init__(
        self,
        transport: Transport,
        workers: int,
        timeout: float,
        notify: Notify = lambda *_, **__: None,
        welcome: Callable[[dict[str, Any]], None] = lambda facts: None,
    ) -> None:
        self._transport, self._timeout, self._notify, self._welcome = transport, timeout, notify, welcome
        self._queue = Waiting()
        # Workers that may have jobs of their own to take, by the number of their process.
        self._processes: dict[int, Slot] = {}
        self._started_processes = 0
        self._asked: dict[int, None] = {}
        self._suspects: deque[Job] = deque()
        self._deaths: dict[Job, int] = {}
        self._results: deque[Result] = deque()
        self._method, self._returns = "", 1
        self.losses = 0
        self._failed_starts, self._finished = 0, 0
        # Jobs that are not yet returned, and calls that are on their way.
        self._pending, self._flying = 0, 0
        self._seconds: float | None = None
        self._watched: dict[Any, Slot] = {}
        self._moved = self._tended = transport.now()
        self._slots = Roster(WINDOW)
        for number in range(workers):
            self._slots.sort(self._slot(number))

    def __len__(self) -> int:
        return len(self._slots)

    def close(self) -> None:
        for slot in self._slots:
            self._transport.kill(slot.handle)
        self._slots, self._watched = Roster(WINDOW), {}

    @contextmanager
    def open(self, method: str, returns: int) -> Iterator[Pool]:
        """Work through jobs of one method; what is unfinished at the end is forgotten."""
        self._method, self._returns, self._finished, self._seconds = method, returns, 0, None
        self._moved = self._transport.now()
        for slot in self._slots:
            slot.since = self._moved
        try:
            yield self
        finally:
            for slot in self._slots:
                # The worker goes on with them: until it is through, they and not later jobs are what it dies of.
                for flight in slot.flights:
                    flight.forgotten = True
                slot.alone = False
                self._slots.sort(slot)
            for held in (self._queue, self._suspects, self._results, self._asked):
                held.clear()
            self._deaths.clear()
            self._pending = 0

    # as Work

    @property
    def room(self) -> bool:
        # Workers that only start count too: when they are ready there is a job for each. Of jobs that wait for a
        # certain worker there are more, or it would find none of its own among them.
        workers = len(self._slots)
        free = self._queue.for_anyone < max(1, self._window * workers - self._flying)
        return free and len(self._queue) < AHEAD * workers

    @property
    def _window(self) -> int:
        """What waits behind a long call begins late, though it may be the one that all others wait for."""
        return WINDOW if self._seconds is not None and self._seconds < SHORT else 1

    @property
    def pending(self) -> int:
        return self._pending

    def submit(self, job: Job) -> None:
        self._pending += 1
        own = job.near if job.near in self._processes else None
        self._queue.put(job, own)
        if own is not None:
            self._asked[own] = None

    def next(self) -> Result | None:
        """The next finished job; None: none yet, but a worker joined and there is room for another job.

        Raises:
            RayluxError: no worker could be started, or none finished anything within the timeout; and what a
                job raised.
        """
        assert self.pending, "nothing was submitted"
        filled = not self.room
        while not self._results:
            if filled and self.room:
                return None
            self._tend()
            self._fill()
            with profiling.of("wait"):
                ready = dict.fromkeys(self._transport.wait(_POLL))
            for ref in ready:
                slot = self._watched.get(ref)
                if slot is not None:
                    self._look(slot, ready)
        self._pending -= 1
        return self._results.popleft()

    # workers

    def _watch(self, ref: Any, slot: Slot) -> None:
        self._watched[ref] = slot
        self._transport.watch(ref)

    def _unwatch(self, ref: Any) -> None:
        if self._watched.pop(ref, None) is not None:
            self._transport.unwatch(ref)

    def _slot(self, number: int) -> Slot:
        handle = self._transport.start()
        (ready,) = self._transport.call(handle, "prepare", (), 1)
        self._started_processes += 1
        slot = Slot(number, self._started_processes, handle, ready, self._transport.now())
        self._watch(ready, slot)
        return slot

    def _end(self, slot: Slot) -> None:
        """End a slot's process, and wait for nothing of it any more."""
        self._transport.kill(slot.handle)
        self._processes.pop(slot.process, None)
        self._asked.pop(slot.process, None)
        self._queue.release(slot.process)
        for ref in (slot.ready, *(flight.head for flight in slot.flights)):
            self._unwatch(ref)
        self._flying -= len(slot.flights)
        slot.flights.clear()

    def _replace(self, slot: Slot) -> None:
        self._end(slot)
        new = self._slot(slot.number)
        slot.process, slot.handle, slot.ready, slot.since = new.process, new.handle, new.ready, new.since
        slot.facts, slot.fresh, slot.alone = None, True, False
        self._watched[slot.ready] = slot
        self._slots.sort(slot)

    def _look(self, slot: Slot, ready: Container[Any]) -> None:
        """Take what a worker has finished, or notice that it died."""
        try:
            if slot.facts is None:
                if slot.ready in ready:
                    self._started(slot, self._transport.get(slot.ready))
                return
            while slot.flights and slot.flights[0].head in ready:
                value = self._transport.get(slot.flights[0].head)
                self._done(slot, value)
        except WorkerDied as death:
            self._died(slot, death)

    def _started(self, slot: Slot, answer: Any) -> None:
        facts, spent = profiling.untimed(answer)
        self._welcome(facts)
        self._unwatch(slot.ready)
        slot.facts, slot.since = facts, self._transport.now()
        self._processes[slot.process] = slot
        self._slots.sort(slot)
        self._moved, self._failed_starts = slot.since, 0
        self._notify("worker", slot=slot.number, state="started", **facts, **profiling.facts(spent))

    def _done(self, slot: Slot, answer: Any) -> None:
        flight = slot.flights.popleft()
        value, spent = profiling.untimed(answer)
        self._unwatch(flight.head)
        self._flying -= 1
        slot.alone = False
        self._slots.sort(slot)
        self._asked[slot.process] = None
        now = self._transport.now()
        seconds, slot.since, self._moved = now - slot.since, now, now
        if flight.forgotten:
            return
        self._seconds = seconds if self._seconds is None else 0.9 * self._seconds + 0.1 * seconds
        self._notify(
            "unit", method=self._method, unit=flight.job.name, slot=slot.number, seconds=seconds,
            queue=self._flying + len(self._queue) + len(self._suspects), **profiling.facts(spent),
        )  # fmt: skip
        self._finished += 1
        self._deaths.pop(flight.job, None)
        assert slot.facts is not None
        self._results.append(Result(flight.job, value, flight.parts, slot.facts["numerics"], worker=slot.process))

    def _died(self, slot: Slot, death: WorkerDied) -> None:
        running, *waiting = [None if flight.forgotten else flight.job for flight in slot.flights] or [None]
        self._notify(
            "worker", slot=slot.number, state="died", cause=death.cause, reason=death.reason,
            unit=running.name if running else None, method=self._method,
        )  # fmt: skip
        self.losses += death.cause == "node"
        if slot.facts is None and death.cause != "node":
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                raise RayluxError(
                    f"{STARTS} gradient workers in a row died before their model was loaded (last: {death.reason}); "
                    "give each more memory (fewer engine.workers), or look at the log of Ray's workers"
                )
        self._queue.put_back(job for job in waiting if job is not None)
        if running is not None:
            if death.cause == "node" and slot.alone:
                self._suspects.appendleft(running)
            elif death.cause == "node":
                self._queue.put_back([running])
            else:
                self._suspect(running, slot.alone, death)
        self._replace(slot)

    def _suspect(self, job: Job, alone: bool, death: WorkerDied) -> None:
        deaths = self._deaths.get(job, 0) + alone
        self._deaths[job] = deaths
        if deaths < DEATHS:
            self._suspects.append(job)
            return
        if death.cause == "timeout" and not self._finished:
            raise RayluxError(
                f"{self._method} of unit {job.name} took longer than {self._timeout:.0f} s in {DEATHS + 1} workers, "
                "and no unit has been quicker: raise engine.timeout"
            )
        del self._deaths[job]
        self._results.append(Result(job, failure=Failure(deaths + 1, death.reason)))

    # jobs

    def _fill(self) -> None:
        """Hand out jobs: suspects alone to fresh workers, then to each its own, the rest evenly."""
        if not self._suspects and not self._queue:
            return
        if self._suspects and not self._soon_fresh:
            idle = self._slots.holding(0)
            if idle is not None:
                self._replace(idle)
        while self._suspects and (slot := self._slots.fresh):
            slot.alone = True
            self._call(slot, self._suspects.popleft())
        for process in list(self._asked):
            self._give_own(self._processes[process])
        self._asked.clear()
        for held in range(self._window):
            while (slot := self._slots.holding(held)) and (job := self._next_for(held)):
                self._call(slot, job)

    def _give_own(self, slot: Slot) -> None:
        while not slot.alone and len(slot.flights) < self._window and (job := self._queue.own(slot.process)):
            self._call(slot, job)

    def _next_for(self, held: int) -> Job | None:
        """A job for a worker that has so many calls and none of its own waiting: another's only if it would idle."""
        return self._queue.any() or (self._queue.others() if held == 0 else None)

    @property
    def _soon_fresh(self) -> bool:
        """Whether a process that has done nothing is there or is to come: those that find no place do not count."""
        newest = self._slots.newest
        coming = newest is not None and self._transport.now() - newest.since <= self._timeout
        return coming or self._slots.fresh is not None

    def _call(self, slot: Slot, job: Job) -> None:
        if not slot.flights:
            slot.since = self._transport.now()
        slot.fresh = False
        head, *parts = self._transport.call(slot.handle, self._method, job.args, self._returns)
        slot.flights.append(Flight(head, parts, job))
        self._watch(head, slot)
        self._flying += 1
        self._slots.sort(slot)

    def _tend(self) -> None:
        """Every few seconds: look for what hangs, and for what came or went."""
        now = self._transport.now()
        if now - self._tended >= _TEND_EVERY:
            self._tended = now
            self._check_time(now)
            self._resize()

    def _resize(self) -> None:
        """Follow the cluster: new workers where they fit, none kept waiting for a place that is gone."""
        capacity = self._transport.capacity()
        if capacity is None:
            return
        while len(self._slots) > max(1, capacity) and (waiting := self._slots.newest):
            self._end(waiting)
            self._slots.remove(waiting)
            self._notify("worker", slot=waiting.number, state="released")
        if len(self._slots) < capacity:
            first = 1 + max(slot.number for slot in self._slots)
            for more in range(capacity - len(self._slots)):
                self._slots.sort(self._slot(first + more))

    def _check_time(self, now: float) -> None:
        """Replace a worker that hangs; give up where nothing at all moves."""
        for slot in list(self._slots):
            if slot.facts is not None and slot.flights and now - slot.since > self._timeout:
                name = slot.flights[0].job.name
                self._moved = now
                self._died(slot, WorkerDied("timeout", f"unit {name} did not finish in {self._timeout:.0f} s"))
        if now - self._moved > self._timeout and self._slots.none_started:
            raise RayluxError(
                f"no gradient worker was ready after {self._timeout:.0f} s while {self.pending} jobs of {self._method} "
                f"wait ({self._transport.supply()}); add nodes or free some, and run the same command again "
                "(engine.timeout sets the limit)"
            )
