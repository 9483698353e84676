"""Pairs of queries and corpus rows that have no score yet, cut into jobs, and the queries that workers hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raylux.cost.two_stage import unit_size
from raylux.engine.context import Context
from raylux.engine.quarantine import lost_pairs
from raylux.engine.records import Contraction, FactorFiles, factor_files, query_files
from raylux.engine.scorer import LoadedQueries
from raylux.engine.stages import prefilter
from raylux.engine.stages.query import answerable
from raylux.engine.stages.units import cut
from raylux.ledger import SCORE
from raylux.store import PILOT, score_blocks


@dataclass(frozen=True)
class ScoreJob:
    """Rows of one unit and the queries that miss their scores; ``near``: the worker that may keep the rows."""

    name: str
    rows: np.ndarray
    queries: tuple[str, ...]
    near: int | None = None

    def with_(self, other: ScoreJob) -> ScoreJob:
        """The rows of both, for the queries that both miss."""
        assert self.queries == other.queries
        rows = np.sort(np.concatenate([self.rows, other.rows]))
        return ScoreJob(f"m-{_digest(self.queries, rows)}", rows, self.queries)


def loaded_queries(ctx: Context, wanted: set[str], contraction: Contraction) -> LoadedQueries:
    """The queries that workers are to hold, in the order in which they were asked."""
    ids = tuple(query.id for query in ctx.queries if query.id in wanted)
    basis = factor_files(ctx.folder) if ctx.plan.query_basis == "eigen" else FactorFiles()
    return LoadedQueries(tuple(query_files(ctx.folder)), ids, contraction, basis)


def missing_jobs(ctx: Context, keepers: np.ndarray | None = None, waves: bool = False) -> list[ScoreJob]:
    """The jobs that the present queries and candidates still need, in the order of their units.

    Within a unit the rows are parted by the set of queries that miss them, so each row runs once. Where queries stand
    apart the sets are as many as their candidates have ways to overlap: there a unit's rows stay together, so that
    batches are full, and are scored for all its queries.

    Args:
        ctx: the run.
        keepers: [N] the worker that keeps each corpus row, or −1: what one worker keeps is cut into units of its own.
        waves: units are as small as those of two stages.
    """
    wanted = [query.id for query in answerable(ctx)]
    rows = prefilter.union(ctx)
    best = ctx.config.score.best
    size = None if best is None or not waves else unit_size(ctx.plan.score_unit_size, len(rows), best)
    units, near = cut(ctx, rows, keepers, size)
    blocks = [block for block in score_blocks(ctx.folder) if block.layers or not ctx.config.score.layers]
    if best is None:
        # Estimates are no scores; what was scored for its own sake is.
        blocks = [block for block in blocks if block.stage in ("", PILOT)]
    absent = np.ones((len(wanted), len(rows)), bool)
    lost = lost_pairs(ctx.folder, SCORE)
    for queries, known in [(x.queries, x.rows) for x in blocks] + [(x.queries, np.array(x.rows)) for x in lost]:
        places = [wanted.index(query) for query in queries if query in wanted]
        absent[np.ix_(np.array(places, np.int64), np.flatnonzero(np.isin(rows, known)))] = False
    if ctx.apart:
        own = prefilter.own_rows(ctx)
        for place, query in enumerate(wanted):
            absent[place] &= np.isin(rows, own[query], assume_unique=True)
    return list(_jobs(wanted, rows, absent, units, near, bool(ctx.apart)))


def _jobs(
    wanted: Sequence[str], rows: np.ndarray, absent: np.ndarray, units: np.ndarray, near: Mapping[int, int], whole: bool
) -> Iterator[ScoreJob]:
    for unit in np.unique(units[absent.any(0)]):
        here = np.flatnonzero(units == unit)
        parts = absent[:, here]
        if whole:
            parts = np.outer(parts.any(1), parts.any(0))
        patterns, which = np.unique(parts, axis=1, return_inverse=True)
        for index in range(patterns.shape[1]):
            queries = tuple(query for query, flag in zip(wanted, patterns[:, index], strict=True) if flag)
            if queries:
                chosen = rows[here[which.reshape(-1) == index]]
                yield ScoreJob(f"u{unit:06d}-{_digest(queries, chosen)}", chosen, queries, near.get(int(unit)))


def _digest(queries: tuple[str, ...], rows: np.ndarray) -> str:
    return hashlib.blake2b(f"{queries} {rows.tolist()}".encode(), digest_size=6).hexdigest()
