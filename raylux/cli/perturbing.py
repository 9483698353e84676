"""``raylux perturb``: which inputs of a training sequence a score hangs on."""

from __future__ import annotations

from typing import Annotated

import typer

from raylux.cli import output
from raylux.cli.app import OverridesArgument, RunArgument, app, manual


@app.command(
    short_help="how a score moves with the inputs of a training sequence",
    help=manual("""The gradient of scores of RUN by the inputs of training sequences (I_pert, Koh & Liang 2017).

    Of a text, for each token: the norm of the gradient by its word embedding, and its projection on the embedding, what
    scaling the embedding up would do. Of features, for each: the derivative of the score. Printed largest first.

    Reads the model and RUN (its factors and the solved query); writes nothing, and computes in this process.

    \b
    Examples:
      raylux perturb runs/quickstart --query paris
      raylux perturb runs/quickstart --query paris --sequence 17 --sequence 4:2 -k 5
    """),
)
def perturb(
    run: RunArgument,
    query: Annotated[str, typer.Option("--query", "-q", metavar="ID", help="a query's id")],
    overrides: OverridesArgument = None,
    sequence: Annotated[
        list[str] | None, typer.Option("--sequence", help="id of a sequence, may be repeated; default: the best five")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="inputs to show of each sequence")] = 10,
) -> None:
    """Print tables of ``raylux.perturb``."""
    from raylux.api import open_run
    from raylux.perturbing import perturb as work
    from raylux.report import tables
    from raylux.submission.paths import check_places_in_job

    check_places_in_job({"RUN": run})
    opened = open_run(run)
    asked = output.known(query, opened.queries, opened.folder)
    for found in work(opened, asked, sequence, overrides or [], quiet=False):
        title = f"{asked}, {found.sequence}: influence {tables.number(found.influence)} {opened.unit}, by its inputs"
        output.console().print(tables.perturbation_table(found.table, k, title))
