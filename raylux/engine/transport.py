"""What a pool of workers needs of a cluster: the few calls that differ between Ray and a simulation."""

from __future__ import annotations

from typing import Any, Literal, Protocol

Cause = Literal["process", "node", "timeout", "memory"]


class WorkerDied(Exception):
    """A call's worker is gone.

    Attributes:
        cause: the process ended by itself, its node went away, it did not answer, or it ran out of memory.
        reason: one line for people.
    """

    def __init__(self, cause: Cause, reason: str) -> None:
        super().__init__(reason)
        self.cause, self.reason = cause, reason


class Transport(Protocol):
    """Processes that hold a gradient worker each. Handles and references are opaque."""

    def now(self) -> float:
        """Seconds on a clock that only goes forward."""
        ...

    def start(self) -> Any:
        """Ask for a new worker and return its handle at once."""
        ...

    def call(self, worker: Any, method: str, args: tuple[Any, ...], returns: int) -> list[Any]:
        """Queue a call behind the worker's earlier ones; one reference per returned value."""
        ...

    def watch(self, ref: Any) -> None:
        """Have ``wait`` tell of a reference until ``unwatch``."""
        ...

    def unwatch(self, ref: Any) -> None:
        """Tell of it no more."""
        ...

    def wait(self, timeout: float) -> list[Any]:
        """The watched references that are ready, waiting up to ``timeout`` seconds for the first."""
        ...

    def get(self, ref: Any) -> Any:
        """A ready value. Raises WorkerDied, or what the method raised."""
        ...

    def kill(self, worker: Any) -> None:
        """End a worker, whatever it does."""
        ...

    def capacity(self) -> int | None:
        """How many workers fit the cluster as it is now; None: their number is fixed."""
        ...

    def supply(self) -> str:
        """What the cluster has, for a message."""
        ...
