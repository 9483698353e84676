"""Query: s_test = (G + λI)⁻¹ ∇f of each query, compressed within a measured error, stored per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raylux.batches import TokenRow
from raylux.engine.context import Context
from raylux.engine.plan import choose_fit_rows, query_block
from raylux.engine.records import COVARIANCE, MOMENTS, QUERY, factor_files
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
    ranks, errors = _choose(ctx, len(queries), limits)
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


def _choose(ctx: Context, count: int, limits: dict[str, int]) -> tuple[list[dict[str, int]], list[float]]:
    """Ranks of each query of the block that the shards hold, and the error measured on the probes."""
    if not any(limits.values()):
        return [{} for _ in range(count)], [0.0] * count
    # The probes depend on the corpus alone, so a query's ranks do not depend on other queries.
    rows = choose_fit_rows(ctx.ids, ctx.config.query.probes, -1)
    jobs = ((int(row), (int(row), ctx.assignment)) for row in rows)
    measured: list[dict[str, list[tuple[float, np.ndarray | None]]]] = []
    for _, _, parts in ctx.backend.map("probe", jobs, parts=True, ordered=True):
        layers: dict[str, Any] = {}
        for answer in ctx.backend.shard_calls("measure", [(part,) for part in parts]):
            layers |= answer
        measured.append(layers)
    ranks, errors = [], []
    for place in range(count):
        dense = {name: np.array([probe[name][place][0] for probe in measured]) for name in limits}
        components = {
            name: np.stack([probe[name][place][1] for probe in measured])  # type: ignore[misc]
            for name, limit in limits.items()
            if limit
        }
        chosen, error = choose_ranks(components, dense, ctx.config.query.max_error)
        ranks.append(chosen)
        errors.append(error)
    return ranks, errors
