"""The fit of a kind that projects gradients: the optimizer's second moments, then what whitens the projections."""

from __future__ import annotations

from raylux import models
from raylux.engine.context import Context
from raylux.engine.quarantine import given_up
from raylux.engine.records import Fitted, LoadedCurvature
from raylux.engine.snapshots import forget_snapshot
from raylux.engine.stages.layers import FitUnits, LayerSums, sum_layers
from raylux.ledger import MOMENTS, PROJECTED
from raylux.optimizer import OptimizerMoments


def read_moments(ctx: Context) -> None:
    """Store the second moments that the config's file has, in the place of those that a pass would sum.

    Raises:
        UserError: as ``OptimizerMoments``.
    """
    missing = {layer.name for layer in ctx.coverage.tracked} - ctx.folder.committed(MOMENTS)
    if not missing:
        return
    path = ctx.config.curvature.optimizer
    assert path is not None
    structure = models.load_structure(ctx.files, ctx.config.model.trust_remote_code, weights=False)
    moments = OptimizerMoments(path, structure, ctx.coverage.tracked)
    dtype = models.DTYPES["float64" if ctx.plan.dtype == "float64" else "float32"]
    # All of one file, whatever an earlier command had of it.
    for layer in ctx.coverage.tracked:
        found = moments.of(layer.name, dtype).numpy()
        key, objects = ctx.folder.write(f"factors/{layer.name}/lambda", {"matrix": found})
        facts = {"sequences": 0, "mean": float(found.mean(dtype="float64")), "numerics": []}
        ctx.folder.commit(MOMENTS, layer.name, objects, key=key, **facts)


def sum_projected(ctx: Context, units: FitUnits, fitted: Fitted) -> None:
    """Sum the outer products of the fitted sequences' projected gradients, on the data's own labels."""
    names = tuple(layer.name for layer in ctx.coverage.tracked)
    if set(names) - ctx.folder.committed(PROJECTED):
        setting = ctx.config.curvature
        size = 8.0 * setting.projection**4
        loaded = ctx.backend.share(LoadedCurvature(fitted, setting.kind, setting.damping, (names,)))
        sums = LayerSums(
            PROJECTED, "whitening", "projected_unit", "write_projected", ctx.passes.moments, lambda _: size,
            lambda _, layer: {layer}, (loaded,), frozenset(given_up(ctx.folder, MOMENTS)),
        )  # fmt: skip
        sum_layers(ctx, units, sums)
    forget_snapshot(ctx.folder, PROJECTED)
