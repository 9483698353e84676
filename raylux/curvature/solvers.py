"""Iterative solves of (G + λ) x = v with products of G alone: CG, preconditioned CG, LiSSA and ASTRA's iteration.

G is the Gauss-Newton matrix over all tracked layers together, λ the damping of each layer, v a query's gradient. The
preconditioner P is the run's own kind of curvature (EK-FAC by default) at the same damping, so that its solution
P⁻¹v is what ``direct`` would have given.

| solver | start | step | products with |
|---|---|---|---|
| ``pcg`` | P⁻¹v | conjugate gradients (Hestenes, Stiefel 1952), preconditioned by P | G over all fitted sequences |
| ``cg`` | 0 | the same with P = 1 | the same |
| ``astra`` | P⁻¹v | x += η P⁻¹ (v − (G_B + λ) x), as in ASTRA (arXiv 2507.14740) | G_B over a drawn batch |
| ``lissa`` | 0 | x += (v − (G_B + λ) x) / s (Agarwal et al. 2017; Grosse et al. 2023, eq. 10) | the same |

The damping is λ in each of them: none adds another. (The recursion h ← v + (1 − d) h − G h / s, which returns h/s,
has the fixed point (G + d s)⁻¹ v; here no d is multiplied by s.)

What is done to a layer (``LayerSolve``) and what is decided from sums over all layers (``Trace``) are apart: layers may
lie in different processes. Each query is worked on by itself and stops by itself, so its bits do not depend on the
others'.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from raylux.config import CurvatureSection
from raylux.curvature.kinds import KINDS
from raylux.curvature.spectral import Spectral
from raylux.errors import UserError
from raylux.layers import TrackedLayer

# A residual so many times the right-hand side's norm, or the start's, is no longer on its way to anything.
_DIVERGED = 1e3
# Beyond the growth that was seen, by which a scale is proposed.
_MARGIN = 1.2


@dataclass(frozen=True)
class Solver:
    """A kind of iteration.

    Attributes:
        name: its name in a config.
        preconditioned: by the run's kind of curvature, at whose solution it starts.
        krylov: conjugate directions, with products over all sequences; otherwise fixed steps over drawn batches.
        iterations: at most, unless set.
    """

    name: str
    preconditioned: bool
    krylov: bool
    iterations: int


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver("pcg", True, True, 30),
        Solver("cg", False, True, 50),
        Solver("astra", True, False, 200),
        Solver("lissa", False, False, 1000),
    )
}


@dataclass(frozen=True)
class Rule:
    """A solver with its numbers.

    Attributes:
        solver: the kind.
        iterations: at most; each is one product with every query that is not done.
        tolerance: a query is done where ‖v − (G + λ) x‖ ≤ tolerance · ‖v‖, over all layers.
        step: η, or 1/s; no meaning for conjugate directions.
    """

    solver: Solver
    iterations: int
    tolerance: float
    step: float

    @classmethod
    def of(cls, setting: CurvatureSection, trace: float) -> Rule:
        """What a config says; ``trace``: of G by its factors, and λ, which bound the largest eigenvalue of G + λ."""
        solver = SOLVERS[setting.solver]
        iterations = solver.iterations if isinstance(setting.iterations, str) else setting.iterations
        scale = trace if isinstance(setting.scale, str) else setting.scale
        return cls(solver, iterations, setting.tolerance, setting.step if solver.preconditioned else 1.0 / scale)


@dataclass
class Trace:
    """Where the solve of a block of queries stands. Lists have an entry per query.

    Attributes:
        norms: ‖v‖.
        residuals: ‖v − (G + λ) x‖ / ‖v‖ before each step; of fixed steps on the batch that the step was taken on.
        inner: rᵀP⁻¹r of conjugate directions.
        done: the query has come to its end.
        slopes: vᵀx₀ / x₀ᵀ(G + λ)x₀ of the preconditioner's solution x₀: the number by which it would have to be
            multiplied to minimise the error in the norm of G + λ; below 1 where it is too large.
        iteration: products taken.
    """

    norms: list[float]
    residuals: list[list[float]] = field(default_factory=list)
    inner: list[float] = field(default_factory=list)
    done: list[bool] = field(default_factory=list)
    slopes: list[float | None] = field(default_factory=list)
    iteration: int = 0

    @classmethod
    def begin(cls, rule: Rule, norms: Sequence[float], inner: Sequence[float]) -> Trace:
        """Before the first product; ``inner``: vᵀx₀, or vᵀv without a preconditioner."""
        count = len(norms)
        # A query without a gradient is solved by zero.
        done = [norm == 0.0 for norm in norms]
        trace = cls(list(norms), [[] for _ in norms], list(inner), done, [None] * count)
        if rule.solver.krylov and not rule.solver.preconditioned:
            trace.residuals = [[float(norm > 0)] for norm in norms]
        return trace

    @property
    def active(self) -> list[int]:
        """Places of the queries that go on."""
        return [place for place, done in enumerate(self.done) if not done]

    def dump(self) -> dict[str, Any]:
        """As a manifest keeps it."""
        return asdict(self)

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Trace:
        """From what ``dump`` gave."""
        return cls(**data)

    def steps(self, rule: Rule, energies: Mapping[int, float]) -> dict[int, float]:
        """How far each query goes along its direction p, given pᵀ(G + λ)p.

        Raises:
            UserError: the energy is not positive, or not a number.
        """
        found = {}
        for place, energy in energies.items():
            if not math.isfinite(energy):
                raise UserError(
                    f"curvature.solver={rule.solver.name}: NaN or infinity in iteration {self.iteration}; "
                    + _advice(rule, self.residuals[place])
                )
            if not rule.solver.krylov:
                found[place] = rule.step
                continue
            if energy <= 0:
                raise UserError(
                    f"curvature.solver={rule.solver.name}: G + λ is not positive definite in iteration "
                    f"{self.iteration} (pᵀ(G + λ)p = {energy:.2g}); {_advice(rule, self.residuals[place])}"
                )
            if self.iteration == 0 and rule.solver.preconditioned:
                # The first direction is x₀ itself, and all of it: the iteration starts at x₀.
                self.slopes[place] = self.inner[place] / energy
                found[place] = 1.0
            else:
                found[place] = self.inner[place] / energy
        return found

    def turns(self, rule: Rule, sums: Mapping[int, tuple[float, float]]) -> dict[int, float]:
        """How much of its last direction each query keeps, given (rᵀr, rᵀP⁻¹r) after a step; ends what is solved.

        Raises:
            UserError: the iteration diverges.
        """
        found = {}
        for place, (square, inner) in sums.items():
            seen = self.residuals[place]
            residual = math.sqrt(square) / self.norms[place] if square >= 0 else math.nan
            if not math.isfinite(residual) or residual > _DIVERGED * max([1.0, *seen[:1]]):
                raise UserError(
                    f"curvature.solver={rule.solver.name} diverges: after {self.iteration + 1} products the residual "
                    f"is {residual:.2g} times the query's gradient; {_advice(rule, [*seen, residual])}"
                )
            seen.append(residual)
            first = self.iteration == 0 and rule.solver.preconditioned
            found[place] = 0.0 if first or not self.inner[place] else inner / self.inner[place]
            self.inner[place] = inner
            self.done[place] = residual <= rule.tolerance
        self.iteration += 1
        if self.iteration >= rule.iterations:
            self.done = [True] * len(self.done)
        return found


def _advice(rule: Rule, residuals: Sequence[float]) -> str:
    """Which key to set, and to what: by the growth of the last steps, of which |1 − step · eigenvalue| is a bound."""
    pairs = [(x, y) for x, y in itertools.pairwise(residuals) if x > 0 and math.isfinite(y)]
    growth = max((y / x for x, y in pairs[-3:]), default=1.0)
    if rule.solver.krylov:
        return "set curvature.damping higher, or model.dtype=float64"
    step = rule.step / (_MARGIN * (1 + growth))
    if rule.solver.preconditioned:
        return f"set curvature.step={step:.1g} (it was {rule.step:.1g}), or curvature.batch higher"
    return f"set curvature.scale={1 / step:.2g} (it was {1 / rule.step:.2g}), or curvature.batch higher"


def check(kind: str, setting: CurvatureSection, labels: str, dtype: str) -> None:
    """Raises UserError where a config's solver cannot serve the rest of it."""
    name = setting.solver
    if name == "direct":
        return
    if KINDS[kind].joint:
        raise UserError(
            f"curvature.solver={name}: curvature.kind={kind} is solved exactly as it is; set curvature.solver=direct, "
            "or another kind"
        )
    if not KINDS[kind].spectral:
        raise UserError(
            f"curvature.solver={name}: curvature.kind={kind} has no curvature to solve with; set "
            "curvature.solver=direct, or another kind"
        )
    if labels != "sampled":
        raise UserError(
            f"curvature.solver={name} solves with the Gauss-Newton matrix, which fit.labels={labels} does not "
            "estimate; set fit.labels=sampled, or curvature.solver=direct"
        )
    if dtype == "bfloat16":
        raise UserError(
            f"curvature.solver={name} needs products of G in full precision; set model.dtype=float32, or "
            "curvature.solver=direct"
        )


def check_layers(name: str, layers: Sequence[TrackedLayer]) -> None:
    """Raises UserError where a solver cannot serve the tracked layers of a model."""
    routed = [layer.name for layer in layers if layer.routed]
    if name != "direct" and routed:
        raise UserError(
            f"curvature.solver={name}: '{routed[0]}' belongs to an expert, as {len(routed):,} of {len(layers):,} "
            "tracked layers do, and there are no products with G for experts yet; leave them out of model.layers, or "
            "set curvature.solver=direct"
        )


class LayerSolve:
    """What is done to one layer of a block of queries.

    Args:
        solver: the kind of iteration.
        curvature: the preconditioner P without its damping.
        damping: λ of the layer.
        state: name -> a tensor [P, M] per query; ``x`` the solution so far, and what else the solver needs.
    """

    def __init__(
        self, solver: Solver, curvature: Spectral, damping: float, state: Mapping[str, Sequence[Tensor]]
    ) -> None:
        self._solver, self._curvature, self._damping = solver, curvature, damping
        self.state = {name: list(tensors) for name, tensors in state.items()}
        self._images: dict[int, Tensor] = {}

    @classmethod
    def begin(cls, solver: Solver, curvature: Spectral, damping: float, gradients: Sequence[Tensor]) -> LayerSolve:
        """At the solver's start, from v [P, M] of each query."""
        zeros = [torch.zeros_like(v) for v in gradients]
        starts = [curvature.solve(v, damping) for v in gradients] if solver.preconditioned else zeros
        if solver.krylov:
            first = starts if solver.preconditioned else list(gradients)
            return cls(solver, curvature, damping, {"x": zeros, "r": gradients, "p": first})
        return cls(solver, curvature, damping, {"x": starts, "v": gradients})

    @staticmethod
    def direction(solver: Solver) -> str:
        """The name in the state of what G is to be multiplied with."""
        return "p" if solver.krylov else "x"

    def inner(self) -> list[tuple[float, float]]:
        """(vᵀv, vᵀ · start) of each query, before the first product."""
        right = self.state["r" if self._solver.krylov else "v"]
        starts = self.state[self.direction(self._solver)]
        return [(_dot(v, v), _dot(v, start)) for v, start in zip(right, starts, strict=True)]

    def take(self, products: Mapping[int, Tensor]) -> dict[int, float]:
        """Take G times each active query's direction; returns dᵀ(G + λ)d."""
        directions = self.state[self.direction(self._solver)]
        self._images = {place: part + self._damping * directions[place] for place, part in products.items()}
        return {place: _dot(directions[place], image) for place, image in self._images.items()}

    def advance(self, steps: Mapping[int, float]) -> dict[int, tuple[float, float]]:
        """Go a step; returns (rᵀr, rᵀP⁻¹r) of each query, of fixed steps as it was before the step."""
        sums = {}
        for place, step in steps.items():
            image = self._images.pop(place)
            if self._solver.krylov:
                self.state["x"][place] = self.state["x"][place] + step * self.state["p"][place]
                residual = self.state["r"][place] - step * image
                self.state["r"][place] = residual
                forward = self._preconditioned(residual)
                self._images[place] = forward
            else:
                residual = self.state["v"][place] - image
                forward = self._preconditioned(residual)
                self.state["x"][place] = self.state["x"][place] + step * forward
            sums[place] = _dot(residual, residual), _dot(residual, forward)
        return sums

    def turn(self, kept: Mapping[int, float]) -> None:
        """Choose the next directions: P⁻¹r and so much of the last one."""
        if self._solver.krylov:
            for place, share in kept.items():
                self.state["p"][place] = self._images.pop(place) + share * self.state["p"][place]

    def _preconditioned(self, residual: Tensor) -> Tensor:
        return self._curvature.solve(residual, self._damping) if self._solver.preconditioned else residual


def added(parts: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Sums over layers, in the order in which they stand."""
    return {place: math.fsum(part[place] for part in parts) for place in (parts[0] if parts else {})}


def added_pairs(parts: Sequence[Mapping[int, tuple[float, float]]]) -> dict[int, tuple[float, float]]:
    """The same of pairs."""
    first, second = (added([{place: pair[side] for place, pair in part.items()} for part in parts]) for side in (0, 1))
    return {place: (first[place], second[place]) for place in first}


Products = Callable[[int, Sequence[dict[str, Tensor]]], Sequence[Mapping[str, Tensor]]]
"""(iteration, vectors) -> G times each: of all sequences, or of a batch drawn for that iteration."""


def solve_here(
    products: Products,
    gradients: Sequence[Mapping[str, Tensor]],
    curvatures: Mapping[str, Spectral],
    damping: Mapping[str, float],
    rule: Rule,
    watch: Callable[[int, list[dict[str, Tensor]]], None] = lambda *_: None,
) -> tuple[list[dict[str, Tensor]], Trace]:
    """The same iteration in one process, for a G that is at hand.

    Args:
        products: with G.
        gradients: v of each query, by layer.
        curvatures: layer -> P without its damping.
        damping: λ of each layer.
        rule: solver and stopping rule.
        watch: told of x of each query after each product.

    Returns:
        x of each query by layer, and how the solve went.
    """
    solver = rule.solver
    layers = {
        name: LayerSolve.begin(solver, curvature, damping[name], [v[name] for v in gradients])
        for name, curvature in curvatures.items()
    }
    sums = added_pairs([dict(enumerate(layer.inner())) for layer in layers.values()])
    trace = Trace.begin(rule, [math.sqrt(sums[place][0]) for place in sums], [sums[place][1] for place in sums])
    while trace.active:
        places, name = trace.active, LayerSolve.direction(solver)
        vectors = [{key: layer.state[name][place] for key, layer in layers.items()} for place in places]
        images = products(trace.iteration, vectors)
        found = [
            layer.take({place: image[key] for place, image in zip(places, images, strict=True)})
            for key, layer in layers.items()
        ]
        steps = trace.steps(rule, added(found))
        turns = trace.turns(rule, added_pairs([layer.advance(steps) for layer in layers.values()]))
        for layer in layers.values():
            layer.turn(turns)
        watch(
            trace.iteration,
            [{key: layer.state["x"][at] for key, layer in layers.items()} for at in range(len(gradients))],
        )
    return [{key: layer.state["x"][place] for key, layer in layers.items()} for place in range(len(gradients))], trace


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x.double() * y.double()).sum())
