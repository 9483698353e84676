"""The seam between the stages and where their work runs: jobs, results, and what a backend has to offer.

The same stage code runs in process and on Ray. Parts of a result come as *handles*: on Ray references to
objects that the driver never holds, in process the objects themselves.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(eq=False)
class Job:
    """One call of a gradient worker's method.

    Attributes:
        name: the unit's, for people and for the quarantine.
        args: of the method.
        item: whatever the stage wants back with the result.
        near: the worker that had best do it (``Result.worker``), if it still lives: it keeps what the job needs.
    """

    name: str
    args: tuple[Any, ...]
    item: Any = None
    near: int | None = None


@dataclass(frozen=True)
class Failure:
    """Why a job was given up: how often its worker died of it, and the last reason."""

    deaths: int
    reason: str


@dataclass(frozen=True)
class Result:
    """A finished job.

    Attributes:
        job: what was asked.
        value: what the method returned; its head, where it returns parts.
        parts: one handle per shard, where the method returns parts.
        numerics: what the bits of the value depend on beside the inputs (hardware, threads, torch).
        failure: set where the job was given up; there is no value then.
        worker: who did it, a number of its own for each process.
    """

    job: Job
    value: Any = None
    parts: Sequence[Any] = ()
    numerics: Mapping[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    worker: int = 0


@dataclass(frozen=True)
class Lost:
    """In place of a shard's answer: the shard died and began anew with nothing, or an argument is gone.

    Attributes:
        shard: True where the shard lost its state; False where only the argument was lost.
        reason: one line.
        node: True where its node went away with it: no fault of what it did.
    """

    shard: bool
    reason: str
    node: bool = False


class ShardLostError(Exception):
    """A factor shard died in a step that needs the state of all of them; do the step again from its start."""


class Work(Protocol):
    """A stretch of jobs that call one method."""

    @property
    def room(self) -> bool:
        """Whether another job would soon find a worker."""
        ...

    @property
    def pending(self) -> int:
        """Jobs submitted and not yet returned."""
        ...

    @property
    def losses(self) -> int:
        """How often a worker was seen to go with its node, so with what it had made."""
        ...

    def submit(self, job: Job) -> None: ...

    def next(self) -> Result | None:
        """Wait for a job to finish, in whatever order; None: there is room for another before one has."""
        ...


class Backend(Protocol):
    """What a stage may ask for."""

    @property
    def workers(self) -> int:
        """Gradient workers, at work or on their way."""
        ...

    @property
    def shards(self) -> int: ...

    def open(self, method: str, parts: bool = False) -> AbstractContextManager[Work]:
        """Work through jobs of a ``GradientWorker``'s method; ``parts``: it returns a head and one part per shard."""
        ...

    def share(self, value: Any) -> Any:
        """A handle for an argument that many calls carry."""
        ...

    def gone(self, handles: Sequence[Any]) -> list[bool]:
        """Which parts of results went away with the nodes on which they rest, as far as is known; takes no time."""
        ...

    def ask(self, method: str, args: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call a method of some shards at once, shard -> arguments (handles allowed); shard -> answer or ``Lost``."""
        ...

    def shard_stream(self, method: str, jobs: Iterable[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Call a method that needs no state once per job, on any shard: yields (job, answer) as they finish."""
        ...

    def tasks(self, function: Any, jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Run a plain function over jobs, results in the order of the jobs."""
        ...

    def close(self) -> None:
        """Give back what was started."""
        ...


def results(
    backend: Backend, method: str, jobs: Iterable[Job], parts: bool = False, ordered: bool = False
) -> Generator[Result, None, None]:
    """Run jobs, taken a bounded window ahead, and yield their results.

    Args:
        backend: where.
        method: of ``GradientWorker``.
        jobs: lazily consumed.
        parts: as ``Backend.open``.
        ordered: yield in the order of the jobs, otherwise as they finish.
    """
    queue = iter(jobs)
    done: dict[int, Result] = {}
    places: dict[Job, int] = {}
    count, due, more = 0, 0, True
    with backend.open(method, parts) as work:
        while True:
            while more and work.room and work.pending + len(done) < 4 * backend.workers:
                job = next(queue, None)
                if job is None:
                    more = False
                    break
                if ordered:
                    places[job] = count
                    count += 1
                work.submit(job)
            if not work.pending:
                return
            result = work.next()
            if result is None:
                continue
            if not ordered:
                yield result
                continue
            done[places.pop(result.job)] = result
            while due in done:
                yield done.pop(due)
                due += 1


def every_shard(backend: Backend, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call a method of every shard, shard s with ``args[s]``.

    Raises:
        ShardLostError: one of them died.
    """
    answers = backend.ask(method, dict(enumerate(args)))
    for shard, answer in answers.items():
        if isinstance(answer, Lost):
            raise ShardLostError(f"{method} of factor shard {shard}: {answer.reason}")
    return [answers[shard] for shard in range(len(args))]


def one_shard(backend: Backend, shard: int, method: str, args: tuple[Any, ...]) -> Any:
    """Call a method of one shard.

    Raises:
        ShardLostError: it died.
    """
    answer = backend.ask(method, {shard: args})[shard]
    if isinstance(answer, Lost):
        raise ShardLostError(f"{method} of factor shard {shard}: {answer.reason}")
    return answer


def ids_at(ids: Sequence[str], rows: Iterable[int]) -> list[str]:
    """Sequence ids of corpus rows."""
    return [ids[int(row)] for row in rows]
