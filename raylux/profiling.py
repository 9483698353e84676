"""Where time goes: sections of named kinds, timed exclusively, in the thread that runs them.

A clock is at work in a thread while one of its stretches is open. Code deep below says ``with of("rotate"):`` and
need not know whether anybody is measuring; where nobody is, that costs next to nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

KINDS = (
    "load",
    "read",
    "forward",
    "label",
    "backward",
    "keep",
    "covariance",
    "rotate",
    "form",
    "square",
    "dot",
    "add",
    "eigendecomposition",
    "solve",
    "compress",
    "write",
    "other",
    "wait",
    "ask",
    "commit",
)
"""What work is called. ``other``: within a stretch, outside of every section. The last three are the driver's: waiting
for workers, waiting for the answers of factor shards, committing."""

OTHER = "other"


@dataclass
class Spent:
    """Seconds by kind.

    Attributes:
        kinds: kind -> [wall seconds, CPU seconds of the process, all its threads].
        tokens: that went through a forward pass.
        bytes: of sums that were added.
    """

    kinds: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    bytes: int = 0

    def add(self, more: Spent) -> None:
        """Add another's seconds, tokens and bytes."""
        for kind, (wall, cpu) in more.kinds.items():
            entry = self.kinds.setdefault(kind, [0.0, 0.0])
            entry[0] += wall
            entry[1] += cpu
        self.tokens += more.tokens
        self.bytes += more.bytes

    def rounded(self) -> dict[str, list[float]]:
        """The kinds to microseconds, for a line of text."""
        return {kind: [round(wall, 6), round(cpu, 6)] for kind, (wall, cpu) in self.kinds.items()}


@dataclass(frozen=True)
class Timed:
    """What a method returned, and what it took."""

    value: Any
    spent: Spent


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


class Clock:
    """Tells which kind of work a thread's seconds went to.

    A section that is opened within another one stops that one's time: every second counts once.

    Args:
        synchronise: called where a section begins and ends, so that what a device does meanwhile counts to the
            section that asked for it (``torch.cuda.synchronize``); None: work is done when its call returns.
        now: wall and CPU seconds; both only go forward.
    """

    def __init__(
        self, synchronise: Callable[[], object] | None = None, now: Callable[[], tuple[float, float]] = _now
    ) -> None:
        self._synchronise, self._now = synchronise, now
        self._spent, self._helped = Spent(), Spent()
        self._open: list[str] = []
        self._wall = self._cpu = 0.0
        self._sections: dict[str, _Section] = {}

    def of(self, kind: str) -> _Section:
        """A section of one of ``KINDS``, to be used in a ``with``."""
        section = self._sections.get(kind)
        if section is None:
            if kind not in KINDS:
                raise ValueError(f"no kind of work: {kind}")
            section = self._sections[kind] = _Section(self, kind)
        return section

    @contextmanager
    def running(self) -> Iterator[None]:
        """A stretch: this clock is the one that ``of`` finds in this thread until it ends."""
        before = getattr(_HERE, "clock", None)
        _HERE.clock = self
        self._enter(OTHER)
        try:
            yield
        finally:
            self._leave()
            _HERE.clock = before

    def take(self) -> Spent:
        """What was spent since the last take. Within a stretch, up to now."""
        if self._open:
            self._charge(self._open[-1])
        spent, self._spent = self._spent, Spent()
        return spent

    def take_helped(self) -> Spent:
        """What ``helped`` was told of since the last such take."""
        helped, self._helped = self._helped, Spent()
        return helped

    def count(self, tokens: int = 0, size: int = 0) -> None:
        """So many tokens went through a forward pass, sums of so many bytes were added."""
        self._spent.tokens += tokens
        self._spent.bytes += size

    def helped(self, spent: Spent) -> None:
        """What another process spent on this one's behalf."""
        self._helped.add(spent)

    def _enter(self, kind: str) -> None:
        self._charge(self._open[-1] if self._open else None)
        self._open.append(kind)

    def _leave(self) -> None:
        self._charge(self._open.pop())

    def _charge(self, kind: str | None) -> None:
        """Put the time since the last change on a kind."""
        if self._synchronise is not None:
            self._synchronise()
        wall, cpu = self._now()
        if kind is not None:
            entry = self._spent.kinds.setdefault(kind, [0.0, 0.0])
            entry[0] += wall - self._wall
            entry[1] += cpu - self._cpu
        self._wall, self._cpu = wall, cpu


class _Section:
    """Holds nothing of its own, so one serves every time."""

    __slots__ = ("_clock", "_kind")

    def __init__(self, clock: Clock, kind: str) -> None:
        self._clock, self._kind = clock, kind

    def __enter__(self) -> None:
        self._clock._enter(self._kind)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock._leave()


class _Nobody:
    """A section where no clock is at work."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


_HERE = threading.local()
_NOBODY = _Nobody()


def of(kind: str) -> _Section | _Nobody:
    """A section of the clock that is at work in this thread, if there is one."""
    clock: Clock | None = getattr(_HERE, "clock", None)
    return _NOBODY if clock is None else clock.of(kind)


def count(tokens: int = 0, size: int = 0) -> None:
    """Tell the clock that is at work in this thread, if there is one, of tokens and bytes as ``Clock.count``."""
    clock: Clock | None = getattr(_HERE, "clock", None)
    if clock is not None:
        clock.count(tokens, size)


def helped(spent: Spent | None) -> None:
    """Tell the clock that is at work in this thread, if there is one, what another process spent on its behalf."""
    clock: Clock | None = getattr(_HERE, "clock", None)
    if clock is not None and spent is not None:
        clock.helped(spent)


def timed(target: Any, clock: Clock, method: str, parts: bool, args: tuple[Any, ...]) -> Any:
    """Call a method and put beside its value what it took.

    Args:
        target: whose method.
        clock: that runs meanwhile.
        method: its name.
        parts: it returns a tuple whose first element is the value.
        args: of the method.

    Returns:
        A ``Timed``; with ``parts`` a tuple of it and the rest.
    """
    clock.take()  # what a call that raised left behind
    with clock.running():
        value = getattr(target, method)(*args)
    spent = clock.take()
    return (Timed(value[0], spent), *value[1:]) if parts else Timed(value, spent)


def facts(spent: Spent | None) -> dict[str, Any]:
    """What is told of an answer's time with the event of its arrival; nothing where it is not known."""
    if spent is None:
        return {}
    counted = {"tokens": spent.tokens, "bytes": spent.bytes}
    return {"kinds": spent.rounded()} | {name: count for name, count in counted.items() if count}


def untimed(answer: Any) -> tuple[Any, Spent | None]:
    """The value of an answer, and what it took where that is beside it."""
    return (answer.value, answer.spent) if isinstance(answer, Timed) else (answer, None)
