"""Query: s_test = (G + λI)⁻¹ ∇f of each query, compressed within a measured error, stored per layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raylux.batches import TokenRow
from raylux.engine.context import Context
from raylux.engine.plan import choose_fit_rows, probe_count, query_block
from raylux.engine.records import COVARIANCE, MOMENTS, QUERY, factor_files
from raylux.engine.shard import Measured
from raylux.engine.stages import prefilter
from raylux.engine.stages.fit import rows_per_sequence
from raylux.engine.worker import QuerySpec
from raylux.influence.lowrank import choose_ranks
from raylux.queries import Query


def run(ctx: Context) -> None:
    """Solve for every query that has no s_test yet, a block at a time."""
    solved = solved_queries(ctx)
    todo = [query for query in ctx.queries if query.id not in solved]
    if not todo:
        return
    size = query_block(ctx.coverage.tracked, ctx.itemsize)
    number = len(ctx.folder.committed(QUERY))
    with ctx.reporter.task("query", len(todo), "queries") as task:
        for start in range(0, len(todo), size):
            block = todo[start : start + size]
            _block(ctx, f"b{number:05d}", block)
            number += 1
            task.advance(len(block))


def solved_queries(ctx: Context) -> set[str]:
    """Ids of the queries that have their s_test."""
    return {query for manifest in ctx.folder.units(QUERY).values() for query in manifest.meta["queries"]}


def _block(ctx: Context, name: str, queries: Sequence[Query]) -> None:
    backend = ctx.backend
    jobs = ((query.id, (_spec(query), ctx.assignment)) for query in queries)
    heads, parts = [], []
    for _, head, handles in backend.map("query_gradient", jobs, parts=True, ordered=True):
        heads.append(head)
        parts.append(handles)
    limits = _rank_limits(ctx)
    files = factor_files(ctx.folder)
    moments = {unit: manifest.meta["key"] for unit, manifest in ctx.folder.units(MOMENTS).items()}
    tokens = rows_per_sequence(ctx.folder.units(COVARIANCE))
    damping: dict[str, float] = {}
    for part in backend.shard_calls(
        "solve",
        [(files, moments, tokens, limits, *(handles[shard] for handles in parts)) for shard in range(backend.shards)],
    ):
        damping |= part
    ranks, errors = _choose(ctx, queries, limits)
    keys: dict[str, str] = {}
    objects: dict[str, tuple[int, str]] = {}
    for layer_keys, written in backend.shard_calls("write_block", [(name, ranks)] * backend.shards):
        keys |= layer_keys
        objects |= written
    ctx.folder.commit(
        QUERY,
        name,
        objects,
        queries=[query.id for query in queries],
        layers=keys,
        damping=damping,
        heads=heads,
        ranks=ranks,
        errors=errors,
        numerics=backend.everyone("facts")[0],
    )


def _spec(query: Query) -> QuerySpec:
    rows = tuple(TokenRow(part.tokens, part.labels) for part in query.parts)
    return QuerySpec(rows, tuple(part.weight for part in query.parts))


def _rank_limits(ctx: Context) -> dict[str, int]:
    """Largest rank of each layer that still halves its memory; 0 where low rank is not wanted."""
    setting = ctx.config.query
    limits = {}
    for layer in ctx.coverage.tracked:
        halves = layer.parameters // (2 * (layer.outputs + layer.inputs))
        limits[layer.name] = min(setting.max_rank, halves) if setting.max_error > 0 else 0
    return limits


def _choose(ctx: Context, queries: Sequence[Query], limits: dict[str, int]) -> tuple[list[dict[str, int]], list[float]]:
    """Ranks of each query of the block that the shards hold, and the error measured on the probes.

    The probes are some sequences of the corpus, the same for every query, and for each query those that share
    most with it: its largest scores are where compression errs in other directions. The bound is to hold on
    both. They depend on the corpus and the query alone, so a query's ranks do not depend on other queries.
    """
    everyone = range(len(queries))
    if not any(limits.values()):
        return [{} for _ in everyone], [0.0 for _ in everyone]
    probes = probe_count(ctx.config.query.probes, ctx.coverage.parameters)
    own = min(16, probes // 4)
    near = prefilter.find(ctx, queries, "idf", own) if own else [(np.zeros(0, np.int64),)] * len(queries)
    shared = choose_fit_rows(ctx.ids, probes - own, -1)
    asked: list[tuple[int, Sequence[int]]] = [(int(row), everyone) for row in shared]
    asked += [(int(row), (place,)) for place in everyone for row in near[place][0]]
    measured = _measure(ctx, asked)
    ranks, errors = [], []
    for place in everyone:
        mine = [probe for probe, (_, places) in zip(measured, asked, strict=True) if place in places]
        dense = {name: np.array([probe[name][place][0] for probe in mine]) for name in limits}
        components = {
            name: np.stack([np.asarray(probe[name][place][1]) for probe in mine])
            for name, limit in limits.items()
            if limit
        }
        chosen, error = choose_ranks(components, dense, ctx.config.query.max_error, split=len(shared))
        ranks.append(chosen)
        errors.append(error)
    return ranks, errors


def _measure(ctx: Context, asked: Sequence[tuple[int, Sequence[int]]]) -> list[dict[str, Measured]]:
    """Scores of the shards' block on each probe (corpus row, places of the queries): layer -> place -> scores."""
    jobs = ((row, (row, ctx.assignment)) for row, _ in asked)
    measured = []
    probes = ctx.backend.map("probe", jobs, parts=True, ordered=True)
    for (_, places), (_, _, parts) in zip(asked, probes, strict=True):
        layers: dict[str, Measured] = {}
        for answer in ctx.backend.shard_calls("measure", [(part, list(places)) for part in parts]):
            layers |= answer
        measured.append(layers)
    return measured
