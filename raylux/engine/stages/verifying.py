"""Verify: effects of some training sequences on some queries, measured at the proximal optimum, a sequence a unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raylux.curvature import check_end
from raylux.engine.context import Context
from raylux.engine.measuring import Measuring
from raylux.engine.plan import choose_fit_rows
from raylux.engine.quarantine import give_up, given_up
from raylux.engine.records import damping_of
from raylux.engine.stages.calibrating import digest
from raylux.engine.stages.query import spec_of
from raylux.engine.work import Job, ids_at, results
from raylux.errors import UserError
from raylux.evaluate import Doses
from raylux.evaluate.proximal import check_layers
from raylux.fingerprints import of_query
from raylux.ledger import VERIFIED, sequence_unit
from raylux.queries import Query


def check(ctx: Context) -> None:
    """Raises UserError where nothing can be measured that a run's scores would predict."""
    check_end(ctx.config.curvature.segment, bool(ctx.config.query.later), "verify")
    if not ctx.kind.predicts:
        raise UserError(
            f"verify: curvature.kind={ctx.config.curvature.kind} predicts no change in nats, there is nothing to "
            "measure; take a run with a fitted kind, as ekfac"
        )
    placed = ctx.placement
    if placed is not None and (placed.reads or len(placed.computing) > 1):
        raise UserError(
            "verify: measuring takes a whole copy of the model in float64, on one device, and model.device_map spreads "
            "it; set model.device_map=null and engine.gpus_per_worker=1"
        )
    check_layers("verify", ctx.coverage.tracked)


def measuring(
    ctx: Context, queries: Sequence[Query], doses: Doses, train_size: int, sequences: int | None, iterations: int
) -> Measuring:
    """What all units of a command have in common; ``sequences``: of the fit, that stand for the training set."""
    rows = choose_fit_rows(ctx.ids, ctx.config.fit.sequences, ctx.config.fit.seed)[:sequences]
    damping = damping_of(ctx.folder)
    specs = [spec_of(query) for query in queries]
    asked = [of_query(query) for query in queries]
    name = digest(rows.tolist(), sorted(damping.items()), asked, doses.copies, train_size, iterations)
    parts, weights = tuple(spec.rows for spec in specs), tuple(spec.weights for spec in specs)
    return Measuring(name, np.sort(rows), damping, parts, weights, doses.copies, train_size, iterations)


def run(ctx: Context, asked: Measuring, rows: np.ndarray) -> None:
    """Measure the sequences that are not measured yet; each is committed as it is there.

    Raises:
        UserError: there is not enough memory.
        NumericsError: an objective is not finite.
    """
    out = ctx.folder.committed(VERIFIED) | set(given_up(ctx.folder, VERIFIED))
    todo = [int(row) for row in rows if sequence_unit(asked.name, row) not in out]
    shared = ctx.backend.share(asked) if todo else asked
    jobs = (Job(sequence_unit(asked.name, row), (shared, row), row) for row in todo)
    with ctx.reporter.task("verify", len(rows), "sequences") as task:
        task.go_on(len(rows) - len(todo))
        for result in results(ctx.backend, "measure_unit", jobs):
            row, names = result.job.item, ids_at(ctx.ids, [result.job.item])
            if result.failure is not None:
                give_up(ctx.folder, VERIFIED, result.job.name, names, result.failure)
                ctx.reporter.say(f"verify: '{names[0]}' is quarantined ({result.failure.reason})")
            else:
                found: dict[str, Any] = result.value
                ctx.folder.commit(VERIFIED, result.job.name, row=row, numerics=[dict(result.numerics)], **found)
            task.advance()
