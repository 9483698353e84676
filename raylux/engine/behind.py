"""What is written while the next is computed: one call at a time, in a thread of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class Behind:
    """A thread that a call is handed to as soon as the one before has ended, however that was."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._last: Future[Any] | None = None

    def call(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> Future[T]:
        """Start a call; its error is raised by the ``result`` of what is returned."""
        self.wait()
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="raylux-behind")
        found = self._pool.submit(function, *args, **options)
        self._last = found
        return found

    def wait(self) -> None:
        """Until nothing is under way."""
        if self._last is not None:
            with contextlib.suppress(Exception):  # whoever has its future is told
                self._last.result()
            self._last = None
