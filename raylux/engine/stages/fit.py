"""Fit: covariances, eigenbases, Λ (Grosse et al. 2023, section 3.1; the passes of EK-FAC)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from raylux.engine.context import Context
from raylux.engine.plan import choose_fit_rows, fit_units
from raylux.engine.records import COVARIANCE, EIGEN, MOMENTS, factor_files, input_matrix, output_matrix
from raylux.store import Manifest

LABELS = "fit.labels"


def run(ctx: Context) -> None:
    """Do what the kind of curvature needs and the folder lacks."""
    units = _Units(ctx)
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
    if ctx.kind.moments and {layer.name for layer in ctx.coverage.tracked} - ctx.folder.committed(MOMENTS):
        found.append(MOMENTS)
    return found


class _Units:
    """The sequences of the fit, cut into units: a function of ids and lengths alone."""

    def __init__(self, ctx: Context) -> None:
        self.rows = choose_fit_rows(ctx.ids, ctx.config.fit.sequences, ctx.config.fit.seed)
        lengths = ctx.reader.lengths[self.rows]
        self.slices = fit_units(lengths, ctx.plan.fit_unit_tokens)
        self.ends = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self.slices)

    def labels(self, drawn: np.ndarray, index: int) -> np.ndarray:
        """The part of all drawn labels, flat in the order of the fit, that belongs to a unit."""
        part = self.slices[index]
        return drawn[self.ends[part.start] : self.ends[part.stop]]


def _covariances(ctx: Context, units: _Units) -> None:
    names = set(matrices(ctx))
    if not names - ctx.folder.committed(COVARIANCE):
        return
    backend, sampled = ctx.backend, ctx.config.fit.labels == "sampled"
    backend.shard_calls("begin", [()] * backend.shards)
    jobs = ((index, (units.rows[part], ctx.assignment, sampled)) for index, part in enumerate(units.slices))
    drawn = []
    with ctx.reporter.task("covariance", len(units), "units") as task:
        for index, labels, parts in backend.map("covariance_unit", jobs, parts=True, ordered=True):
            backend.shard_calls("add", [(index, part) for part in parts])
            drawn.append(labels)
            task.advance()
        key, objects = ctx.folder.write("factors/labels", {"labels": np.concatenate(drawn)})
        ctx.folder.commit(LABELS, "labels", objects, key=key)
        _commit(ctx, COVARIANCE, "write_covariances")


def _eigenbases(ctx: Context) -> None:
    todo = set(matrices(ctx)) - ctx.folder.committed(EIGEN)
    if not todo:
        return
    keys = {name: manifest.meta["key"] for name, manifest in ctx.folder.units(COVARIANCE).items()}
    jobs: dict[int, list[tuple[str, str]]] = {}
    for name in matrices(ctx):
        if name in todo:
            jobs.setdefault(ctx.shard_of(name.partition(":")[2]), []).append((name, keys[name]))
    with ctx.reporter.task("eigenbases", len(todo), "matrices") as task:
        for _, (name, _), (key, objects) in ctx.backend.shard_stream("decompose", jobs):
            ctx.folder.commit(EIGEN, name, objects, key=key)
            task.advance()


def _moments(ctx: Context, units: _Units) -> None:
    if not {layer.name for layer in ctx.coverage.tracked} - ctx.folder.committed(MOMENTS):
        return
    backend, sampled = ctx.backend, ctx.config.fit.labels == "sampled"
    drawn = None
    if ctx.kind.basis:
        drawn = ctx.folder.group(ctx.folder.manifest(LABELS, "labels").meta["key"]).read("labels")
    backend.everyone("load_bases", factor_files(ctx.folder))
    backend.shard_calls("begin", [()] * backend.shards)
    jobs = (
        (index, (units.rows[part], None if drawn is None else units.labels(drawn, index), ctx.assignment, sampled))
        for index, part in enumerate(units.slices)
    )
    with ctx.reporter.task("lambda", len(units), "units") as task:
        for index, _, parts in backend.map("moment_unit", jobs, parts=True, ordered=True):
            backend.shard_calls("add", [(index, part) for part in parts])
            task.advance()
        _commit(ctx, MOMENTS, "write_moments")


def _commit(ctx: Context, stage: str, method: str) -> None:
    tag = ctx.backend.everyone("facts")[0]
    for written in ctx.backend.shard_calls(method, [()] * ctx.backend.shards):
        for name, (key, objects, counts) in written.items():
            ctx.folder.commit(stage, name, objects, key=key, numerics=tag, **counts)


def rows_per_sequence(units: Mapping[str, Manifest]) -> dict[str, float]:
    """T̄ of each layer from the committed covariances."""
    return {
        name.partition(":")[2]: manifest.meta["rows"] / manifest.meta["sequences"]
        for name, manifest in units.items()
        if name.startswith("S:")
    }
