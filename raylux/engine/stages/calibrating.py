"""Better solves of some queries, or of some sequences, held against others: what a run's sizes are calibrated by.

A block of right-hand sides is solved by conjugate gradients, preconditioned by the run's own kind of curvature, as
``curvature.solver: pcg`` would, with few products; each solution is then multiplied with the gradients of probes. Both
queries and sequences can be either, since ∇fᵀ (G + λ)⁻¹ ∇log p may be solved from either side.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raylux.cost.sizes import solve_block
from raylux.curvature import check_end
from raylux.curvature.solvers import check_layers
from raylux.engine.context import Context
from raylux.engine.numerics import Numerics, distinct
from raylux.engine.records import Directions
from raylux.engine.stages import solving
from raylux.engine.stages.fit import fitted
from raylux.engine.stages.query import spec_of
from raylux.engine.work import Job, Result, ShardLostError, every_shard, results
from raylux.engine.worker import QuerySpec
from raylux.errors import RayluxError, UserError
from raylux.fingerprints import of_query
from raylux.ledger import CALIBRATION, FREEDOM, LEVERAGE, WHOLE, sequence_unit
from raylux.queries import Query

# Times that a block is begun again because a factor shard died in it.
_ATTEMPTS = 20


@dataclass(frozen=True)
class Probe:
    """A gradient that solutions are multiplied with: its sequence or query, and of which of them (None: all)."""

    spec: QuerySpec
    places: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Solved:
    """A block of R right-hand sides.

    Attributes:
        dots: [R, n] solutions times probes; NaN where that was not asked for.
        facts: of each: ``products`` with G that it took, ``residual`` ‖v − (G + λ)x‖/‖v‖, and ``slope``: the multiple
            of the direct solution that is nearest to the exact one in the norm of G + λ.
        keys: layer -> key of the state that holds the solutions as ``x``.
        numerics: under which all of it was computed.
    """

    dots: np.ndarray
    facts: list[dict[str, Any]]
    keys: dict[str, str]
    numerics: list[Numerics]


def check(ctx: Context, what: str) -> None:
    """Raises UserError where a run's scores have no size that better solves could tell; ``what``: the command."""
    config = ctx.config
    check_end(config.curvature.segment, bool(config.query.later), what)
    if not ctx.kind.predicts:
        raise UserError(
            f"{what}: curvature.kind={config.curvature.kind} predicts no change in nats, its scores have no size to "
            "be checked; take a run with a fitted kind, as ekfac"
        )
    if config.curvature.kind == "hessian":
        raise UserError(
            f"{what}: better solves are those of the Gauss-Newton matrix, and curvature.kind=hessian is another; "
            "take a run with curvature.kind=gauss_newton"
        )
    if config.fit.labels != "sampled":
        raise UserError(
            f"{what}: fit.labels={config.fit.labels} does not estimate the Gauss-Newton matrix that a better solve "
            "would use; take a run with fit.labels=sampled"
        )
    if config.model.dtype == "bfloat16":
        raise UserError(
            f"{what}: better solves need products of G in full precision; take a run with model.dtype=float32"
        )
    try:
        check_layers("pcg", ctx.coverage.tracked)
    except UserError:
        routed = next(layer.name for layer in ctx.coverage.tracked if layer.routed)
        raise UserError(
            f"{what}: '{routed}' belongs to an expert, and there are no products with G for experts; take a run "
            "whose model.layers leave them out"
        ) from None


def digest(*parts: Any) -> str:
    """A name for what a unit rests on."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()


def solver_context(ctx: Context, products: int) -> Context:
    """The same run, solving by so many products at most; nothing of it is written into run.yaml."""
    curvature = ctx.config.curvature.model_copy(update={"solver": "pcg", "iterations": products})
    return replace(ctx, config=ctx.config.model_copy(update={"curvature": curvature}))


def calibrate(ctx: Context, queries: Sequence[Query], rows: np.ndarray, direct: np.ndarray) -> None:
    """Solve the queries that are not solved so yet, and commit their scores on some sequences beside the run's own.

    Args:
        ctx: as ``solver_context`` gives it.
        queries: to calibrate by.
        rows: [n] corpus rows.
        direct: [Q, n] the run's scores, not divided by N.
    """
    setting = digest(ctx.config.curvature.iterations, rows.tolist())
    units = ctx.folder.units(CALIBRATION)
    done = {name for name, manifest in units.items() if manifest.meta["setting"] == setting}
    todo = [place for place, query in enumerate(queries) if query.id not in done]
    probes = [Probe(sequence_spec(ctx, row)) for row in rows]
    size = solve_block(ctx.coverage.tracked, ctx.itemsize)
    with ctx.reporter.task("calibrate", len(queries), "queries") as task:
        task.go_on(len(queries) - len(todo))
        for start in range(0, len(todo), size):
            places = todo[start : start + size]
            block = f"calibration-{setting}-{places[0]:04d}"
            found = solved(ctx, block, [(queries[at].id, spec_of(queries[at])) for at in places], probes)
            for index, place in enumerate(places):
                ctx.folder.commit(
                    CALIBRATION,
                    queries[place].id,
                    setting=setting,
                    rows=rows.tolist(),
                    direct=direct[place].tolist(),
                    solved=found.dots[index].tolist(),
                    numerics=found.numerics,
                    **found.facts[index],
                )
                task.advance()
            solving.forget(ctx, block)
    freedom: dict[str, float] = {}
    for part in every_shard(ctx.backend, "freedom", [(fitted(ctx),)] * ctx.backend.shards):
        freedom |= part
    names = [layer.name for layer in ctx.coverage.tracked]
    ctx.folder.commit(
        FREEDOM,
        WHOLE,
        setting=setting,
        queries=[query.id for query in queries],
        freedom={name: freedom[name] for name in names},
    )


def lever_name(ctx: Context, queries: Sequence[Query]) -> str:
    """What the names of the units of ``leverages`` begin with."""
    return digest(ctx.config.curvature.iterations, [of_query(query) for query in queries])


def leverages(ctx: Context, queries: Sequence[Query], rows: np.ndarray) -> None:
    """Solve sequences for x = (G + λ)⁻¹∇log p, and commit what tells how a whole copy of each differs from a part.

    Of each ``square`` ∇log pᵀx, ``energy`` xᵀ H x with the sequence's own Gauss-Newton matrix H, and its influence on
    each query; none is divided by N.
    """
    name = lever_name(ctx, queries)
    done = ctx.folder.committed(LEVERAGE)
    todo = [int(row) for row in rows if sequence_unit(name, row) not in done]
    size = solve_block(ctx.coverage.tracked, ctx.itemsize)
    asked = [Probe(spec_of(query)) for query in queries]
    with ctx.reporter.task("leverage", len(rows), "sequences") as task:
        task.go_on(len(rows) - len(todo))
        for start in range(0, len(todo), size):
            part = todo[start : start + size]
            specs = [sequence_spec(ctx, row) for row in part]
            own = [Probe(spec, (place,)) for place, spec in enumerate(specs)]
            block = f"leverage-{name}-{part[0]:08d}"
            named = [(str(row), spec) for row, spec in zip(part, specs, strict=True)]
            found = solved(ctx, block, named, [*asked, *own])
            energies, tag = _energies(ctx, part, found)
            for place, row in enumerate(part):
                ctx.folder.commit(
                    LEVERAGE,
                    sequence_unit(name, row),
                    row=row,
                    queries=[query.id for query in queries],
                    solved=found.dots[place, : len(queries)].tolist(),
                    square=float(found.dots[place, len(queries) + place]),
                    energy=energies[place],
                    numerics=distinct([*found.numerics, tag]),
                    **found.facts[place],
                )
                task.advance()
            solving.forget(ctx, block)


def _energies(ctx: Context, rows: Sequence[int], found: Solved) -> tuple[list[float], Numerics]:
    """xᵀHx of each sequence of a block and its own solution."""
    directions = Directions(found.keys, "x", tuple(range(len(rows))))
    job = Job(f"curvatures {rows[0]}", (np.asarray(rows, np.int64), directions))
    (result,) = results(ctx.backend, "own_curvatures", [job])
    if result.failure is not None:
        raise RayluxError(f"{job.name} ended its worker ({result.failure.reason})")
    return result.value, dict(result.numerics)


def sequence_spec(ctx: Context, row: int) -> QuerySpec:
    """A corpus row as a query whose measurement is its log p."""
    (sequence,) = ctx.reader.rows([int(row)])
    return QuerySpec((sequence,), (1.0,))


def solved(ctx: Context, block: str, asked: Sequence[tuple[str, QuerySpec]], probes: Sequence[Probe]) -> Solved:
    """Solve right-hand sides ∇f and multiply the solutions with the probes' gradients.

    The state of the solve stays in the ledger until ``solving.forget(ctx, block)``: an interrupted one goes on.

    Raises:
        UserError: the iteration diverges.
        RayluxError: a worker or shard dies of it again and again.
    """
    ids = [name for name, _ in asked]
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            found = list(_gradients(ctx, asked))
            solution = solving.solve(ctx, block, ids, [result.parts for result in found])
            every_shard(ctx.backend, "hold_solutions", [(solution.keys,)] * ctx.backend.shards)
            dots, tags = _dots(ctx, len(asked), probes)
            break
        except ShardLostError as lost:
            if attempt == _ATTEMPTS:
                raise RayluxError(f"block {block}: {lost}, for the {attempt}th time; give shards more memory") from None
            ctx.reporter.say(f"{block}: {lost}; it goes on from its last product")
    numerics = distinct([*solution.numerics, *(dict(result.numerics) for result in found), *tags])
    facts = [
        {"products": len(seen), "residual": seen[-1] if seen else 0.0, "slope": slope}
        for seen, slope in zip(solution.facts["residuals"], solution.facts["slopes"], strict=True)
    ]
    return Solved(dots, facts, solution.keys, numerics)


def _gradients(ctx: Context, asked: Sequence[tuple[str, QuerySpec]]) -> Generator[Result, None, None]:
    """a and g of each, in their order."""
    jobs = (Job(name, (spec, ctx.assignment), name) for name, spec in asked)
    with closing(results(ctx.backend, "query_gradient", jobs, parts=True, ordered=True)) as done:
        for result in done:
            if result.failure is not None:
                raise RayluxError(f"the gradient of '{result.job.name}' ended its worker ({result.failure.reason})")
            yield result


def _dots(ctx: Context, count: int, probes: Sequence[Probe]) -> tuple[np.ndarray, list[Numerics]]:
    names = [layer.name for layer in ctx.coverage.tracked]
    dots = np.full((count, len(probes)), np.nan)
    tags: list[Numerics] = []
    asked = [(f"probe {place}", probe.spec) for place, probe in enumerate(probes)]
    with closing(_gradients(ctx, asked)) as done:
        for column, (probe, result) in enumerate(zip(probes, done, strict=True)):
            places = list(range(count) if probe.places is None else probe.places)
            layers: dict[str, Any] = {}
            for answer in every_shard(ctx.backend, "measure", [(part, places) for part in result.parts]):
                layers |= answer
            for place in places:
                # In the order of the layers, however they were shared out.
                dots[place, column] = math.fsum(layers[name][place][0] for name in names)
            tags = distinct([*tags, dict(result.numerics)])
    return dots, tags
