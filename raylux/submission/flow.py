"""Submitting a run, or going on with it, and following it to its end."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from raylux.config import Config
from raylux.engine.dashboard import Dashboard, reach
from raylux.errors import UserError
from raylux.shown import redacted
from raylux.submission import names, paths, supply

if TYPE_CHECKING:
    from raylux.engine.jobs import Job, JobServer

# Metadata of a job.
RUN, COMMAND, ATTEMPT = "raylux_run", "raylux_command", "raylux_attempt"
# What a shell says of a job that was stopped from outside, as of a command that got Ctrl-C.
_STOPPED = 130
_ENV = {"PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Batch:
    """The inbox of a ``raylux batch``, and its options as they stand on the command line."""

    queries: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Order:
    """What is to be submitted.

    Attributes:
        config_path, overrides: of the run, as on the command line.
        command: of ``raylux``: run, or one stage.
        address: of the dashboard.
        working_dir: is sent with the job.
        name: a submission id of the user's own; None: by run and attempt.
        batch: of the command batch, where query files arrive, and how they are answered.
        grows: the cluster starts nodes for what is asked of it, so that what it has now is no bound.
    """

    config_path: str
    overrides: tuple[str, ...]
    command: str
    address: str
    working_dir: str = "."
    name: str | None = None
    grows: bool = False
    batch: Batch | None = None


def submit(order: Order, say: Callable[[str], None]) -> tuple[JobServer, str]:
    """Submit a run; where an attempt at it is under way already, nothing is sent.

    Args:
        order: what and where.
        say: told in a line what is done.

    Returns:
        The job server, and the submission id of the attempt that is under way now.

    Raises:
        UserError: the run cannot work there, or the server does not take it.
    """
    config = Config.load(order.config_path, order.overrides)
    folder = Path(order.working_dir).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"--working-dir {order.working_dir}: no such folder")
    if order.batch is None:
        paths.check(config, folder)
    else:  # model, corpus and config are those of the fitted run
        paths.check_folder(config)
        paths.check_inbox(order.batch.queries)
    entrypoint = _entrypoint(order, config, folder)
    dashboard = reach(order.address)
    if not order.grows:
        supply.check(config, order.config_path, order.overrides, dashboard.nodes(), say)
    server = _server(dashboard)
    attempt, name = 0, order.name
    if name is None:
        last = latest(server, config.run.folder)
        if last is not None and not last.over:
            return server, _under_way(last, entrypoint, say)
        attempt = names.next_attempt([last.id] if last is not None else [], config.run.folder)
        name = names.submission_id(config.run.folder, attempt)
        if last is not None:
            say(f"attempt {attempt - 1} {ending(last)}; attempt {attempt} goes on where it stopped")
    _send(server, name, entrypoint, folder, config, order, attempt)
    say(f"submitted {name} to {server.url}: {entrypoint}")
    return server, name


def connect(address: str) -> JobServer:
    """The job server at a dashboard's address. Raises UserError."""
    return _server(reach(address))


def latest(server: JobServer, folder: str) -> Job | None:
    """The last attempt at a run folder."""
    attempts = [job for job in server.jobs() if names.attempt_of(job.id, folder)]
    return max(attempts, key=lambda job: names.attempt_of(job.id, folder), default=None)


def find(server: JobServer, target: str, overrides: Sequence[str] = ()) -> Job:
    """The job that a submission id names, or the last attempt at the run of a config file.

    Raises:
        UserError: there is none.
    """
    if not Path(target).is_file():
        return server.job(target)
    folder = Config.load(target, overrides).run.folder
    found = latest(server, folder)
    if found is None:
        raise UserError(f"{target}: no job of {server.url} works on run.folder {folder}")
    return found


def ours(server: JobServer) -> list[Job]:
    """The jobs that ``raylux submit`` sent, the oldest first."""
    return [job for job in server.jobs() if RUN in job.metadata]


def ending(job: Job) -> str:
    """How a job stands, in some words."""
    if job.exit_code is not None and job.status == "FAILED":
        return f"failed with exit code {job.exit_code}"
    return {"SUCCEEDED": "is done", "FAILED": "failed", "STOPPED": "was stopped"}.get(job.status, job.status.lower())


def exit_code(job: Job) -> int:
    """The job's own exit code; 130 for one that was stopped, 1 for one that never ran, 128 + N for signal N."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return _STOPPED
    code = job.exit_code
    if not code:
        return 1
    return code if code > 0 else 128 - code


def _server(dashboard: Dashboard) -> JobServer:
    # Imports Ray, which takes a second: only once the dashboard has answered.
    from raylux.engine.jobs import JobServer

    return JobServer(dashboard)


def _entrypoint(order: Order, config: Config, folder: Path) -> str:
    words = ["python", "-m", "raylux.cli", order.command]
    if order.batch is None:
        words += [paths.carried(order.config_path, folder), *order.overrides]
    else:
        others = [text for text in order.overrides if text.partition("=")[0].strip() != "run.folder"]
        words += [config.run.folder, "--queries", order.batch.queries, *order.batch.options, *others]
    line = shlex.join(words)
    if redacted(line) != line:
        raise UserError(
            "an override holds a secret, and a job's command is shown on the dashboard; "
            "put it into the environment of the cluster"
        )
    return line


def _under_way(job: Job, entrypoint: str, say: Callable[[str], None]) -> str:
    if job.entrypoint != entrypoint:
        raise UserError(
            f"{job.id} works on this run folder now, with another command ({job.entrypoint}); wait for it, "
            f"or `raylux stop {job.id}`"
        )
    say(f"{job.id} is {job.status.lower()} already; following it")
    return job.id


def _send(
    server: JobServer, name: str, entrypoint: str, folder: Path, config: Config, order: Order, attempt: int
) -> None:
    from raylux.engine.jobs import InUseError

    facts = {RUN: redacted(config.run.folder), COMMAND: order.command, ATTEMPT: str(attempt)}
    env = {**_ENV, **({"RAYLUX_GROW": "1"} if order.grows else {})}
    facts["raylux_version"] = version("raylux")
    try:
        server.submit(name, entrypoint, str(folder), paths.EXCLUDES, env, facts)
    except InUseError as error:
        what = (
            "choose another --submission-id, or leave it out"
            if order.name
            else "somebody submits the same run at this moment; the same command again follows it"
        )
        raise UserError(f"{error}; {what}") from None
