"""Query: s_test = (G + λI)⁻¹ ∇f of each query, compressed within a measured error, stored per layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from raylux.batches import TokenRow, query_shape
from raylux.cost.contraction import captured_width
from raylux.cost.sizes import covariance_bytes, rank_limit, solve_block
from raylux.engine.carrying import Later, prints
from raylux.engine.context import Context
from raylux.engine.numerics import Numerics, distinct
from raylux.engine.plan import choose_fit_rows, probe_count, query_block
from raylux.engine.quarantine import give_up, given_up
from raylux.engine.querying import Measured
from raylux.engine.records import Contraction
from raylux.engine.solve import Form
from raylux.engine.stages import carrying, jointly, precision, prefilter, solving
from raylux.engine.stages.fit import fitted
from raylux.engine.work import Job, ShardLostError, every_shard, ids_at, results
from raylux.engine.worker import QuerySpec
from raylux.errors import RayluxError
from raylux.influence.lowrank import choose_ranks
from raylux.layers import matrices
from raylux.ledger import PROBE, QUERY
from raylux.queries import Query

# Times that a block is begun again because a factor shard died in it.
_ATTEMPTS = 20


def run(ctx: Context) -> None:
    """Solve for every query that has no s_test yet, a block at a time."""
    if ctx.config.query.later:
        carrying.check_same(ctx)
    out = solved_queries(ctx) | set(given_up(ctx.folder, QUERY))
    todo = [query for query in ctx.queries if query.id not in out]
    if not todo:
        return
    if ctx.plan.query_tokens:
        todo.sort(key=lambda query: _shapes(ctx, query))  # those that fill a batch together
    solving.tidy(ctx)
    size = _block_size(ctx, todo)
    later = carrying.find(ctx.config, ctx.coverage.tracked, todo)
    with ctx.reporter.task("query", len(todo), "queries") as task:
        for start in range(0, len(todo), size):
            block = todo[start : start + size]
            checked = _is_checked(start // size, precision.resolve(ctx))
            last = start + size >= len(todo)
            _solve(ctx, ctx.folder.unused(QUERY, "b"), block, checked, later, last)
            task.advance(len(block))


def _block_size(ctx: Context, queries: Sequence[Query]) -> int:
    """Queries of a block."""
    layers = matrices(ctx.coverage.tracked)
    if _iterative(ctx):
        return solve_block(layers, ctx.itemsize)
    if ctx.kind.joint or any(_rank_limits(ctx).values()):
        return query_block(layers, ctx.itemsize)
    tokens = sum(len(part.tokens) for query in queries for part in query.parts) / len(queries)
    width = sum(captured_width(layer, ctx.groups) for layer in layers)
    waiting = tokens * width * precision.resolve(ctx).torch_dtype.itemsize
    bases = covariance_bytes(layers, ctx.groups, ctx.itemsize, ctx.config.curvature.blocks) if ctx.kind.basis else 0
    return query_block(layers, ctx.itemsize, waiting, bases)


def _is_checked(place: int, contraction: Contraction) -> bool:
    """Whether a block measures what rounding does to scores: the first, second, fourth … of a command.

    Scores in full precision cost as much as solving some queries.
    """
    return contraction.dtype == "bfloat16" and place & (place + 1) == 0


def solved_queries(ctx: Context) -> set[str]:
    """Ids of the queries that have their s_test."""
    return {query for manifest in ctx.folder.units(QUERY).values() for query in manifest.meta["queries"]}


def answerable(ctx: Context) -> list[Query]:
    """The queries asked for, but for those that were given up."""
    out = given_up(ctx.folder, QUERY)
    return [query for query in ctx.queries if query.id not in out]


def _solve(
    ctx: Context, name: str, queries: Sequence[Query], checked: bool, later: Sequence[Later], last: bool
) -> None:
    """A block, from its start again where a shard died: what a shard holds of a block lives in it alone.

    ``checked``: it measures what rounding does to scores. ``later``: the runs that its queries are carried from.
    ``last``: none follows.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _block(ctx, name, queries, checked, later, last)
            return
        except ShardLostError as lost:
            if attempt == _ATTEMPTS:
                raise RayluxError(
                    f"query block {name}: {lost}, for the {attempt}th time; give the shards more memory "
                    "(more engine.shards), and run the same command again"
                ) from None
            ctx.reporter.event("repeated", units=len(queries), unit=name)
            ctx.reporter.say(f"query: {lost}; its block of {len(queries)} queries begins again")


@dataclass(frozen=True)
class _Gradients:
    """What the workers say of a block: its queries and their heads; of each call handles of parts, and numerics."""

    queries: list[Query]
    heads: list[Mapping[str, Any]]
    parts: list[Sequence[Any]]
    numerics: list[Numerics]


def _gradients(ctx: Context, queries: Sequence[Query]) -> _Gradients:
    found = _Gradients([], [], [], [])
    # What is only rotated in bf16 products may travel, and wait for its block, in bf16.
    whole = ctx.kind.joint or ctx.kind.projected
    rounds = not _iterative(ctx) and not whole and not any(_rank_limits(ctx).values())
    how = precision.resolve(ctx) if rounds else None
    # What failed in company is run again by itself: only that which ends its worker there is given up.
    again = _run(ctx, _together(ctx, queries), how, found)
    _run(ctx, [(query,) for query in again], how, found)
    return found


def _run(ctx: Context, groups: Sequence[Sequence[Query]], how: Contraction | None, found: _Gradients) -> list[Query]:
    """Add the gradients of queries, those of a group run by one call; returns those that failed in company."""
    again: list[Query] = []
    jobs = (
        Job(", ".join(query.id for query in group), ([spec_of(query) for query in group], ctx.assignment, how), group)
        for group in groups
    )
    for result in results(ctx.backend, "query_gradients", jobs, parts=True, ordered=True):
        group: Sequence[Query] = result.job.item
        if result.failure is not None and len(group) > 1:
            again += group
        elif result.failure is not None:
            give_up(ctx.folder, QUERY, group[0].id, [group[0].id], result.failure)
            ctx.reporter.say(f"query: '{group[0].id}' is quarantined ({result.failure.reason})")
        else:
            found.queries.extend(group)
            found.heads.extend(result.value)
            found.parts.append(result.parts)
            found.numerics.append(dict(result.numerics))
    return again


def _shapes(ctx: Context, query: Query) -> list[tuple[int, int]]:
    """Rows and padded length of the batch that each part runs in."""
    return [query_shape(len(part.tokens), ctx.plan.query_tokens, ctx.plan.longest) for part in query.parts]


def _together(ctx: Context, queries: Sequence[Query]) -> list[list[Query]]:
    """Runs of queries whose parts fill batches of the same shapes."""
    groups: list[list[Query]] = []
    for shapes, run in groupby(queries, lambda query: _shapes(ctx, query)):
        own = list(run)
        # A joint kind takes its queries one by one.
        size = 1 if ctx.kind.joint else max(1, min(rows // count for (rows, _), count in Counter(shapes).items()))
        groups += [own[start : start + size] for start in range(0, len(own), size)]
    return groups


def _form(ctx: Context) -> Form:
    """How this run's queries are solved, by its plan."""
    return Form(precision.resolve(ctx).torch_dtype, ctx.plan.query_basis == "eigen", ctx.plan.query_tokens > 0)


def _block(
    ctx: Context, name: str, queries: Sequence[Query], checked: bool, later: Sequence[Later], last: bool
) -> None:
    backend = ctx.backend
    gradients = _gradients(ctx, queries)
    if not gradients.queries:
        return
    limits = _rank_limits(ctx)
    damping: dict[str, float] = {}
    iterative = _iterative(ctx)
    ids = [query.id for query in gradients.queries]
    carried = [run.of(ids) for run in later]
    solution = solving.solve(ctx, name, ids, gradients.parts) if iterative else None
    passing: list[str] = []
    if ctx.kind.joint and not iterative:
        solution, passing = jointly.solve(ctx, name, gradients.parts, carried)
    handles = [[parts[shard] for parts in gradients.parts] for shard in range(backend.shards)]
    how = fitted(ctx), limits, _form(ctx), name, None if solution is None else solution.keys, checked, carried
    squares: dict[str, list[float]] = {}
    pairs = []
    for part, own, taken in every_shard(backend, "solve", [(*how, *own) for own in handles]):
        damping |= part
        squares |= own
        pairs.append(taken)
    # In the order of the layers: the sum's last bits are not to say how they were shared out.
    norms = np.sum([squares[layer.name] for layer in ctx.coverage.tracked], 0)
    rounding = {"rounding": precision.check(ctx, np.sum(pairs, 0))} if checked else {}
    heads = [{**head, "norm": float(norm)} for head, norm in zip(gradients.heads, np.sqrt(norms), strict=True)]
    ranks, errors = _choose(ctx, gradients.queries, limits)
    keys: dict[str, str] = {}
    objects: dict[str, tuple[int, str]] = {}
    numerics = [*gradients.numerics, *(solution.numerics if solution else [])]
    for layer_keys, written, tag in every_shard(backend, "write_block", [(name, ranks, last)] * backend.shards):
        keys |= layer_keys
        objects |= written
        numerics.append(tag)
    ctx.folder.commit(
        QUERY,
        name,
        objects,
        queries=ids,
        layers=keys,
        damping=damping,
        heads=heads,
        ranks=ranks,
        errors=errors,
        numerics=distinct(numerics),
        **rounding,
        **({"solver": solution.facts} if solution and iterative else {}),
        **({"carried": prints(carried)} if carried else {}),
    )
    solving.forget(ctx, name)
    ctx.folder.delete(passing)


def _iterative(ctx: Context) -> bool:
    return ctx.config.curvature.solver != "direct"


def spec_of(query: Query) -> QuerySpec:
    """A query as a worker gets it."""
    rows = tuple(TokenRow(part.tokens, part.labels) for part in query.parts)
    return QuerySpec(rows, tuple(part.weight for part in query.parts))


def _rank_limits(ctx: Context) -> dict[str, int]:
    """Largest rank of each layer that still halves its memory; 0 where low rank is not wanted."""
    setting = ctx.config.query
    wanted = ctx.plan.low_rank and setting.max_error > 0
    limits = {}
    for layer in ctx.coverage.tracked:
        limits[layer.name] = rank_limit(setting.max_rank, layer) if wanted and not layer.words else 0
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
    # Features share no tokens: no sequence is nearer to a query than another before it is scored.
    own = 0 if ctx.files.task == "module" else min(16, probes // 4)
    near = prefilter.find(ctx, queries, "idf", own) if own else [(np.zeros(0, np.int64),)] * len(queries)
    asked = [_Probe(int(row), everyone, shared=True) for row in choose_fit_rows(ctx.ids, probes - own, -1)]
    asked += [_Probe(int(row), (place,), shared=False) for place in everyone for row in near[place][0]]
    measured = _measure(ctx, asked)
    ranks, errors = [], []
    for place in everyone:
        mine = [layers for probe, layers in measured if place in probe.places]
        dense = {name: np.array([layers[name][place][0] for layers in mine]) for name in limits}
        components = {
            name: np.stack([np.asarray(layers[name][place][1]) for layers in mine])
            for name, limit in limits.items()
            if limit
        }
        split = sum(probe.shared for probe, _ in measured)
        chosen, error = choose_ranks(components, dense, ctx.config.query.max_error, split=split)
        ranks.append(chosen)
        errors.append(error)
    return ranks, errors


@dataclass(frozen=True)
class _Probe:
    """A corpus row on which queries are scored (their places in the block); ``shared``: it serves all of them."""

    row: int
    places: Sequence[int]
    shared: bool

    @property
    def name(self) -> str:
        return f"probe {self.row}"


def _measure(ctx: Context, asked: Sequence[_Probe]) -> list[tuple[_Probe, dict[str, Measured]]]:
    """Scores of the shards' block on the probes: layer -> place -> scores. One that was given up is left out.

    Raises:
        RayluxError: none that serves all queries is left.
    """
    out = set(given_up(ctx.folder, PROBE))
    jobs = (Job(probe.name, (probe.row, ctx.assignment), probe) for probe in asked if probe.name not in out)
    measured = []
    # Closed at once where a shard dies: the block begins again with other work on the same workers.
    with closing(results(ctx.backend, "probe", jobs, parts=True, ordered=True)) as done:
        for result in done:
            probe: _Probe = result.job.item
            if result.failure is not None:
                out.add(probe.name)
                give_up(ctx.folder, PROBE, probe.name, ids_at(ctx.ids, [probe.row]), result.failure)
                ctx.reporter.say(f"query: {probe.name} is quarantined ({result.failure.reason})")
                continue
            layers: dict[str, Measured] = {}
            calls = [(part, list(probe.places)) for part in result.parts]
            for answer in every_shard(ctx.backend, "measure", calls):
                layers |= answer
            measured.append((probe, layers))
    if not any(probe.shared for probe, _ in measured):
        raise RayluxError(
            f"{ctx.folder.path}: every probe ended its worker, so compression cannot be measured; "
            "set query.max_error=0 to do without, or give workers more memory"
        )
    return measured
