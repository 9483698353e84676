"""``raylux evaluate``: estimators side by side, held against what training really does."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from raylux.cli import output
from raylux.cli.app import ConfigArgument, OverridesArgument, app, manual

if TYPE_CHECKING:
    from raylux.evaluation import Outcome


class Format(StrEnum):
    """How ``raylux evaluate`` prints."""

    table = "table"
    json = "json"
    csv = "csv"


@app.command(
    short_help="hold estimators against what training really does",
    help=manual("""Hold the estimators that CONFIG names under `evaluate` against what training really does.

    Each estimator is a run of its own over the whole corpus, or the texts' own words. Tests: lds (random subsets),
    removal (each query's top sequences left out), loo (one by one, cold and warm), pbrf (one by one, at the optimum
    that influence linearises), planted and mislabelled (a field of the corpus has the truth), prefilter (what a full
    scan finds that it would not keep). Models are trained by the recipe in CONFIG, each a task of one core;
    docs/evaluate.md says how to read what comes out.

    Reads the model, the corpus and the queries that CONFIG names; writes evaluate.folder alone. Kill it at any moment:
    the same command goes on, and other tests or estimators add what they need.

    \b
    Examples:
      raylux evaluate configs/evaluate-leads.yaml
      raylux evaluate my.yaml evaluate.tests='[lds, removal]' evaluate.seeds=5 engine.backend=local --format csv
    """),
)
def evaluate(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    form: Annotated[Format, typer.Option("--format", help="of what is printed")] = Format.table,
) -> None:
    """Print a table per figure, or all of it as csv or json."""
    from raylux.config import Config

    loaded = Config.load(config, overrides or [])
    from raylux.submission.paths import check_in_job, check_places_in_job

    check_in_job(loaded)
    if loaded.evaluate.folder is not None:
        check_places_in_job({"evaluate.folder": loaded.evaluate.folder})
    from raylux.evaluation import evaluate as work

    _print(work(loaded, quiet=False), form)


def _print(outcome: Outcome, form: Format) -> None:
    if form is Format.csv:
        sys.stdout.write(output.as_csv([outcome.frame()]))
    elif form is Format.json:
        sys.stdout.write(json.dumps(outcome.record(), indent=1, allow_nan=False) + "\n")
    else:
        from raylux.report import tables

        out = output.console()
        for verdict in outcome.verdicts:
            out.print(tables.evaluation_table(verdict, outcome.against))
        for name, text in outcome.notes.items():
            out.print(f"{name}: {text}", soft_wrap=True)
        out.print(f"page: {outcome.folder}/report/index.html", soft_wrap=True)
    sys.stdout.flush()
