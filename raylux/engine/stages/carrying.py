"""Whether a run can take its queries from those of the segment or stage of training after it, and what it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from raylux.config import Config
from raylux.curvature import KINDS
from raylux.engine.carrying import Later, prints
from raylux.engine.context import Context
from raylux.engine.records import QueryFiles
from raylux.engine.stages import queries as known
from raylux.engine.stages.carried import END, blocks_of, holding, prints_of, taken
from raylux.engine.stages.fit import fitted_in
from raylux.errors import UserError
from raylux.fingerprints import of_query
from raylux.layers import TrackedLayer
from raylux.queries import Query
from raylux.shown import redacted
from raylux.store import RunFolder


def find(config: Config, layers: Sequence[TrackedLayer], queries: Sequence[Query]) -> tuple[Later, ...]:
    """The runs that the config takes its queries from, and what they have of these; empty: it names none.

    Raises:
        UserError: one is no such run, tracks other layers, or has not solved these queries, or not densely; they are
            not of one segment.
    """
    paths = config.query.later
    twice = next((path for place, path in enumerate(paths) if path in paths[:place]), None)
    if twice is not None:
        raise UserError(f"query.carried_from names {redacted(twice)} twice; name each checkpoint's run once")
    if len(paths) > 1 and config.curvature.segment is None:
        raise UserError(
            "query.carried_from: several runs are checkpoints of one segment of training, and this run is before none; "
            "name one run, or set curvature.segment"
        )
    found = tuple(_later(path, config, layers, queries) for path in paths)
    lengths = sorted({str(run.fitted.segment) for run in found})
    if len(lengths) > 1:
        raise UserError(
            f"query.carried_from: the runs have curvature.segment {' and '.join(lengths)}, so are not of one segment; "
            "name the checkpoints of the next one alone"
        )
    return found


def _later(path: str, config: Config, layers: Sequence[TrackedLayer], queries: Sequence[Query]) -> Later:
    where = f"query.carried_from={redacted(path)}"
    folder = RunFolder(path)
    settings = folder.settings()
    later = Config.parse(settings["config"], where=f"{path}/run.yaml")
    _check_alike(where, config, later)
    if settings["model"]["layers"] != [layer.name for layer in layers]:
        raise UserError(f"{where}: the run tracks other layers; give both runs the same model.layers")
    units = blocks_of(folder, [query.id for query in queries])
    holds = holding(units)
    _check_queries(where, folder, queries, set(holds))
    if any(rank >= 0 for manifest in units.values() for ranks in manifest.meta["ranks"] for rank in ranks.values()):
        raise UserError(f"{where}: its queries are compressed; run it with query.max_error=0")
    files = tuple(QueryFiles(tuple(m.meta["queries"]), m.meta["layers"]) for m in units.values())
    for layer in layers if files else ():
        found = folder.group(files[0].layers[layer.name]).shape("dense")[1:]
        if found != layer.shape:
            raise UserError(f"{where}: '{layer.name}' has the shape {found} there and {layer.shape} here; only "
                            "checkpoints of one model follow one another")  # fmt: skip
    # λ is the layer's, the same in every block.
    damping: Mapping[str, float] = next((manifest.meta["damping"] for manifest in units.values()), {})
    free = next((name for name, value in damping.items() if not value > 0), None)
    ends = not KINDS[later.curvature.kind].fitted
    if later.curvature.segment is None and free is not None and not ends:
        raise UserError(f"{where}: λ of '{free}' is 0 there, so that nothing holds it to where its training began; "
                        "run it with curvature.damping above 0")  # fmt: skip
    return Later(
        folder.files.place,
        tuple(query.id for query in queries),
        files,
        replace(fitted_in(folder), segment=later.curvature.segment),
        later.curvature.kind,
        settings["model"]["groups"],
        damping,
        settings["plan"]["query_basis"] == "eigen",
        {query: END * ends + own for query, own in prints_of(folder, [query.id for query in queries]).items()},
    )


def check_same(ctx: Context) -> None:
    """Raises UserError where what a run's solved queries were carried from is no longer what it was."""
    before = taken(ctx.folder)
    later = find(ctx.config, ctx.coverage.tracked, [query for query in ctx.queries if query.id in before])
    for query, now in prints(later).items():
        for run, was, own in zip(later, before[query], now, strict=True):
            if was != own:
                raise UserError(
                    f"query.carried_from={redacted(run.folder)}: that run has solved '{query}' anew since this one "
                    "took it from there; add --restart query to take it again"
                )


def _check_alike(where: str, config: Config, later: Config) -> None:
    """Raises UserError where only one of two runs stands for a segment, or the later one has no λ to carry by."""
    segments = config.curvature.segment is not None, later.curvature.segment is not None
    if segments == (True, False):
        if later.curvature.kind == "identity":
            return
        raise UserError(
            f"{where}: the run stands for no segment of training; run it with curvature.segment set, or with "
            "curvature.kind=identity where it is of the model that the training ended with"
        )
    if segments == (False, True):
        raise UserError(
            f"{where}: the run stands for a segment of training and this one for none; set curvature.segment here too, "
            "or carry from a run without it"
        )
    if not KINDS[later.curvature.kind].predicts:
        raise UserError(
            f"{where}: the run has curvature.kind={later.curvature.kind}, which predicts no step of the weights; run "
            "it with a fitted kind, as ekfac"
        )


def _check_queries(where: str, folder: RunFolder, queries: Sequence[Query], solved: set[str]) -> None:
    asked = {entry["id"]: entry["fingerprint"] for entry in known.records(folder)}
    for query in queries:
        if query.id not in solved:
            raise UserError(f"{where}: it has not solved the query '{query.id}'; run it with the same queries first")
        if asked.get(query.id) != of_query(query):
            raise UserError(f"{where}: it asks something else as '{query.id}'; give both runs the same queries")
