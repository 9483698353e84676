"""Ray's job server: submit, look, follow, stop.

``JobServer`` keeps what ``ray.job_submission`` may do with an address to itself: its client prefers RAY_ADDRESS to
the address that it is given, and says what went wrong in several lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import requests

from raylux.engine.dashboard import Dashboard
from raylux.errors import RayluxError, UserError
from raylux.sources import one_line

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import aiohttp
from ray.job_submission import JobSubmissionClient

PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED = "PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"
_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
# Seconds between two looks; until an end that was told is known; without a word on a connection.
_POLL, _SETTLES, _SILENCE = 1.0, 10.0, 120.0
# Connections in a row that brought nothing: half a minute.
_TRIES = 5


@dataclass(frozen=True)
class Job:
    """A submitted job.

    Attributes:
        id: its submission id.
        status: one of the words above.
        entrypoint: the command that it runs.
        message: what Ray says of it.
        metadata: what it was submitted with.
        started: seconds since 1970; None where it has not.
        ended: likewise.
        exit_code: of the entrypoint; None where it did not get that far.
    """

    id: str
    status: str
    entrypoint: str
    message: str
    metadata: Mapping[str, str]
    started: float | None
    ended: float | None
    exit_code: int | None

    @property
    def over(self) -> bool:
        return self.status in (STOPPED, SUCCEEDED, FAILED)


class _Log:
    """A log that begins anew with each connection: passes on what lies behind the first ``skip`` characters."""

    def __init__(self, write: Callable[[str], None], skip: int) -> None:
        self._write, self._skip = write, skip
        self.passed = 0
        self.silent = False

    def take(self, chunk: str) -> None:
        fresh = chunk[max(0, self._skip - self.passed) :]
        self.passed += len(chunk)
        if fresh:
            self._write(fresh)


class InUseError(UserError):
    """A submission id that a job of the cluster has already."""


class JobServer:
    """The job server of a dashboard. Every method raises UserError where the server does not do its part."""

    def __init__(self, dashboard: Dashboard) -> None:
        self.url = dashboard.url
        # Ray tells of each package that it uploads.
        logging.getLogger("ray").setLevel(logging.ERROR)
        for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with _without(_ADDRESSES), self._plainly():
            self._client = JobSubmissionClient(dashboard.url, headers=dict(dashboard.headers))

    def jobs(self) -> list[Job]:
        """All submitted jobs that the cluster remembers, the oldest first."""
        with self._plainly():
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started or 0.0)

    def job(self, name: str) -> Job:
        with self._plainly(name):
            return _job(self._client.get_job_info(name))

    def submit(
        self,
        name: str,
        entrypoint: str,
        working_dir: str,
        excludes: Sequence[str],
        env: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> None:
        """Pack a folder, send it, and have a command run in it.

        Args:
            name: the submission id.
            entrypoint: a shell's command.
            working_dir: what is packed, less what its .rayignore and .gitignore leave out.
            excludes: left out too, as .gitignore says it.
            env: variables of the job's processes; anybody who may look at the dashboard can read them.
            metadata: kept with the job.

        Raises:
            InUseError: the id is taken.
        """
        environment = {"working_dir": working_dir, "excludes": list(excludes), "env_vars": dict(env)}
        with self._plainly(name):
            self._client.submit_job(
                entrypoint=entrypoint, submission_id=name, runtime_env=environment, metadata=dict(metadata)
            )

    def stop(self, name: str) -> bool:
        """Ask a job to end; False where it had ended already."""
        with self._plainly(name):
            return bool(self._client.stop_job(name))

    def wait(self, name: str, seconds: float = float("inf")) -> Job:
        """Wait for a job's end, at most so long; the job as it is then."""
        until = time.monotonic() + seconds
        while not (job := self.job(name)).over and time.monotonic() < until:
            time.sleep(_POLL)
        return job

    def follow(self, name: str, write: Callable[[str], None]) -> Job:
        """Pass on what a job writes, from its beginning, until it ends; the ended job.

        A connection that breaks or falls silent is made again, and nothing is passed on twice.

        Raises:
            RayluxError: the job server does not answer any more; the job may go on.
        """
        seen, failures = 0, 0
        while True:
            log = _Log(write, skip=seen)
            problem = ""
            try:
                asyncio.run(self._tail(name, log))
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                problem = one_line(error)
            failures = 0 if log.passed > seen else failures + 1
            seen = max(seen, log.passed)
            try:
                # An end that was told is known to the server in a moment; a silent job may go on for long.
                job = self.wait(name, 0.0 if problem or log.silent else _SETTLES)
            except UserError as error:
                problem = str(error)
            else:
                if job.over:
                    self._rest(name, seen, write)
                    return job
                if log.silent:
                    failures = 0
            if failures >= _TRIES:
                why = f" ({problem})" if problem else ""
                raise RayluxError(f"{self.url}: lost sight of {name}{why}; `raylux status {name}` looks again")
            time.sleep(_POLL * min(2**failures, 8))

    def _rest(self, name: str, seen: int, write: Callable[[str], None]) -> None:
        """What was written between the last look and the end."""
        with contextlib.suppress(UserError), self._plainly(name):
            write(self._client.get_job_logs(name)[seen:])

    async def _tail(self, name: str, log: _Log) -> None:
        chunks = self._client.tail_job_logs(name)
        while True:
            try:
                # A connection that was dropped on the way is as silent as a job that has nothing to say.
                chunk = await asyncio.wait_for(anext(chunks), _SILENCE)
            except StopAsyncIteration:
                return
            except TimeoutError:
                log.silent = True
                return
            log.take(chunk)

    @contextmanager
    def _plainly(self, name: str = "") -> Iterator[None]:
        """What Ray's client raises, as one line."""
        try:
            yield
        except (RuntimeError, ValueError, OSError, requests.RequestException) as error:
            text = " ".join(str(error).split())
            if name and "already" in text and name in text:
                raise InUseError(f"{self.url}: the submission id {name} is in use") from None
            if name and "404" in text:
                raise UserError(f"{self.url}: no job {name}; `raylux status` lists the jobs") from None
            raise UserError(f"{self.url}: {one_line(error)}") from None


def _job(details: Any) -> Job:
    def seconds(milliseconds: int | None) -> float | None:
        return milliseconds / 1000 if milliseconds else None

    return Job(
        str(details.submission_id),
        str(getattr(details.status, "value", details.status)),
        details.entrypoint or "",
        details.message or "",
        details.metadata or {},
        seconds(details.start_time),
        seconds(details.end_time),
        details.driver_exit_code,
    )


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """The environment without some variables, for a moment."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
