"""Jobs that wait for a worker, those that a certain worker does best apart from the rest.

A worker that has run a sequence keeps it on its disk: whoever takes another turn with the same sequence there is spared
a forward and a backward pass. That is a wish, not a duty: nobody idles while jobs wait for somebody else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from raylux.engine.work import Job


class Waiting:
    """Jobs in the order in which they came, by the worker that they had best go to.

    Nothing here looks at all workers or all jobs: with thousands of both a result comes every millisecond.
    """

    def __init__(self) -> None:
        self._anyone: deque[Job] = deque()
        # Worker -> its own; never empty ones.
        self._own: dict[int, deque[Job]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def for_anyone(self) -> int:
        """Jobs that have no worker of their own."""
        return len(self._anyone)

    def put(self, job: Job, worker: int | None) -> None:
        """Add a job; ``worker``: the one that it had best go to, if it lives."""
        (self._anyone if worker is None else self._own.setdefault(worker, deque())).append(job)
        self._count += 1

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Jobs that were handed out and not begun: they are anyone's now, and the next."""
        back = list(jobs)
        self._anyone.extendleft(reversed(back))
        self._count += len(back)

    def own(self, worker: int) -> Job | None:
        """The next job that a worker does best."""
        jobs = self._own.get(worker)
        if not jobs:
            return None
        job = jobs.popleft()
        self._tidy(worker, jobs)
        return job

    def any(self) -> Job | None:
        """The next job that has no worker of its own."""
        if not self._anyone:
            return None
        self._count -= 1
        return self._anyone.popleft()

    def others(self) -> Job | None:
        """The last job of some other worker, for one that would have nothing to do."""
        for worker, jobs in self._own.items():
            job = jobs.pop()
            self._tidy(worker, jobs)
            return job
        return None

    def release(self, worker: int) -> None:
        """A worker is gone: its jobs are anyone's."""
        self._anyone.extend(self._own.pop(worker, ()))

    def clear(self) -> None:
        self._anyone.clear()
        self._own.clear()
        self._count = 0

    def _tidy(self, worker: int, jobs: deque[Job]) -> None:
        self._count -= 1
        if not jobs:
            del self._own[worker]
