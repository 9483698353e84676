"""Squares: how long the gradients of scored sequences are, their self-influence among it, a unit at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylux.engine.context import Context
from raylux.engine.quarantine import lost_pairs
from raylux.engine.records import LoadedCurvature
from raylux.engine.stages import precision, prefilter
from raylux.engine.stages.fit import fitted
from raylux.engine.stages.units import cut, keepers_of, settle
from raylux.engine.work import Job, results
from raylux.ledger import SQUARES


@dataclass(frozen=True)
class _Unit:
    """Corpus rows of a job; ``near``: the worker that may keep them."""

    name: str
    rows: np.ndarray
    near: int | None


def run(ctx: Context) -> None:
    """Compute and commit the squares of the candidates that lack them, where the config asks for them."""
    if not ctx.config.score.self_influence:
        return
    if not _run(ctx, _missing(ctx, keepers_of(ctx))):
        # As with scores: in smaller company before it is given up.
        _run(ctx, _missing(ctx))


def _missing(ctx: Context, keepers: np.ndarray | None = None) -> list[_Unit]:
    rows = prefilter.union(ctx)
    done = [manifest.meta["rows"] for manifest in ctx.folder.units(SQUARES).values()]
    done += [list(lost.rows) for lost in lost_pairs(ctx.folder, SQUARES)]
    rows = rows[~np.isin(rows, np.concatenate([np.zeros(0, np.int64), *done]))]
    units, near = cut(ctx, rows, keepers)
    return [_unit(rows[units == unit], near.get(int(unit)), int(unit)) for unit in np.unique(units)]


def _unit(rows: np.ndarray, near: int | None, unit: int) -> _Unit:
    tail = hashlib.blake2b(str(rows.tolist()).encode(), digest_size=6).hexdigest()
    return _Unit(f"u{unit:06d}-{tail}", rows, near)


def _run(ctx: Context, units: Sequence[_Unit]) -> bool:
    """Run units; whether there is nothing to be tried again."""
    if not units:
        return True
    through = True
    how = curvature(ctx), precision.resolve(ctx)
    calls = (Job(unit.name, (unit.name, unit.rows, *how), unit, unit.near) for unit in units)
    with ctx.reporter.task("self-influence", sum(len(unit.rows) for unit in units), "sequences") as task:
        for result in results(ctx.backend, "squares_unit", calls):
            unit: _Unit = result.job.item
            if settle(ctx, SQUARES, result, unit.rows):
                task.advance(len(unit.rows))
            else:
                through = False
    return through


def curvature(ctx: Context) -> Any:
    """A handle of the run's own curvature, cut as the fit cut it, so that a worker has room for each part.

    Where scores are divided by lengths in it, a worker has room for the whole.
    """
    whole = ctx.kind.joint or ctx.kind.projected or not ctx.kind.fitted
    passes = 1 if whole else max(ctx.passes.covariance, ctx.passes.moments)
    parts = reversed(ctx.passes_of(passes))
    names = tuple(tuple(layer.name for layer in part) for part in parts)
    return ctx.backend.share(
        LoadedCurvature(fitted(ctx), ctx.config.curvature.kind, ctx.config.curvature.damping, names)
    )
