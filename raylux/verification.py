"""Calibrate a run's sizes by better solves, and verify its scores by measuring what they predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from raylux import api, prepare
from raylux.engine.context import Context
from raylux.engine.stages import calibrating, query, verifying
from raylux.engine.stages import queries as known
from raylux.errors import MissingStageError, UserError
from raylux.evaluate import Doses
from raylux.ledger import ASKED, SCORE, VERIFIED
from raylux.queries import Query
from raylux.results import Run
from raylux.shown import plain

# In the run folder.
TABLE = "report/verify.csv"


@dataclass(frozen=True)
class CalibrationOptions:
    """By what a run is calibrated.

    Attributes:
        queries: of the run, the first so many.
        pairs: scored sequences whose scores on each are compared: half the best of the queries, half drawn at random.
        products: with G per query, at most.
        seed: of the draw.
    """

    queries: int = 8
    pairs: int = 128
    products: int = 10
    seed: int = 0


@dataclass(frozen=True)
class VerifyOptions:
    """What is measured.

    Attributes:
        queries: of the run, the first so many.
        top: sequences with the largest influence on each.
        random: further scored sequences, drawn at random, the same for all queries.
        dose: copies of the smaller pair of doses.
        factor: by which the larger pair is larger.
        whole: also a whole copy.
        products: with G, of a better solve of each sequence that tells its leverage; 0: none.
        sequences: of the fit that stand for the training set; None: all of them.
        iterations: of a search, at most.
        seed: of the draw.
    """

    queries: int = 4
    top: int = 5
    random: int = 8
    dose: float = 0.1
    factor: float = 3.0
    whole: bool = True
    products: int = 10
    sequences: int | None = None
    iterations: int = 100
    seed: int = 0


def calibrate(
    run: str | Run, options: CalibrationOptions | None = None, overrides: Sequence[str] = (), quiet: bool = True
) -> Run:
    """Compare a run's scores with those of better solves of some queries; ``Run.calibration`` has what came of it.

    Interrupted at any moment, the same call goes on.

    Args:
        run: the run folder, or a run that was opened; its scores must be there.
        options: by what.
        overrides: ``section.key=value`` over the run's own config, as ``engine.workers=4``.
        quiet: no progress on the terminal.

    Raises:
        MissingStageError: the run has no factors, or no scores.
        UserError: its scores have no size to be calibrated; another command works on it.
    """
    chosen = options or CalibrationOptions()
    _at_least_one(queries=chosen.queries, pairs=chosen.pairs, products=chosen.products)
    folder, keep = _place(run)
    with prepare.fitted(folder, overrides, quiet) as (base, model):
        try:
            calibrating.check(base, "calibrate")
            asked = _asked(base, model, chosen.queries)
            opened = Run(folder, keep)
            scores = _raw(opened, [item.id for item in asked], opened.rows)
            complete = np.flatnonzero(np.isfinite(scores).all(0))
            if not len(complete):
                raise MissingStageError(f"{folder}: no sequence has scores for all these queries; take fewer")
            places = _sample(scores, complete, chosen.pairs, chosen.seed)
            ctx = calibrating.solver_context(base, chosen.products)
            try:
                calibrating.calibrate(ctx, asked, opened.rows[places], scores[:, places])
            finally:
                ctx.close()
        finally:
            base.close()
    return Run(folder, keep)


def verify(
    run: str | Run, options: VerifyOptions | None = None, overrides: Sequence[str] = (), quiet: bool = True
) -> Run:
    """Measure what a run's scores predict; ``Run.verification`` has it beside the predictions.

    Each sequence is a unit of the ledger: interrupted at any moment, the same call goes on. Measured at the proximal
    optimum of the tracked weights in float64, with the run's λ and N, the fit's sequences standing for the training
    set.

    Args:
        run: as of ``calibrate``.
        options: what is measured.
        overrides: as of ``calibrate``.
        quiet: no progress on the terminal.

    Raises:
        MissingStageError: the run has no factors, or no scores.
        UserError: nothing can be measured of such a run; every dose was below the noise of the search.
    """
    chosen = options or VerifyOptions()
    _check(chosen)
    folder, keep = _place(run)
    with prepare.fitted(folder, overrides, quiet) as (base, model):
        ctx = base
        try:
            verifying.check(base)
            if chosen.products:
                calibrating.check(base, "verify (--products 0 does without)")
                ctx = calibrating.solver_context(base, chosen.products)
            _measure(ctx, _asked(base, model, chosen.queries), Run(folder, keep), chosen)
        finally:
            ctx.close()
    found = Run(folder, keep)
    measured = found.verification()
    _write(found, measured)
    if len(measured) and not measured["resolved"].any():
        raise UserError(
            f"{folder}: a dose of {chosen.dose:g} copies is below what the search can resolve (noise "
            f"{measured['noise'].median():.1e} nats per copy); set --dose higher"
            + (", or --iterations" if chosen.iterations < VerifyOptions.iterations else "")
        )
    return found


def _write(run: Run, measured: pd.DataFrame) -> None:
    """The table as a file, and on the page where there is one."""
    shown = measured.map(lambda x: plain(x) if isinstance(x, str) else x)
    run.store.files.put(TABLE, shown.to_csv(index=False).encode())
    if run.store.files.exists("report/index.html"):
        api.write_page(run)


def _measure(ctx: Context, asked: Sequence[Query], run: Run, chosen: VerifyOptions) -> None:
    ids = [item.id for item in asked]
    rows, top, random = _chosen_rows(run, ids, chosen)
    doses = Doses(chosen.dose, chosen.factor, chosen.whole)
    job = verifying.measuring(ctx, asked, doses, run.train_size, chosen.sequences, chosen.iterations)
    name = calibrating.lever_name(ctx, asked) if chosen.products else None
    ctx.folder.commit(
        VERIFIED,
        ASKED,
        name=job.name,
        leverage=name,
        queries=ids,
        rows=rows.tolist(),
        top={query: own.tolist() for query, own in top.items()},
        random=random.tolist(),
        predicted=(_raw(run, ids, rows) / run.train_size).tolist(),
        doses={"size": doses.size, "factor": doses.factor, "whole": doses.whole},
        train_size=run.train_size,
        sequences=len(job.rows),
    )
    if chosen.products:
        calibrating.leverages(ctx, asked, rows)
    verifying.run(ctx, job, rows)


def _chosen_rows(
    run: Run, ids: Sequence[str], chosen: VerifyOptions
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Corpus rows to measure, ascending; of each query its own top; the random ones."""
    place = {name: row for row, name in enumerate(run.sequences["sequence"])}
    best = {query: run.top(query, chosen.top)["sequence"].tolist() if chosen.top else [] for query in ids}
    top = {query: np.array([place[name] for name in names], np.int64) for query, names in best.items()}
    tops = np.unique(np.concatenate(list(top.values())))
    random = np.sort(_draw(np.setdiff1d(run.rows, tops), chosen.random, chosen.seed))
    return np.union1d(tops, random), top, random


def _raw(run: Run, ids: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """The run's scores of corpus rows [Q, n], not divided by N; NaN where there is none."""
    places = np.searchsorted(run.rows, rows)
    scores = run.scores().sel(query=list(ids)).isel(sequence=places).to_numpy().astype(np.float64)
    return scores * (run.train_size if run.unit == "nats" else 1)


def _sample(scores: np.ndarray, complete: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Places of the sequences to calibrate on, ascending: half of them the best of the queries in turn, the rest drawn.

    The best are what people look at. EK-FAC's size is another on them than on any two texts; chosen by prediction
    alone, they leave the slope of the rest of the world on predictions what it is.
    """
    order = complete[np.argsort(-scores[:, complete], axis=1, kind="stable")]
    # The first of each query, then the second of each: without those that came before.
    turns = order.T.reshape(-1)
    _, first = np.unique(turns, return_index=True)
    best = turns[np.sort(first)][: count // 2]
    return np.sort(np.concatenate([best, _draw(np.setdiff1d(complete, best), count - len(best), seed)]))


def _draw(values: np.ndarray, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(values, min(count, len(values)), replace=False)


def _asked(ctx: Context, model: prepare.Model, count: int) -> list[Query]:
    """The first queries of the run that have scores.

    Raises:
        MissingStageError: none is solved, or none is scored.
    """
    solved = query.solved_queries(ctx)
    scored = {name for manifest in ctx.folder.units(SCORE).values() for name in manifest.meta["queries"]}
    entries = [entry for entry in known.records(ctx.folder) if entry["id"] in solved]
    for stage, there in (("query", entries), ("score", [entry for entry in entries if entry["id"] in scored])):
        if not there:
            raise MissingStageError(f"{ctx.folder.path}: the {stage} stage left nothing there; run `raylux run CONFIG`")
    records = [{**entry["record"], "id": entry["id"]} for entry in entries if entry["id"] in scored][:count]
    return model.parsed(records)


def _place(run: str | Run) -> tuple[str, object]:
    """Folder, and what keeps it."""
    return (run.folder, run) if isinstance(run, Run) else (str(run), None)


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"--{name} {value}: at least 1")


def _check(chosen: VerifyOptions) -> None:
    sequences = 1 if chosen.sequences is None else chosen.sequences
    _at_least_one(queries=chosen.queries, iterations=chosen.iterations, sequences=sequences)
    if chosen.top < 0 or chosen.random < 0 or chosen.top + chosen.random == 0:
        raise UserError(f"--top {chosen.top} --random {chosen.random}: at least one sequence is to be measured")
    if chosen.products < 0:
        raise UserError(f"--products {chosen.products}: 0, or more")
    if not 0 < chosen.dose < float("inf") or not 1 < chosen.factor < float("inf"):
        raise UserError(f"--dose {chosen.dose:g} --factor {chosen.factor:g}: a dose is above 0, its factor above 1")
