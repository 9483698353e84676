"""Score: all queries against the union of the candidates, a unit of the corpus at a time; then tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylux.engine.context import Context
from raylux.engine.quarantine import lost_pairs
from raylux.engine.records import SCORE, TOKENS, FactorFiles, factor_files, query_files
from raylux.engine.scorer import LoadedQueries
from raylux.engine.stages import precision, prefilter, squares
from raylux.engine.stages.query import answerable
from raylux.engine.stages.units import cut, keepers_of, settle
from raylux.engine.work import Job, results
from raylux.store import RunFolder, ScoreBlock, score_blocks


@dataclass(frozen=True)
class ScoreJob:
    """Rows of one unit and the queries that miss their scores; ``near``: the worker that may keep the rows."""

    name: str
    rows: np.ndarray
    queries: tuple[str, ...]
    near: int | None = None


def run(ctx: Context) -> None:
    """Compute and commit the scores that are missing, then the per-token scores of the best."""
    jobs = missing(ctx, keepers_of(ctx))
    if jobs and not _score(ctx, jobs):
        # What failed among the sequences that a worker keeps is tried in smaller company before it is given up.
        _score(ctx, missing(ctx))
    _tokens(ctx)
    squares.run(ctx)


def _score(ctx: Context, jobs: Sequence[ScoreJob]) -> bool:
    """Run jobs; whether there is nothing to be tried again."""
    through = True
    layers, norms = ctx.config.score.layers, ctx.kind.normalised
    loaded = _loaded(ctx, {query for job in jobs for query in job.queries})
    more = (layers, norms, loaded, *([squares.curvature(ctx)] if ctx.kind.projected else []))
    calls = (Job(job.name, (job.name, job.rows, job.queries, *more), job, job.near) for job in jobs)
    with ctx.reporter.task("score", sum(len(job.rows) for job in jobs), "sequences") as task:
        for result in results(ctx.backend, "score_unit", calls):
            job: ScoreJob = result.job.item
            about = {"queries": list(job.queries), "layers": layers}
            if settle(ctx, SCORE, result, job.rows, job.queries, about):
                task.advance(len(job.rows))
            else:
                through = False
    return through


def _loaded(ctx: Context, wanted: set[str]) -> Any:
    """A handle of the queries that workers are to hold, in the order in which they were asked."""
    ids = tuple(query.id for query in ctx.queries if query.id in wanted)
    basis = factor_files(ctx.folder) if ctx.plan.query_basis == "eigen" else FactorFiles()
    return ctx.backend.share(LoadedQueries(tuple(query_files(ctx.folder)), ids, precision.resolve(ctx), basis))


def missing(ctx: Context, keepers: np.ndarray | None = None) -> list[ScoreJob]:
    """The jobs that the present queries and candidates still need, in the order of their units.

    Within a unit the rows are parted by the set of queries that miss them, so each row runs once. Where queries stand
    apart the sets are as many as their candidates have ways to overlap: there a unit's rows stay together, so that
    batches are full, and are scored for all its queries.

    Args:
        ctx: the run.
        keepers: [N] the worker that keeps each corpus row, or −1: what one worker keeps is cut into units of its own.
    """
    wanted = [query.id for query in answerable(ctx)]
    rows = prefilter.union(ctx)
    units, near = cut(ctx, rows, keepers)
    blocks = [block for block in score_blocks(ctx.folder) if block.layers or not ctx.config.score.layers]
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
                text = f"{queries} {chosen.tolist()}"
                tail = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
                yield ScoreJob(f"u{unit:06d}-{tail}", chosen, queries, near.get(int(unit)))


def _tokens(ctx: Context) -> None:
    """Per-token scores of each query's ``score.token_top`` best sequences."""
    if not ctx.config.score.token_top:
        return
    queries = [query.id for query in answerable(ctx)]
    own = prefilter.own_rows(ctx) if ctx.apart else None
    best = best_rows(ctx.folder, queries, ctx.config.score.token_top, own)
    have: dict[str, set[int]] = {}
    for manifest in ctx.folder.units(TOKENS).values():
        have.setdefault(manifest.meta["query"], set()).update(manifest.meta["rows"])
    for lost in lost_pairs(ctx.folder, TOKENS):
        for query in lost.queries:
            have.setdefault(query, set()).update(lost.rows)
    jobs = []
    for query, (rows, _) in best.items():
        rows = np.array([row for row in rows if row not in have.get(query, ())], np.int64)
        name = hashlib.blake2b(f"{query} {rows.tolist()}".encode(), digest_size=8).hexdigest()
        if len(rows):
            jobs.append((query, name, rows))
    if not jobs:
        return
    loaded = _loaded(ctx, {query for query, _, _ in jobs})
    calls = (Job(name, (name, rows, query, loaded), (query, rows)) for query, name, rows in jobs)
    with ctx.reporter.task("tokens", len(jobs), "queries") as task:
        for result in results(ctx.backend, "token_unit", calls):
            query, rows = result.job.item
            settle(ctx, TOKENS, result, rows, [query], {"query": query})
            task.advance()


def best_rows(
    folder: RunFolder, queries: Sequence[str], count: int, own: Mapping[str, np.ndarray] | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Query -> (corpus rows, scores) of its ``count`` largest scores, best first, reading one block at a time.

    Args:
        folder: the run.
        queries: ids.
        count: at most.
        own: query -> the rows that count, ascending; default: all.
    """
    held: dict[str, tuple[np.ndarray, np.ndarray]] = {query: (np.zeros(0, np.int64), np.zeros(0)) for query in queries}
    for block in score_blocks(folder):
        if held.keys().isdisjoint(block.queries):
            continue
        total = folder.group(block.key).read("total")
        norms = _norms(folder, block)
        for place, query in enumerate(block.queries):
            if query in held:
                counted = slice(None) if own is None else np.isin(block.rows, own[query])
                rows = np.concatenate([held[query][0], block.rows[counted]])
                scores = np.concatenate([held[query][1], (total[place] / norms)[counted]])
                # A row may stand in two blocks, with the same bits.
                rows, first = np.unique(rows, return_index=True)
                keep = np.lexsort((rows, -scores[first]))[:count]
                held[query] = rows[keep], scores[first][keep]
    return held


def _norms(folder: RunFolder, block: ScoreBlock) -> np.ndarray | float:
    group = folder.group(block.key)
    return group.read("norms") if "norms" in group else 1.0


def token_rows(folder: RunFolder, query: str) -> dict[int, tuple[str, int]]:
    """Corpus row -> (key, place) of the committed per-token scores of a query."""
    return {
        int(row): (manifest.meta["key"], place)
        for manifest in folder.units(TOKENS).values()
        if manifest.meta["query"] == query
        for place, row in enumerate(manifest.meta["rows"])
    }
