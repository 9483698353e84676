"""``raylux watch``: a run from another terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from raylux.cli import output
from raylux.cli.app import RunArgument, app, manual

if TYPE_CHECKING:
    from rich.table import Table

    from raylux.results import Run


@app.command(
    short_help="watch a run from another terminal",
    help=manual("""How far RUN is: each stage with what is done, the pace and an estimate; workers and deaths.

    Reads what the driver writes into the run folder (progress.jsonl), so it needs no cluster and also tells of a run
    whose cluster is gone. Goes on until no driver holds the run folder; Ctrl-C ends the watching, not the run.
    A run folder at a URL keeps no progress.jsonl: what is committed there is shown once, as by `raylux inspect`.

    \b
    Examples:
      raylux watch runs/quickstart
      raylux watch runs/quickstart --once
    """),
)
def watch(
    run: RunArgument,
    once: Annotated[bool, typer.Option("--once", help="print how it stands, and end")] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, help="seconds between two looks")] = 2.0,
) -> None:
    """Print ``Run.watched`` until the driver has ended."""
    from raylux import opening

    opened = opening.open_run(run)
    if opened.watched() is None:
        output.print_status(opened)
        return
    out = output.console()
    if once or not out.is_terminal:
        _lines(opened, once, every)
        output.print_next(opened)
        return
    from rich.live import Live

    with Live(_table(opened), console=out, auto_refresh=False) as live:
        while opened.driver() is not None:
            time.sleep(every)
            live.update(_table(opened), refresh=True)
    output.print_next(opened)


def _table(run: Run) -> Table:
    from raylux.report import tables

    seen = run.watched()
    assert seen is not None
    return tables.watch_table(seen, run.driver(), time.time())


def _lines(run: Run, once: bool, every: float) -> None:
    """The table once; then, where the output is no terminal, a line whenever something has moved."""
    from raylux.report import tables

    out = output.console()
    out.print(_table(run))
    told = ""
    while not once and run.driver() is not None:
        seen = run.watched()
        line = tables.watch_line(seen) if seen else ""
        if line and line != told:
            out.print(line, soft_wrap=True)
            told = line
        time.sleep(every)
