"""Units of corpus rows: how they are cut, and what becomes of them when they have run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from raylux.engine.context import Context
from raylux.engine.plan import score_units
from raylux.engine.quarantine import Pairs, give_up
from raylux.engine.stages.layers import FitUnits
from raylux.engine.work import Result, ids_at


def keepers_of(ctx: Context) -> np.ndarray | None:
    """The worker that may keep each corpus row [N], −1 where nobody does; None where it makes no difference."""
    if len(set(ctx.keepers.values())) < 2:
        return None
    found = np.full(len(ctx.ids), -1, np.int64)
    units = FitUnits(ctx)
    for unit, worker in ctx.keepers.items():
        found[units.rows[units.slices[unit]]] = worker
    return found


def cut(
    ctx: Context, rows: np.ndarray, keepers: np.ndarray | None = None, size: int | None = None
) -> tuple[np.ndarray, dict[int, int]]:
    """The score unit of each of some corpus rows [n], and the worker of each unit whose rows are kept by one.

    Args:
        ctx: the run.
        rows: [n], ascending.
        keepers: [N] the worker that keeps each corpus row, or −1: what one worker keeps is cut into units of its own.
        size: rows of a unit; None: as the plan has it.
    """
    lengths, size = ctx.reader.lengths, size or ctx.plan.score_unit_size
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


def settle(
    ctx: Context,
    stage: str,
    result: Result,
    rows: np.ndarray,
    queries: Sequence[str] = (),
    about: Mapping[str, object] | None = None,
) -> bool:
    """Commit what a unit found, or give up what it could not.

    Args:
        ctx: the run.
        stage: of the ledger.
        result: of a method that returns a key and its objects.
        rows: of the corpus that it ran.
        queries: that they were run for, if any.
        about: said of what is committed, beside its key, rows and numerics.

    Returns:
        False where it failed among rows that a worker keeps, and is neither: those are to be tried in smaller company.
    """
    failure = result.failure
    if failure is None:
        key, objects = result.value
        numerics = [dict(result.numerics)]
        ctx.folder.commit(
            stage, result.job.name, objects, key=key, **(about or {}), rows=rows.tolist(), numerics=numerics
        )  # fmt: skip
        return True
    if result.job.near is not None:
        return False
    pairs = Pairs(tuple(queries), tuple(rows.tolist()))
    give_up(ctx.folder, stage, result.job.name, ids_at(ctx.ids, rows), failure, pairs)
    ctx.reporter.say(f"{stage}: unit {result.job.name} is quarantined ({failure.reason})")
    return True
