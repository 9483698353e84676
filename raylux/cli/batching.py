"""``raylux batch``: query files that keep arriving, answered from one fitted run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from raylux.cli import output
from raylux.cli.app import OverridesArgument, RunArgument, app, manual
from raylux.cli.codes import EXIT_QUARANTINED, EXIT_USER

if TYPE_CHECKING:
    from raylux.api import Run
    from raylux.batch import Outcome


@app.command(
    short_help="answer query files that keep arriving, from one fitted run",
    help=manual("""Answer the query files of a folder or prefix from the fitted run folder RUN, each file once.

    Files that wait are answered together in one pass over the corpus; each answer has the bits of a `raylux run` on
    that file alone. Its queries are called FILE/ID in RUN (raylux top RUN --query FILE/ID); answers/FILE.parquet has
    the best sequences of each, report/across-*.csv and report/index.html what queries have in common.

    A file is read once and left where it is. One that cannot be read, or that changes after it was taken, is put
    aside: it is named with the reason, the others go on, and the command ends with 2.

    Reads RUN's model, corpus and factors (raylux fit) and FOLDER; writes RUN alone. Kill it at any moment: the same
    command goes on.

    \b
    Examples:
      raylux batch runs/quickstart --queries inbox/
      raylux batch runs/quickstart --queries s3://bucket/inbox --watch --idle 3600 engine.workers=8
    """),
)
def batch(
    run: RunArgument,
    queries: Annotated[
        str, typer.Option("--queries", metavar="FOLDER", help="where query files arrive: folder or fsspec URL")
    ],
    overrides: OverridesArgument = None,
    watch: Annotated[
        bool, typer.Option("--watch/--once", help="go on and look for more, or end when all that is there is answered")
    ] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, help="seconds between two looks")] = 5.0,
    idle: Annotated[
        float | None, typer.Option("--idle", min=0.0, help="seconds without a new file after which a watch ends")
    ] = None,
    together: Annotated[
        int, typer.Option("--together", min=1, max=10**6, help="queries in one pass, at most, where memory allows")
    ] = 64,
) -> None:
    """Print what was answered, what was put aside, and what queries have in common."""
    from raylux.submission.paths import check_places_in_job

    check_places_in_job({"RUN": run, "--queries": queries})
    from raylux.batch import Options, answer_files

    options = Options(watch, every, idle, together)
    opened, outcome = answer_files(run, queries, overrides or [], options)
    _print(opened, outcome)
    if outcome.aside:
        raise typer.Exit(EXIT_USER)
    if any(answer.meta["lost"] for answer in opened.answers):
        output.say(output.quarantine_summary(opened))
        raise typer.Exit(EXIT_QUARANTINED)


def _print(run: Run, outcome: Outcome) -> None:
    from raylux.report import tables

    out = output.console()
    queries = sum(len(answer.meta["ids"]) for answer in run.answers)
    out.print(
        f"answered now: {len(outcome.answered):,} files in {outcome.passes:,} passes; "
        f"in all {len(run.answers):,} files, {queries:,} queries",
        soft_wrap=True,
    )
    if queries:
        found = run.across()
        out.print(tables.across_table(found))
        out.print(tables.cluster_table(found))
    for name, reason in outcome.aside.items():
        output.say(f"put aside: {name}: {reason}")
