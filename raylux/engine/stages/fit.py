"""Fit: covariances, eigenbases, Λ (Grosse et al. 2023, section 3.1; the passes of EK-FAC)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raylux.batches import IGNORED
from raylux.engine.context import Context
from raylux.engine.pace import Pace
from raylux.engine.plan import choose_fit_rows, covariance_bytes, fit_units, layer_bytes
from raylux.engine.quarantine import given_up
from raylux.engine.records import (
    COVARIANCE,
    EIGEN,
    LABELS,
    MOMENTS,
    Fitted,
    factor_files,
    input_matrix,
    output_matrix,
)
from raylux.engine.stages import precision
from raylux.engine.sums import Finished, SumPass, Units, forget_snapshot
from raylux.engine.work import ids_at
from raylux.errors import RayluxError
from raylux.store import Manifest


def run(ctx: Context) -> None:
    """Do what the kind of curvature needs and the folder lacks."""
    units = FitUnits(ctx)
    if ctx.kind.basis:
        _covariances(ctx, units)
        _eigenbases(ctx)
    if ctx.kind.moments:
        _moments(ctx, units)


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
    return found


def _layers(ctx: Context) -> set[str]:
    return {layer.name for layer in ctx.coverage.tracked}


class FitUnits:
    """The sequences of the fit, cut into units: a function of ids and lengths alone."""

    def __init__(self, ctx: Context) -> None:
        self.rows = choose_fit_rows(ctx.ids, ctx.config.fit.sequences, ctx.config.fit.seed)
        lengths = ctx.reader.lengths[self.rows]
        self.slices = fit_units(lengths, ctx.plan.fit_unit_tokens)
        self.names = [f"f{index:06d}" for index in range(len(self.slices))]
        self.ends = np.concatenate([[0], np.cumsum(lengths)])

    def tokens(self, index: int) -> slice:
        """Where a unit's tokens lie among those of the fit, flat."""
        part = self.slices[index]
        return slice(int(self.ends[part.start]), int(self.ends[part.stop]))

    def joined(self, heads: Mapping[int, np.ndarray]) -> np.ndarray:
        """The labels of all units, flat in the order of the fit; of a unit that was left out, none counts."""
        labels = np.full(int(self.ends[-1]), IGNORED, np.int32)
        for index, head in heads.items():
            labels[self.tokens(index)] = head
        return labels


def _pass(
    ctx: Context,
    units: FitUnits,
    stage: str,
    names: tuple[str, str, str],
    args: Any,
    size: int,
    leave_out: Sequence[str],
) -> Finished:
    """Run a pass of sums; ``names``: what people call it, the worker's method, the shard's that writes."""
    what, method, write = names
    work = Units(
        stage, method, write, units.names, args, lambda index: ids_at(ctx.ids, units.rows[units.slices[index]]),
        frozenset(leave_out), ctx.keepers,
    )  # fmt: skip
    with ctx.reporter.task(what, len(units.names), "units") as task:
        done = SumPass(ctx.backend, ctx.folder, work, Pace(ctx.config.fit.snapshot, size), ctx.reporter).run(task)
    if not done.written or any(not counts["sequences"] for _, _, counts in done.written.values()):
        raise RayluxError(
            f"{ctx.folder.path}: every unit of the fit is quarantined, nothing is left to fit on; "
            "`raylux inspect` lists the reasons"
        )
    return done


def _covariances(ctx: Context, units: FitUnits) -> None:
    if not set(matrices(ctx)) - ctx.folder.committed(COVARIANCE):
        forget_snapshot(ctx.folder, COVARIANCE)
        return
    sampled, assignment = ctx.config.fit.labels == "sampled", ctx.assignment
    contraction = precision.resolve(ctx)

    def args(index: int) -> tuple[Any, ...]:
        return units.rows[units.slices[index]], assignment, sampled, contraction

    size = covariance_bytes(ctx.coverage.tracked, ctx.groups, 8, ctx.config.curvature.blocks)
    done = _pass(ctx, units, COVARIANCE, ("covariance", "covariance_unit", "write_covariances"), args, size, ())
    ctx.keepers |= done.workers
    key, objects = ctx.folder.write("factors/labels", {"labels": units.joined(done.heads)})
    ctx.folder.commit(LABELS, "labels", objects, key=key)
    _commit(ctx, COVARIANCE, done)


def _eigenbases(ctx: Context) -> None:
    todo = set(matrices(ctx)) - ctx.folder.committed(EIGEN)
    if not todo:
        return
    keys = {name: manifest.meta["key"] for name, manifest in ctx.folder.units(COVARIANCE).items()}
    # The largest first: what is begun last is done soon.
    sizes = {input_matrix(layer.name): layer.inputs for layer in ctx.coverage.tracked}
    sizes |= {output_matrix(layer.name): layer.outputs for layer in ctx.coverage.tracked}
    # EK-FAC measures Λ in whatever basis it gets, but within a nearly degenerate eigenspace another basis is another
    # Λ: in float32 the bases of A move scores by half a per cent, as bf16 products do, those of S by two (6 layers,
    # d = 512, fitted on 32 sequences). K-FAC takes the eigenvalues. A large GPU is as fast in float64.
    rounded = ctx.kind.moments and ctx.plan.device == "cpu" and precision.resolve(ctx).dtype == "bfloat16"
    inputs = {input_matrix(layer.name) for layer in ctx.coverage.tracked}
    quick = {"auto": inputs if rounded else set(), "float32": todo, "float64": set()}[ctx.config.fit.eigh]
    jobs = [(name, keys[name], name in quick) for name in sorted(todo, key=lambda name: (-sizes[name], name))]
    with ctx.reporter.task("eigenbases", len(todo), "matrices") as task:
        for (name, *_), (key, objects, numerics) in ctx.backend.shard_stream("decompose", jobs):
            ctx.folder.commit(EIGEN, name, objects, key=key, numerics=[numerics])
            task.advance()


def _moments(ctx: Context, units: FitUnits) -> None:
    if not _layers(ctx) - ctx.folder.committed(MOMENTS):
        forget_snapshot(ctx.folder, MOMENTS)
        return
    drawn = None
    if ctx.kind.basis:
        drawn = ctx.folder.group(ctx.folder.manifest(LABELS, "labels").meta["key"]).read("labels")
    sampled, assignment = ctx.config.fit.labels == "sampled", ctx.assignment
    files = ctx.backend.share(factor_files(ctx.folder))
    contraction = precision.resolve(ctx)

    def args(index: int) -> tuple[Any, ...]:
        labels = None if drawn is None else drawn[units.tokens(index)]
        return units.rows[units.slices[index]], labels, assignment, sampled, files, contraction

    # A unit that killed its workers in the first pass is not tried again in the second.
    leave_out = tuple(given_up(ctx.folder, COVARIANCE))
    size = layer_bytes(ctx.coverage.tracked, 8)
    done = _pass(ctx, units, MOMENTS, ("lambda", "moment_unit", "write_moments"), args, size, leave_out)
    _commit(ctx, MOMENTS, done)


def _commit(ctx: Context, stage: str, done: Finished) -> None:
    for name, (key, objects, counts) in done.written.items():
        ctx.folder.commit(stage, name, objects, key=key, numerics=done.numerics, **counts)
    forget_snapshot(ctx.folder, stage)


def rows_per_sequence(units: Mapping[str, Manifest]) -> dict[str, float]:
    """T̄ of each layer from the committed covariances."""
    return {
        name.partition(":")[2]: manifest.meta["rows"] / manifest.meta["sequences"]
        for name, manifest in units.items()
        if name.startswith("S:")
    }


def fitted(ctx: Context) -> Fitted:
    """What the ledger has of the fit."""
    return Fitted(
        factor_files(ctx.folder),
        {unit: manifest.meta["key"] for unit, manifest in ctx.folder.units(MOMENTS).items()},
        rows_per_sequence(ctx.folder.units(COVARIANCE)),
        _shared_means(ctx),
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
