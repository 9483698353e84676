"""Fit: covariances, eigenbases, Λ (Grosse et al. 2023, section 3.1; the passes of EK-FAC)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from raylux.cost.passes import moments_held, triangles_held
from raylux.engine.context import Context
from raylux.engine.quarantine import given_up
from raylux.engine.records import Fitted, Projection, factor_files, input_matrix, output_matrix
from raylux.engine.snapshots import forget_snapshot
from raylux.engine.stages import precision, projecting
from raylux.engine.stages.layers import FitUnits, LayerSums, sum_layers
from raylux.ledger import COVARIANCE, EIGEN, MOMENTS, PROJECTED
from raylux.store import Manifest, RunFolder


def run(ctx: Context) -> None:
    """Do what the kind of curvature needs and the folder lacks."""
    units = FitUnits(ctx)
    if ctx.kind.basis:
        _covariances(ctx, units)
        _eigenbases(ctx)
    if ctx.kind.joint:
        _joint(ctx, units)
    elif ctx.config.curvature.optimizer is not None:
        projecting.read_moments(ctx)
    elif ctx.kind.moments:
        _moments(ctx, units)
    if ctx.kind.projected:
        projecting.sum_projected(ctx, units, fitted(ctx))


def matrices(ctx: Context) -> list[str]:
    """Every A (one per input group) and S of the model."""
    leaders = [layer.name for layer in ctx.coverage.tracked if ctx.groups[layer.name] == layer.name]
    return [input_matrix(name) for name in leaders] + [output_matrix(layer.name) for layer in ctx.coverage.tracked]


def missing(ctx: Context) -> list[str]:
    """What the fit still has to do, by ledger stage."""
    found = []
    if ctx.kind.basis:
        names = set(matrices(ctx))
        found += [stage for stage in (COVARIANCE, EIGEN) if names - ctx.folder.committed(stage)]
    if ctx.kind.moments and _layers(ctx) - ctx.folder.committed(MOMENTS):
        found.append(MOMENTS)
    if ctx.kind.projected and _layers(ctx) - ctx.folder.committed(PROJECTED):
        found.append(PROJECTED)
    return found


def _layers(ctx: Context) -> set[str]:
    return {layer.name for layer in ctx.coverage.tracked}


def _covariances(ctx: Context, units: FitUnits) -> None:
    if set(matrices(ctx)) - ctx.folder.committed(COVARIANCE):
        contraction, sampled = precision.resolve(ctx), ctx.config.fit.labels == "sampled"
        held = triangles_held(ctx.groups, 8, ctx.config.curvature.blocks)
        names = ("covariance", "covariance_unit", "write_covariances")
        beyond = units.beyond(ctx.config.fit.covariance_sequences)
        sums = LayerSums(COVARIANCE, *names, ctx.passes.covariance, held, _sides, (sampled, contraction), beyond)
        sum_layers(ctx, units, sums)
    forget_snapshot(ctx.folder, COVARIANCE)


def _sides(ctx: Context, layer: str) -> set[str]:
    return {input_matrix(ctx.groups[layer]), output_matrix(layer)}


def _eigenbases(ctx: Context) -> None:
    todo = set(matrices(ctx)) - ctx.folder.committed(EIGEN)
    if not todo:
        return
    keys = {name: manifest.meta["key"] for name, manifest in ctx.folder.units(COVARIANCE).items()}
    # The largest first: what is begun last is done soon.
    sizes = {input_matrix(layer.name): layer.inputs for layer in ctx.coverage.tracked}
    sizes |= {output_matrix(layer.name): layer.outputs for layer in ctx.coverage.tracked}
    # EK-FAC measures Λ in whatever basis it gets, so that a basis may be a little off; K-FAC takes the eigenvalues as
    # they are. A large GPU is as fast in float64.
    quick = {"auto": ctx.kind.moments and ctx.plan.device == "cpu", "float32": True, "float64": False}
    how = quick[ctx.config.fit.eigh]
    jobs = [(name, keys[name], how) for name in sorted(todo, key=lambda name: (-sizes[name], name))]
    with ctx.reporter.task("eigenbases", len(todo), "matrices") as task:
        for (name, *_), (key, objects, numerics) in ctx.backend.shard_stream("decompose", jobs):
            ctx.folder.commit(EIGEN, name, objects, key=key, numerics=[numerics])
            task.advance()


def _moments(ctx: Context, units: FitUnits) -> None:
    if _layers(ctx) - ctx.folder.committed(MOMENTS):
        # An optimizer's moments, which those of a kind that projects stand for, are of the data's own labels.
        sampled = ctx.config.fit.labels == "sampled" and not ctx.kind.projected
        contraction = precision.resolve(ctx)
        files = ctx.backend.share(factor_files(ctx.folder))
        held, names = moments_held(ctx.groups, 0, 8), ("lambda", "moment_unit", "write_moments")
        # A unit that killed its workers in the first pass is not tried again in the second.
        out = frozenset(given_up(ctx.folder, COVARIANCE))
        more = (sampled, files, contraction)
        sums = LayerSums(MOMENTS, *names, ctx.passes.moments, held, lambda _, layer: {layer}, more, out)
        sum_layers(ctx, units, sums)
    forget_snapshot(ctx.folder, MOMENTS)


def _joint(ctx: Context, units: FitUnits) -> None:
    """The matrix over all tracked weights: of each layer its rows, its diagonal for Λ. One pass, nothing drawn."""
    if _layers(ctx) - ctx.folder.committed(MOMENTS):
        size = 8 * sum(layer.parameters for layer in ctx.coverage.tracked)
        names = ("exact matrix", "joint_unit", "write_joint")
        held, more = lambda layer: float(size * layer.parameters), (ctx.kind.name,)
        sums = LayerSums(MOMENTS, *names, 1, held, lambda _, layer: {layer}, more)
        sum_layers(ctx, units, sums)
    forget_snapshot(ctx.folder, MOMENTS)


def rows_per_sequence(units: Mapping[str, Manifest]) -> dict[str, float]:
    """T̄ of each layer from the committed covariances."""
    return {
        name.partition(":")[2]: manifest.meta["rows"] / manifest.meta["sequences"]
        for name, manifest in units.items()
        if name.startswith("S:")
    }


def fitted(ctx: Context) -> Fitted:
    """What the ledger has of the fit."""
    return replace(
        fitted_in(ctx.folder),
        least=_shared_means(ctx),
        segment=ctx.config.curvature.segment,
        projection=_projection(ctx),
    )


def _projection(ctx: Context) -> Projection | None:
    if not ctx.kind.projected:
        return None
    keys = {unit: manifest.meta["key"] for unit, manifest in ctx.folder.units(PROJECTED).items()}
    # Some layers without the others are a pass on its way: none is whitened before all are.
    second = keys if keys.keys() >= _layers(ctx) else {}
    return Projection(ctx.config.curvature.projection, ctx.config.fit.seed, second)


def fitted_in(folder: RunFolder) -> Fitted:
    """What a run folder's ledger has of its fit, but for what is told by the model and the config."""
    return Fitted(
        factor_files(folder),
        {unit: manifest.meta["key"] for unit, manifest in folder.units(MOMENTS).items()},
        rows_per_sequence(folder.units(COVARIANCE)),
        {},
    )


def _shared_means(ctx: Context) -> dict[str, float]:
    """Expert's layer -> mean of Λ over this matrix of all tracked experts of its block, whatever the kind's Λ is."""
    pools: dict[str, list[str]] = {}
    for layer in ctx.coverage.tracked:
        if layer.pool is not None:
            pools.setdefault(layer.pool, []).append(layer.name)
    if not pools or not ctx.kind.fitted:
        return {}
    sizes = {layer.name: layer.inputs for layer in ctx.coverage.tracked}
    found: dict[str, float] = {}
    for names in pools.values():
        mean = sum(_mean_curvature(ctx, name, sizes[name]) for name in names) / len(names)
        found |= dict.fromkeys(names, mean)
    return found


def _mean_curvature(ctx: Context, name: str, size: int) -> float:
    """Mean of Λ of a layer with ``size`` inputs, measured or from the means of A's and S's eigenvalues."""
    if ctx.kind.moments:
        return float(ctx.folder.manifest(MOMENTS, name).meta["mean"])
    inputs, outputs = (
        ctx.folder.manifest(COVARIANCE, matrix).meta for matrix in (input_matrix(ctx.groups[name]), output_matrix(name))
    )
    return ctx.kind.mean_product(inputs["mean"], outputs["mean"], size, outputs["rows"] / outputs["sequences"])
