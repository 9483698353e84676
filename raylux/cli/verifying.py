"""``raylux calibrate`` and ``raylux verify``: how far the sizes of a run's scores can be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from raylux.cli import output
from raylux.cli.app import OverridesArgument, RunArgument, app, manual

if TYPE_CHECKING:
    from raylux.api import Run

SeedOption = Annotated[int, typer.Option("--seed", min=0, help="of what is drawn at random")]
ProductsOption = Annotated[
    int, typer.Option("--products", min=0, help="products with the Gauss-Newton matrix per better solve; 0: none")
]


@app.command(
    short_help="compare the size of a run's scores with better solves",
    help=manual("""By how much the scores of RUN are too large, told by better solves of some of its queries.

    Each query is solved again by preconditioned conjugate gradients with the exact Gauss-Newton matrix of the fitted
    sequences; the slope of its scores on those of RUN, over the best sequences of the queries and others drawn at
    random, is the number to multiply a score by. Stands in RUN from then on: raylux top, inspect and report show it.

    Reads the model and RUN (factors and scores); writes RUN alone, a unit per query. Kill it at any moment: the same
    command goes on.

    \b
    Examples:
      raylux calibrate runs/quickstart
      raylux calibrate runs/quickstart --queries 16 --products 20 engine.workers=4
    """),
)
def calibrate(
    run: RunArgument,
    overrides: OverridesArgument = None,
    queries: Annotated[int, typer.Option("--queries", min=1, help="queries to solve again")] = 8,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="scored sequences to compare on")] = 128,
    products: Annotated[
        int, typer.Option("--products", min=1, help="products with the Gauss-Newton matrix per query, at most")
    ] = 10,
    seed: SeedOption = 0,
) -> None:
    """Print ``Run.calibration``."""
    from raylux.report import tables
    from raylux.submission.paths import check_places_in_job
    from raylux.verification import CalibrationOptions
    from raylux.verification import calibrate as work

    check_places_in_job({"RUN": run})
    opened = work(run, CalibrationOptions(queries, pairs, products, seed), overrides or [], quiet=False)
    assert opened.calibration is not None
    output.console().print(tables.calibration_table(opened.calibration))
    output.print_calibration(opened)


@app.command(
    short_help="measure what a run's scores predict",
    help=manual("""Measure what the scores of RUN predict: the top sequences of some queries, and others at random.

    For each sequence the proximal optimum of the tracked weights is searched in float64, with RUN's damping and number
    of training sequences, for small doses more and less of it and for a whole copy; the change of every query's
    measurement stands beside what was predicted, with an interval. Says so, instead of a number, where a dose is below
    what the search can resolve. RUN/report/verify.csv has all of it.

    Reads the model and RUN (factors and scores); writes RUN alone, a unit per sequence, over the workers. Kill it at
    any moment: the same command goes on. A search takes some tens of passes over the fitted sequences (--sequences):
    meant for small models, or few sequences.

    \b
    Examples:
      raylux verify runs/quickstart --queries 2 --top 3 --random 4
      raylux verify runs/quickstart --dose 0.05 --products 0 engine.workers=4
    """),
)
def verify(
    run: RunArgument,
    overrides: OverridesArgument = None,
    queries: Annotated[int, typer.Option("--queries", min=1, help="of the run, the first so many")] = 4,
    top: Annotated[int, typer.Option("--top", min=0, help="best sequences of each query")] = 5,
    random: Annotated[int, typer.Option("--random", min=0, help="further sequences, drawn at random")] = 8,
    dose: Annotated[float, typer.Option("--dose", help="copies that are added and taken away")] = 0.1,
    factor: Annotated[float, typer.Option("--factor", help="by which a second pair of doses is larger")] = 3.0,
    whole: Annotated[bool, typer.Option("--whole/--no-whole", help="also a whole copy")] = True,
    products: ProductsOption = 10,
    sequences: Annotated[
        int | None, typer.Option("--sequences", min=1, help="of the fit, that stand for the training set; default: all")
    ] = None,
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="of a search, at most")] = 100,
    seed: SeedOption = 0,
) -> None:
    """Print ``Run.verification`` and how measured changes follow each kind of prediction."""
    from raylux.submission.paths import check_places_in_job
    from raylux.verification import VerifyOptions
    from raylux.verification import verify as work

    check_places_in_job({"RUN": run})
    options = VerifyOptions(
        queries, top, random, dose, factor, whole, products, sequences, iterations, seed
    )  # fmt: skip
    _print(work(run, options, overrides or [], quiet=False))


def _print(run: Run) -> None:
    from raylux.report import tables

    frame, out = run.verification(), output.console()
    out.print(tables.verification_table(frame))
    out.print(tables.agreement_table(run.agreements()))
    output.print_calibration(run)
