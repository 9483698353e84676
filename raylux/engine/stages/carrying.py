"""Whether a run can take its queries from that of the segment of training after it, and what of that run it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raylux.config import Config
from raylux.engine.carrying import Later
from raylux.engine.context import Context
from raylux.engine.records import COVARIANCE, EIGEN, MOMENTS, QUERY, QueryFiles
from raylux.engine.stages import queries as known
from raylux.engine.stages.fit import fitted_in
from raylux.errors import UserError
from raylux.fingerprints import digest, of_query
from raylux.layers import TrackedLayer
from raylux.queries import Query
from raylux.shown import redacted
from raylux.store import Manifest, RunFolder


def find(config: Config, layers: Sequence[TrackedLayer], queries: Sequence[Query]) -> Later | None:
    """The run of the next segment and what it has of these queries; None where the config names none.

    Raises:
        UserError: it is no such run, tracks other layers, or has not solved these queries, or not densely.
    """
    path = config.query.carried_from
    if path is None:
        return None
    where = f"query.carried_from={redacted(path)}"
    folder = RunFolder(path)
    settings = folder.settings()
    later = Config.parse(settings["config"], where=f"{path}/run.yaml")
    if later.curvature.segment is None:
        raise UserError(f"{where}: the run stands for no segment of training; run it with curvature.segment set")
    if settings["model"]["layers"] != [layer.name for layer in layers]:
        raise UserError(f"{where}: the run tracks other layers; give both runs the same model.layers")
    units = {
        unit: manifest
        for unit, manifest in folder.units(QUERY).items()
        if {query.id for query in queries} & set(manifest.meta["queries"])
    }
    holds = {query: manifest for manifest in units.values() for query in manifest.meta["queries"]}
    _check_queries(where, folder, queries, set(holds))
    if any(rank >= 0 for manifest in units.values() for ranks in manifest.meta["ranks"] for rank in ranks.values()):
        raise UserError(f"{where}: its queries are compressed; run it with query.max_error=0")
    files = tuple(QueryFiles(tuple(m.meta["queries"]), m.meta["layers"]) for m in units.values())
    for layer in layers if files else ():
        found = folder.group(files[0].layers[layer.name]).shape("dense")[1:]
        if found != layer.shape:
            raise UserError(f"{where}: '{layer.name}' has the shape {found} there and {layer.shape} here; only "
                            "checkpoints of one model follow one another")  # fmt: skip
    factors = _checksums([m for stage in (COVARIANCE, EIGEN, MOMENTS) for m in folder.units(stage).values()])
    return Later(
        folder.files.place,
        tuple(query.id for query in queries),
        files,
        replace(fitted_in(folder), segment=later.curvature.segment),
        later.curvature.kind,
        settings["model"]["groups"],
        # λ is the layer's, the same in every block.
        next((manifest.meta["damping"] for manifest in units.values()), {}),
        settings["plan"]["query_basis"] == "eigen",
        {query.id: digest(factors, _checksums([holds[query.id]])) for query in queries},
    )


def check_same(ctx: Context) -> None:
    """Raises UserError where what a run's solved queries were carried from is no longer what it was."""
    before = {query: was for unit in ctx.folder.units(QUERY).values() for query, was in unit.meta["carried"].items()}
    later = find(ctx.config, ctx.coverage.tracked, [query for query in ctx.queries if query.id in before])
    for query, now in (later.prints if later else {}).items():
        if before[query] != now:
            where = redacted(str(ctx.config.query.carried_from))
            raise UserError(
                f"query.carried_from={where}: that run has solved '{query}' anew since this one took it from there; "
                "add --restart query to take it again"
            )


def _check_queries(where: str, folder: RunFolder, queries: Sequence[Query], solved: set[str]) -> None:
    asked = {entry["id"]: entry["fingerprint"] for entry in known.records(folder)}
    for query in queries:
        if query.id not in solved:
            raise UserError(f"{where}: it has not solved the query '{query.id}'; run it with the same queries first")
        if asked.get(query.id) != of_query(query):
            raise UserError(f"{where}: it asks something else as '{query.id}'; give both runs the same queries")


def _checksums(manifests: Sequence[Manifest]) -> dict[str, str]:
    """Of all objects that they vouch for, whatever these are called."""
    found = sorted(f"{size} {checksum}" for manifest in manifests for size, checksum in manifest.objects.values())
    return {"objects": " ".join(found)}
