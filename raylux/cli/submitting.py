"""The commands that send runs to a cluster as jobs: ``submit``, ``status``, ``stop``."""

from __future__ import annotations

import json
import os
import sys
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from raylux.cli import output
from raylux.cli.app import ConfigArgument, OverridesArgument, app, manual
from raylux.cli.codes import EXIT_INTERNAL
from raylux.shown import plain, redacted, visible

if TYPE_CHECKING:
    from raylux.engine.jobs import Job, JobServer
    from raylux.submission.flow import Batch


class Command(StrEnum):
    """What a job may be: the whole run, a stage, or the answering of query files."""

    run = "run"
    fit = "fit"
    prefilter = "prefilter"
    query = "query"
    score = "score"
    report = "report"
    batch = "batch"


AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        metavar="URL",
        help="of the cluster's dashboard, as in http://HOST:8265; default: RAY_ADDRESS where it is such a URL, else "
        "http://127.0.0.1:8265",
    ),
]
_AUTH = """The token of a cluster that asks for one comes from the environment: RAY_AUTH_MODE=token and
    RAY_AUTH_TOKEN_PATH=FILE (or RAY_AUTH_TOKEN)."""
# A stopped job has 3 s to end by itself (RAY_JOB_STOP_WAIT_TIME_S of the cluster), then it is killed.
_STOP = 60.0


@app.command(
    short_help="send a run to a cluster as a job, and follow it",
    help=manual(f"""Send the run of CONFIG to a Ray cluster as a job, and follow it to its own exit code.

    First checked here: address, token, Ray's version, the config's places, and CPUs, GPUs and memory against what the
    cluster has. Then the working directory is sent, less weights, corpora and what .rayignore and .gitignore name.
    Needs raylux's dependencies on the cluster's machines (cluster/Dockerfile), and as run.folder an absolute path
    that all of them reach, or a URL.

    The job's id is made of the run folder and the attempt. The same command again follows an attempt that is under
    way, and goes on with a run whose last attempt failed or was stopped. Ctrl-C ends the following, not the job.

    {_AUTH}

    \b
    Examples:
      raylux submit configs/quickstart.yaml run.folder=/shared/runs/quickstart --address http://127.0.0.1:8265
      raylux submit my.yaml --command fit --no-wait
      raylux submit my.yaml --command batch --queries s3://bucket/inbox --watch --idle 3600
    """),
)
def submit(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    address: AddressOption = None,
    command: Annotated[Command, typer.Option("--command", help="the whole run, one stage, or batch")] = Command.run,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="follow the job to its end")] = True,
    working_dir: Annotated[
        str, typer.Option("--working-dir", metavar="FOLDER", help="sent with the job; holds CONFIG and its queries")
    ] = ".",
    submission_id: Annotated[
        str | None, typer.Option("--submission-id", metavar="ID", help="an id of your own; default: by run and attempt")
    ] = None,
    grow: Annotated[
        bool,
        typer.Option(
            "--grow", help="the cluster autoscales: ask it for engine.workers, and wait for them instead of refusing"
        ),
    ] = False,
    queries: Annotated[
        str | None, typer.Option("--queries", metavar="FOLDER", help="of --command batch: where query files arrive")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch/--once", help="of --command batch: go on and look for more")] = False,
    idle: Annotated[
        float | None, typer.Option("--idle", min=0.0, help="of --command batch: seconds after which a watch ends")
    ] = None,
) -> None:
    """Submit a job, follow it, and leave with its exit code."""
    from raylux.submission import flow

    order = flow.Order(
        config, tuple(overrides or ()), command.value, _address(address), working_dir, submission_id, grow,
        _batch(command, queries, watch, idle),
    )  # fmt: skip
    server, name = flow.submit(order, output.say)
    if wait:
        raise typer.Exit(_follow(server, name))
    output.say(f"raylux status {name} says how it stands; raylux stop {name} ends it")


@app.command(
    short_help="say how the jobs of a cluster stand",
    help=manual(f"""How the jobs stand that `raylux submit` sent to a cluster: all, or the one of TARGET.

    TARGET is a submission id, or a config file: then the last attempt at its run. Reads the cluster's job server alone.

    {_AUTH}

    \b
    Examples:
      raylux status
      raylux status my.yaml --json
    """),
)
def status(
    target: Annotated[str | None, typer.Argument(metavar="[TARGET]", help="submission id or config file")] = None,
    overrides: OverridesArgument = None,
    address: AddressOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="print a list of records")] = False,
) -> None:
    """Print the jobs of a cluster."""
    from raylux.submission import flow

    server = flow.connect(_address(address))
    jobs = [flow.find(server, target, overrides or [])] if target is not None else flow.ours(server)
    if as_json:
        sys.stdout.write(json.dumps([_record(job) for job in jobs], indent=1) + "\n")
        sys.stdout.flush()
    elif jobs:
        output.console().print(_table(jobs))
    else:
        output.say(f"{server.url}: no job of raylux")


@app.command(
    short_help="end a job",
    help=manual(f"""End the job of TARGET: a submission id, or a config file for the last attempt at its run.

    What is committed stays: the same `raylux submit` goes on with it. Needs a minute at most.

    {_AUTH}

    \b
    Example:
      raylux stop my.yaml
    """),
)
def stop(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="submission id or config file")],
    overrides: OverridesArgument = None,
    address: AddressOption = None,
) -> None:
    """Stop a job and wait for its end."""
    from raylux.submission import flow

    server = flow.connect(_address(address))
    job = flow.find(server, target, overrides or [])
    if job.over or not server.stop(job.id):
        output.say(f"{job.id} had ended already: it {flow.ending(server.job(job.id))}")
        return
    job = server.wait(job.id, _STOP)
    output.say(f"{job.id} {flow.ending(job)}")
    if not job.over:
        raise typer.Exit(EXIT_INTERNAL)


def _batch(command: Command, queries: str | None, watch: bool, idle: float | None) -> Batch | None:
    from raylux.errors import UserError
    from raylux.submission.flow import Batch

    if command is not Command.batch:
        if queries is not None or watch or idle is not None:
            raise UserError("--queries, --watch and --idle are those of --command batch; add it, or leave them out")
        return None
    if queries is None:
        raise UserError("--command batch needs --queries FOLDER, where query files arrive")
    options = ["--watch"] if watch else []
    return Batch(queries, (*options, *(["--idle", f"{idle:g}"] if idle is not None else [])))


def _address(given: str | None) -> str:
    from raylux.engine.dashboard import DEFAULT

    named = os.environ.get("RAY_ADDRESS", "")
    return given or (named if named.startswith(("http://", "https://")) else DEFAULT)


def _follow(server: JobServer, name: str) -> int:
    from raylux.submission import flow

    try:
        job = server.follow(name, _write)
    except KeyboardInterrupt:
        output.say(f"{name} goes on without you; raylux stop {name} ends it")
        raise
    code = flow.exit_code(job)
    # A command that failed has said why on its log; where there was none, Ray knows.
    why = f": {plain(redacted(job.message), 300)}" if code and job.exit_code is None and job.message else ""
    output.say(f"{name} {flow.ending(job)}{why}")
    return code


def _write(text: str) -> None:
    """Pass on a job's log: it steers no terminal and tells no secret."""
    sys.stdout.write(visible(redacted(text), kept="\n\t"))
    sys.stdout.flush()


def _record(job: Job) -> dict[str, object]:
    return {
        "id": job.id,
        "status": job.status,
        "run": job.metadata.get("raylux_run"),
        "command": job.metadata.get("raylux_command"),
        "exit_code": job.exit_code,
        "started": job.started,
        "ended": job.ended,
        "message": job.message,
    }


def _table(jobs: list[Job]) -> object:
    from rich.table import Table

    from raylux.submission.flow import COMMAND, RUN

    table = Table(box=None, pad_edge=False)
    for name in ("job", "command", "status", "exit", "started", "took", "run folder"):
        table.add_column(name, overflow="fold")
    for job in jobs:
        began = time.strftime("%m-%d %H:%M:%S", time.localtime(job.started)) if job.started else ""
        took = f"{(job.ended or time.time()) - job.started:.0f} s" if job.started else ""
        code = "" if job.exit_code is None else str(job.exit_code)
        row = (job.id, job.metadata.get(COMMAND, ""), job.status, code, began, took, job.metadata.get(RUN, ""))
        table.add_row(*(plain(redacted(cell)) for cell in row))
    return table
