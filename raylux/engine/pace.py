"""When the next snapshot of running sums is due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Of the time between two snapshots, what writing one may take, where their spacing follows their cost.
SHARE = 0.01
# What a first snapshot is thought to cost until one is measured: a call, and bytes at a slow disk's pace.
_CALL, _RATE = 0.05, 1e8


class Pace:
    """Spaces snapshots in time.

    Args:
        setting: seconds between two; 0: after every unit; "auto": so that writing them takes ``SHARE`` of the time,
            or more where holders of sums die: then so that writing and doing again together take least.
        size: bytes of one, by which the first is spaced under "auto".
        now: a clock that only goes forward, in seconds.
    """

    def __init__(self, setting: float | str, size: int, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._every = None if isinstance(setting, str) else float(setting)
        self._cost = _CALL + size / _RATE
        self._begun = self._last = now()
        self._deaths = 0

    @property
    def due(self) -> bool:
        return self._now() - self._last >= (self._auto if self._every is None else self._every)

    @property
    def _auto(self) -> float:
        """Seconds between two: by cost alone, or Young's √(2 · cost · mean time between deaths) where that is less."""
        every = self._cost / SHARE
        if not self._deaths:
            return every
        between = (self._now() - self._begun) / self._deaths
        return min(every, math.sqrt(2 * self._cost * between))

    def died(self) -> None:
        """What came since the last snapshot has to be done again."""
        self._deaths += 1

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around the writing of one."""
        start = self._now()
        yield
        self._last = self._now()
        self._cost = self._last - start
