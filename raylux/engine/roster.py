"""Who of a pool's workers could take a job: kept as they change, so that handing one out asks nobody else.

With thousands of workers a result comes every millisecond: nothing that is done per result may look at all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from raylux.engine.work import Job


@dataclass
class Flight:
    """A call on its way; ``forgotten`` once nobody wants its result any more."""

    head: Any
    parts: list[Any]
    job: Job
    forgotten: bool = False


@dataclass(eq=False)
class Slot:
    """A worker's place in the pool; the process in it changes.

    Attributes:
        number: of the place.
        process: a number of the process in it, never used again.
        handle: of the process.
        ready: reference that has the process's facts once its model is loaded.
        since: when the process, or what it does now, began.
        facts: about the process; None until it has started.
        flights: its calls, the first of which runs.
        fresh: it has done nothing yet.
        alone: a suspect runs here, and nothing is to wait behind it.
    """

    number: int
    process: int
    handle: Any
    ready: Any
    since: float
    facts: dict[str, Any] | None = None
    flights: deque[Flight] = field(default_factory=deque)
    fresh: bool = True
    alone: bool = False


class Roster:
    """The slots of a pool, sorted by what they could take.

    Args:
        window: calls that a worker may have, at most.
    """

    def __init__(self, window: int) -> None:
        self._all: dict[Slot, None] = {}
        # Those that start, the longest first; those that have started and done nothing; and by their calls.
        self._starting: dict[Slot, None] = {}
        self._fresh: dict[Slot, None] = {}
        self._loads: list[dict[Slot, None]] = [{} for _ in range(window)]

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._all)

    def sort(self, slot: Slot) -> None:
        """Put a slot, new or changed, where it belongs."""
        self._all[slot] = None
        self._take_out(slot)
        if slot.facts is None:
            self._starting[slot] = None
            return
        if slot.fresh:
            self._fresh[slot] = None
        if not slot.alone and len(slot.flights) < len(self._loads):
            self._loads[len(slot.flights)][slot] = None

    def remove(self, slot: Slot) -> None:
        self._take_out(slot)
        del self._all[slot]

    def _take_out(self, slot: Slot) -> None:
        self._starting.pop(slot, None)
        self._fresh.pop(slot, None)
        for load in self._loads:
            load.pop(slot, None)

    def holding(self, calls: int) -> Slot | None:
        """One that has started and has so many calls, and may get another; the one that came to that first."""
        return next(iter(self._loads[calls]), None)

    @property
    def fresh(self) -> Slot | None:
        """One that has started and done nothing yet."""
        return next(iter(self._fresh), None)

    @property
    def newest(self) -> Slot | None:
        """Of those that start, the one that began last."""
        return next(reversed(self._starting), None)

    @property
    def none_started(self) -> bool:
        return len(self._starting) == len(self._all)
