"""Score: all queries against the union of the candidates, a unit of the corpus at a time; then tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from raylux.engine.context import Context
from raylux.engine.quarantine import lost_pairs
from raylux.engine.stages import precision, prefilter, squares, two_stage
from raylux.engine.stages.pairs import ScoreJob, loaded_queries, missing_jobs
from raylux.engine.stages.query import answerable
from raylux.engine.stages.units import keepers_of, settle
from raylux.engine.work import Job, results
from raylux.ledger import SCORE, TOKENS
from raylux.store import best_rows


def run(ctx: Context) -> None:
    """Compute and commit the scores that are missing, then the per-token scores of the best."""
    if two_stage.wanted(ctx):
        two_stage.run(ctx, _score)
    jobs = missing_jobs(ctx, keepers_of(ctx))
    if jobs and not _score(ctx, jobs):
        # What failed among the sequences that a worker keeps is tried in smaller company before it is given up.
        _score(ctx, missing_jobs(ctx))
    _tokens(ctx)
    squares.run(ctx)


def missing(ctx: Context) -> bool:
    """Whether scores are still to be computed."""
    return bool(missing_jobs(ctx)) or two_stage.missing(ctx)


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
    return ctx.backend.share(loaded_queries(ctx, wanted, precision.resolve(ctx)))


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
