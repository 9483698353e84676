"""Doses: what more or less of one training sequence does to measurements, found at the proximal optimum.

A dose is a number of copies c, so a weight ε = c/N of the sequence's loss. To first order a measurement f changes by
c times the influence per copy. Doses come in pairs ±c: in [f(c) − f(−c)] / 2c all even orders cancel, and between
two sizes c and kc what is left grows by k², so that the two tell how far the smaller one is from first order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from raylux.batches import TokenRow
    from raylux.evaluate.proximal import Optimum, ProximalObjective
    from raylux.evaluate.training import Answers

# The search ends at this share of the first gradient, then goes on to the second: by how much f moves meanwhile is
# more than what is left to be found.
_FIRST, _LAST = 1e-3, 1e-5
# Draws of weights that differ from the model's by rounding alone, and what is allowed beyond the farthest f of them.
_ROUNDINGS, _BEYOND = 8, 2.0
# Beyond this share of the value, and of what noise explains, a change is no longer in proportion to its dose.
LINEAR = 0.1


@dataclass(frozen=True)
class Doses:
    """What is measured of a sequence.

    Attributes:
        size: copies of the smaller pair, > 0.
        factor: by which the larger pair is larger, > 1.
        whole: also a whole copy more.
    """

    size: float = 0.1
    factor: float = 3.0
    whole: bool = True

    @property
    def copies(self) -> tuple[float, ...]:
        """Of each dose: the smaller pair, the larger pair, the whole copy."""
        large = self.size * self.factor
        return (self.size, -self.size, large, -large, *((1.0,) if self.whole else ()))


@dataclass(frozen=True)
class Measured:
    """Changes of f for one sequence.

    Attributes:
        change: [doses, Q] f(θ*) − f(θ_s) in nats.
        noise: [doses, Q] nats, by how much the search left it open: what going on moved, and rounding.
        evaluations: of the objective, in all.
    """

    change: np.ndarray
    noise: np.ndarray
    evaluations: int


@dataclass(frozen=True)
class Effect:
    """What the doses say of each query, in nats per copy to first order; arrays [Q].

    Attributes:
        value: of the smaller pair, what it is off by at second order in the dose taken off with the larger one.
        error: half the width of the interval: noise of the search, and that correction.
        noise: of ``value``, from the search alone.
        linear: the change is in proportion to its dose up to the larger pair.
        below: the change is no larger than the noise: there is nothing to be said of its size.
        whole: change by a whole copy, nats; NaN where it was not measured.
    """

    value: np.ndarray
    error: np.ndarray
    noise: np.ndarray
    linear: np.ndarray
    below: np.ndarray
    whole: np.ndarray

    @property
    def resolved(self) -> bool:
        """Whether the dose as a whole stands out of the noise: by its RMS over the queries, threefold."""
        return bool(_rms(self.value) > 3 * _rms(self.noise))


class Questions:
    """f of some queries at any weights: f = Σ weight · log p over a query's parts.

    Args:
        rows: parts of each query.
        weights: of each part in f.
    """

    def __init__(self, rows: Sequence[Sequence[TokenRow]], weights: Sequence[Sequence[float]]) -> None:
        import torch  # which whoever reads what doses did does without

        self._rows = [row for own in rows for row in own]
        self._ends = np.cumsum([len(own) for own in rows])[:-1]
        self._weights = torch.tensor([weight for own in weights for weight in own], dtype=torch.float64)

    def at(self, model: ProximalObjective | Answers, weights: Mapping[str, Tensor] | None = None) -> np.ndarray:
        """f [Q] in nats, under ``weights`` instead of its own where it is an objective."""
        return self._summed(model.logprobs(self._rows, weights))

    def slopes(self, objective: ProximalObjective, change: Mapping[str, Tensor]) -> np.ndarray:
        """Derivative of f [Q] at θ_s along a change of the tracked weights, in nats."""
        return self._summed(objective.slopes(self._rows, change))

    def _summed(self, values: Tensor) -> np.ndarray:
        weighted = (values.double().cpu() * self._weights).numpy()
        return np.array([part.sum() for part in np.split(weighted, self._ends)])

    def rounding(self, objective: ProximalObjective) -> np.ndarray:
        """By how much f [Q] is uncertain in floating point: what the last bit of every weight moves."""
        before = self.at(objective)
        moved = [np.abs(self.at(objective, objective.rounded(seed)) - before) for seed in range(_ROUNDINGS)]
        return _BEYOND * np.max(moved, 0)


def measure(
    objective: ProximalObjective,
    row: TokenRow | Sequence[TokenRow],
    questions: Questions,
    copies: Sequence[float],
    train_size: int,
    iterations: int = 100,
    tolerances: tuple[float, float] = (_FIRST, _LAST),
) -> Measured:
    """Search the optimum of each dose, the smaller ones first: a search begins where the last one ended.

    Args:
        objective: of the model.
        row: the sequence, or several that are dosed together.
        questions: what is measured.
        copies: doses, not 0.
        train_size: N.
        iterations: of L-BFGS for each of a dose's two searches, at most.
        tolerances: shares of the first gradient at which the first search ends, and the second.

    Raises:
        NumericsError: the objective is not finite.
    """
    before, rounding = questions.at(objective), questions.rounding(objective)
    shape = len(copies), len(before)
    change, noise = np.zeros(shape), np.zeros(shape)
    evaluations = 0
    near: Optimum | None = None
    for place in sorted(range(len(copies)), key=lambda at: (abs(copies[at]), at)):
        weight = copies[place] / train_size
        first = objective.optimum(row, weight, iterations, tolerances[0], near)
        near = objective.optimum(row, weight, iterations, tolerances[1], first)
        found = questions.at(objective, near.weights)
        change[place] = found - before
        noise[place] = np.abs(found - questions.at(objective, first.weights)) + rounding
        evaluations += first.evaluations + near.evaluations
    return Measured(change, noise, evaluations)


def effect(doses: Doses, measured: Measured) -> Effect:
    """What the doses of a sequence say, changes in the order of ``Doses.copies``."""
    small, large = (
        (measured.change[place] - measured.change[place + 1]) / (2 * size)
        for place, size in ((0, doses.size), (2, doses.size * doses.factor))
    )
    noise, noise_large = (
        np.hypot(measured.noise[place], measured.noise[place + 1]) / (2 * size)
        for place, size in ((0, doses.size), (2, doses.size * doses.factor))
    )
    # f odd in the dose: the pair c is off by a c², the pair kc by a k² c².
    off = (large - small) / (doses.factor**2 - 1)
    value = small - off
    return Effect(
        value,
        np.abs(off) + noise,
        noise,
        np.abs(large - small) <= LINEAR * np.abs(value) + noise + noise_large,
        np.abs(small) <= noise,
        measured.change[4] if doses.whole else np.full(len(value), np.nan),
    )


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
