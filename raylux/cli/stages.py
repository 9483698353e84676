"""The commands that compute: the whole run, and each of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import typer

from raylux.cli import output
from raylux.cli.app import ConfigArgument, OverridesArgument, app, manual
from raylux.cli.codes import EXIT_QUARANTINED


class Restart(StrEnum):
    """A stage that can be computed again."""

    corpus = "corpus"
    fit = "fit"
    prefilter = "prefilter"
    query = "query"
    score = "score"


RestartOption = Annotated[
    Restart | None,
    typer.Option(
        "--restart",
        metavar="STAGE",
        help="drop what the run folder holds of STAGE (corpus, fit, prefilter, query, score) and of all that rests "
        "on it, and compute it anew: after a change of weights, corpus or settings, or for damaged objects",
    ),
]


def _stage_command(name: str, stages: tuple[str, ...] | None, short: str, text: str) -> None:
    """Add a command that runs ``stages`` (None: all) of a config."""

    def command(config: ConfigArgument, overrides: OverridesArgument = None, restart: RestartOption = None) -> None:
        _run_stages(config, overrides or [], stages, restart)

    app.command(name, help=manual(text), short_help=short)(command)


_stage_command(
    "run",
    None,
    "run every stage, or go on with an interrupted run",
    """Run every stage of CONFIG: fit, prefilter, query, score, report.

    Reads the model, the corpus and the queries that CONFIG names; writes run.folder alone. What is committed
    there is not computed again: an interrupted run goes on where it stopped, and more queries or a larger
    prefilter compute only what is missing.

    \b
    Examples:
      raylux run configs/quickstart.yaml
      raylux run configs/quickstart.yaml prefilter.top=500 engine.backend=local""",
)
_stage_command(
    "fit",
    ("corpus", "fit"),
    "fit the curvature of the tracked layers",
    """Fit the curvature: covariances, their eigenbases and the eigenvalue correction of each tracked layer.

    Reads the model and fit.sequences sequences of the corpus; writes the tokenized corpus and the factors into
    the run folder. The factors serve every later query.

    \b
    Example:
      raylux fit configs/quickstart.yaml fit.sequences=1024""",
)
_stage_command(
    "prefilter",
    ("corpus", "prefilter"),
    "choose the candidates of each query",
    """Choose the candidates: the prefilter.top sequences that share the most telling tokens with each query.

    Reads the corpus and the queries; writes the candidates and their scores into the run folder. Needs no
    model weights and no factors.

    \b
    Example:
      raylux prefilter configs/quickstart.yaml prefilter.kind=bm25 prefilter.top=500""",
)
_stage_command(
    "query",
    ("query",),
    "precondition the queries",
    """Precondition the queries: (G+λI)⁻¹ times each query's gradient, for every tracked layer.

    Reads the model, the queries and the factors (raylux fit); writes the preconditioned queries into the run
    folder, dense or as low-rank factors within query.max_error.

    \b
    Example:
      raylux query configs/quickstart.yaml query.max_error=0.005""",
)
_stage_command(
    "score",
    ("score",),
    "score the candidates",
    """Score the candidates: all queries in one pass over the union of their candidates.

    Reads the model, the candidates (raylux prefilter) and the preconditioned queries (raylux query); writes the
    scores into the run folder, unit by unit.

    \b
    Example:
      raylux score configs/quickstart.yaml score.layers=true""",
)
_stage_command(
    "report",
    ("report",),
    "write the HTML page",
    """Write the report: one HTML page with the most influential sequences of each query.

    Reads the scores (raylux score); writes report/ in the run folder. The page needs nothing beside it.

    \b
    Example:
      raylux report configs/quickstart.yaml""",
)


def _run_stages(
    config_path: str, overrides: Sequence[str], stages: Sequence[str] | None, restart: Restart | None
) -> None:
    from raylux.config import Config

    config = Config.load(config_path, overrides)  # before anything heavy: a typing error answers at once
    from raylux import api
    from raylux.submission.paths import check_in_job

    check_in_job(config)
    again = restart.value if restart is not None else None
    run = api.run_stages(config, stages=stages, config_path=config_path, restart=again)
    output.print_status(run)
    if run.quarantined:
        output.say(output.quarantine_summary(run))
        raise typer.Exit(EXIT_QUARANTINED)
