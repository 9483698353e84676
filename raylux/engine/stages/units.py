"""How corpus rows that are to be run are cut into units."""

from __future__ import annotations

import numpy as np

from raylux.engine.context import Context
from raylux.engine.plan import score_units
from raylux.engine.stages.layers import FitUnits


def keepers_of(ctx: Context) -> np.ndarray | None:
    """The worker that may keep each corpus row [N], −1 where nobody does; None where it makes no difference."""
    if len(set(ctx.keepers.values())) < 2:
        return None
    found = np.full(len(ctx.ids), -1, np.int64)
    units = FitUnits(ctx)
    for unit, worker in ctx.keepers.items():
        found[units.rows[units.slices[unit]]] = worker
    return found


def cut(ctx: Context, rows: np.ndarray, keepers: np.ndarray | None = None) -> tuple[np.ndarray, dict[int, int]]:
    """The score unit of each of some corpus rows [n], and the worker of each unit whose rows are kept by one.

    Args:
        ctx: the run.
        rows: [n], ascending.
        keepers: [N] the worker that keeps each corpus row, or −1: what one worker keeps is cut into units of its own.
    """
    lengths, size = ctx.reader.lengths, ctx.plan.score_unit_size
    units = score_units(lengths, size)[rows]
    if keepers is None:
        return units, {}
    return _units_by_keeper(units, lengths[rows], keepers[rows], size)


def _units_by_keeper(
    units: np.ndarray, lengths: np.ndarray, keepers: np.ndarray, size: int
) -> tuple[np.ndarray, dict[int, int]]:
    """Rows that a worker keeps in units of their own, the workers' in turn; a score does not depend on its company.

    Returns:
        The unit of each row [n], and the worker of each new unit.
    """
    found = units.copy()
    near: dict[int, int] = {}
    workers = sorted(set(keepers[keepers >= 0].tolist()))
    first = int(units.max(initial=-1)) + 1
    for place, worker in enumerate(workers):
        kept = np.flatnonzero(keepers == worker)
        found[kept] = first + score_units(lengths[kept], size) * len(workers) + place
        near |= dict.fromkeys(np.unique(found[kept]).tolist(), worker)
    return found, near
