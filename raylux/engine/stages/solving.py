"""Iterative solves of a block of queries: passes of products over the fitted sequences, a commit after each.

A pass sums G times each query's direction over units, like the passes of the fit and with their machinery, so that its
bits depend neither on workers nor on their order; then the shards take a step, write where they stand, and the commit
makes that the place from which an interrupted solve goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylux.curvature.solvers import SOLVERS, LayerSolve, Rule, Solver, Trace, added, added_pairs
from raylux.engine.context import Context
from raylux.engine.numerics import Numerics, distinct
from raylux.engine.pace import Pace
from raylux.engine.plan import fit_units
from raylux.engine.progress import Untold
from raylux.engine.quarantine import given_up
from raylux.engine.records import Directions
from raylux.engine.stages.fit import fitted
from raylux.engine.stages.layers import FitUnits
from raylux.engine.sums import SumPass, Units
from raylux.engine.work import ShardLostError, every_shard, ids_at
from raylux.errors import RayluxError, UserError
from raylux.ledger import COVARIANCE, MOMENTS, PRODUCT, QUERY, SOLVE


@dataclass(frozen=True)
class Solution:
    """A block that is solved.

    Attributes:
        keys: layer -> key of the state that holds ``x`` [Q, P, M].
        facts: what the block's manifest says of the solve.
        numerics: under which it was computed.
    """

    keys: dict[str, str]
    facts: dict[str, Any]
    numerics: list[Numerics]


@dataclass(frozen=True)
class _State:
    """Where a block stands: as the ledger has it."""

    rule: Rule
    trace: Trace
    keys: dict[str, str]
    numerics: list[Numerics]


def solve(ctx: Context, block: str, ids: Sequence[str], parts: Sequence[Sequence[Any]]) -> Solution:
    """Solve a block of queries, or what is left of it.

    Args:
        ctx: the run.
        block: its name.
        ids: of its queries.
        parts: per query a handle per shard of its a and g.

    Raises:
        UserError: the iteration diverges, or the matrix is not positive definite.
        ShardLostError: a shard died; the solve goes on from its last commit when this is called again.
    """
    try:
        while True:
            out = set(given_up(ctx.folder, PRODUCT))
            state = _load(ctx, block, ids) or _begin(ctx, block, ids, parts)
            while state.trace.active:
                state = _step(ctx, block, ids, state, frozenset(out))
                if state.rule.solver.krylov and set(given_up(ctx.folder, PRODUCT)) != out:
                    break
            else:
                break
            # Without the unit that was given up G is another matrix: from the start again.
            forget(ctx, block)
    except UserError:
        # So that another setting may be tried: nothing of this one is worth keeping.
        forget(ctx, block)
        raise
    every_shard(ctx.backend, "end_solve", [()] * ctx.backend.shards)
    _say(ctx, block, state)
    return Solution(state.keys, _facts(state), state.numerics)


def forget(ctx: Context, block: str) -> None:
    """Remove the state of a block that is done, or given up."""
    if block in ctx.folder.committed(SOLVE):
        objects = ctx.folder.manifest(SOLVE, block).objects
        ctx.folder.forget(SOLVE, block)
        ctx.folder.delete(list(objects))


def tidy(ctx: Context) -> None:
    """Remove the states of blocks that are committed: a command ended between the two."""
    for block in ctx.folder.committed(SOLVE) & ctx.folder.committed(QUERY):
        forget(ctx, block)


def _begin(ctx: Context, block: str, ids: Sequence[str], parts: Sequence[Sequence[Any]]) -> _State:
    backend, how = ctx.backend, (ctx.config.curvature.solver, fitted(ctx))
    handles = [[own[shard] for own in parts] for shard in range(backend.shards)]
    sums, traces, dampings = [], [], []
    for layers, trace, damping in every_shard(backend, "begin_solve", [(*how, *own) for own in handles]):
        sums += layers
        traces.append(trace)
        dampings.append(damping)
    pairs = added_pairs(sums)
    rule = Rule.of(ctx.config.curvature, math.fsum(traces) + max(dampings))
    norms, inner = [math.sqrt(pairs[place][0]) for place in pairs], [pairs[place][1] for place in pairs]
    start = Trace.begin(rule, norms, inner)
    saved = every_shard(backend, "save_solve", [(block,)] * backend.shards)
    return _commit(ctx, block, ids, rule, start, saved, [])


def _load(ctx: Context, block: str, ids: Sequence[str]) -> _State | None:
    """The committed state, in the shards' hands again; None where there is none of these queries."""
    if block not in ctx.folder.committed(SOLVE):
        return None
    meta = ctx.folder.manifest(SOLVE, block).meta
    if meta["queries"] != list(ids):
        forget(ctx, block)
        return None
    rule = Rule(SOLVERS[meta["solver"]], meta["iterations"], meta["tolerance"], meta["step"])
    state = _State(rule, Trace.load(meta["trace"]), meta["keys"], meta["numerics"])
    if state.trace.iteration:
        ctx.reporter.say(f"query: block {block} goes on after {state.trace.iteration} products")
    call = ctx.config.curvature.solver, fitted(ctx), state.keys
    every_shard(ctx.backend, "load_solve", [call] * ctx.backend.shards)
    return state


def _commit(
    ctx: Context,
    block: str,
    ids: Sequence[str],
    rule: Rule,
    trace: Trace,
    saved: Sequence[tuple[dict[str, str], dict[str, tuple[int, str]], Numerics]],
    numerics: Sequence[Numerics],
) -> _State:
    keys: dict[str, str] = {}
    objects: dict[str, tuple[int, str]] = {}
    tags = list(numerics)
    for more_keys, more_objects, tag in saved:
        keys |= more_keys
        objects |= more_objects
        tags.append(tag)
    before = ctx.folder.manifest(SOLVE, block).objects if block in ctx.folder.committed(SOLVE) else {}
    ctx.folder.commit(
        SOLVE,
        block,
        objects,
        queries=list(ids),
        keys=keys,
        trace=trace.dump(),
        solver=rule.solver.name,
        iterations=rule.iterations,
        tolerance=rule.tolerance,
        step=rule.step,
        numerics=distinct(tags),
    )
    ctx.folder.delete(list(before))
    return _State(rule, trace, keys, distinct(tags))


def _step(ctx: Context, block: str, ids: Sequence[str], state: _State, out: frozenset[str]) -> _State:
    """One product with every query that goes on, and the step that follows from it."""
    rule, trace, backend = state.rule, Trace.load(state.trace.dump()), ctx.backend
    directions = Directions(state.keys, LayerSolve.direction(rule.solver), tuple(trace.active))
    units = _units(ctx, rule.solver, trace.iteration, directions, out)
    done = SumPass(backend, ctx.folder, units, Pace(math.inf, 0), ctx.reporter).run(Untold(PRODUCT))
    layers = [layer.name for layer in ctx.coverage.tracked]
    if any(name not in done.written for name in layers):
        raise ShardLostError("take_products: a factor shard began anew")
    counts = [done.written[name][2] for name in layers]
    if not counts[0]["sequences"]:
        raise RayluxError(
            f"{ctx.folder.path}: every unit of products is quarantined, nothing is left to solve with; "
            "`raylux inspect` lists the reasons"
        )
    steps = trace.steps(rule, added([count["energies"] for count in counts]))
    sums = [layer for found in every_shard(backend, "advance", [(steps,)] * backend.shards) for layer in found]
    turns = trace.turns(rule, added_pairs(sums))
    saved = every_shard(backend, "turn", [(turns, block)] * backend.shards)
    ctx.reporter.event(
        "solve",
        block=block,
        iteration=trace.iteration,
        residuals=[seen[-1] if seen else 0.0 for seen in trace.residuals],
    )
    return _commit(ctx, block, ids, rule, trace, saved, [*state.numerics, *done.numerics])


def _units(ctx: Context, solver: Solver, iteration: int, directions: Directions, out: frozenset[str]) -> Units:
    """The units of one pass: those of the fit, or of the sequences that are drawn for this iteration."""
    whole = FitUnits(ctx)
    lost = frozenset(given_up(ctx.folder, COVARIANCE, MOMENTS))
    rows, slices, names = whole.rows, whole.slices, whole.names
    if not solver.krylov:
        kept = [part for part, name in zip(slices, names, strict=True) if name not in lost]
        rows = np.concatenate([rows[part] for part in kept]) if kept else rows[:0]
        draw = np.random.default_rng([ctx.config.fit.seed, iteration])
        rows = rows[np.sort(draw.choice(len(rows), min(ctx.config.curvature.batch, len(rows)), replace=False))]
        slices = fit_units(ctx.reader.lengths[rows], ctx.plan.batch_tokens)
        names = [f"i{iteration:06d}.{place:03d}" for place in range(len(slices))]
    assignment, shared = ctx.assignment, ctx.backend.share(directions)
    return Units(
        PRODUCT,
        "product_unit",
        "take_products",
        names,
        lambda index: (rows[slices[index]], assignment, shared),
        lambda index: ids_at(ctx.ids, rows[slices[index]]),
        lost | out,
    )


def _facts(state: _State) -> dict[str, Any]:
    rule, trace = state.rule, state.trace
    return {
        "name": rule.solver.name,
        "tolerance": rule.tolerance,
        "iterations": rule.iterations,
        "step": None if rule.solver.krylov else rule.step,
        "residuals": trace.residuals,
        "slopes": trace.slopes,
    }


def _say(ctx: Context, block: str, state: _State) -> None:
    last = [seen[-1] for seen in state.trace.residuals if seen]
    if not last:
        return
    rule = state.rule
    short = sum(residual > rule.tolerance for residual in last)
    taken = f"{state.trace.iteration} product{'s' * (state.trace.iteration > 1)}"
    text = f"query: block {block}, {rule.solver.name}: residual at most {max(last):.1e} after {taken}"
    if short:
        text += f"; {short} of {len(last)} queries are above curvature.tolerance={rule.tolerance:g}"
    ctx.reporter.say(text)
