"""The linear datamodeling score (LDS; Park et al. 2023): do scores add up to what other training sets would do?

Models are trained on random subsets S of the training sequences. A method predicts the measurement f of a query after
training on S by the sum of its scores of S; LDS is Spearman's correlation, over the subsets, of these sums with what
f was. Only the order counts: scores without a unit can be judged beside scores in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Scores = np.ndarray
"""[Q, N] scores of the training sequences for each query."""


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval in which it lies with the level that was asked for."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def correlations(scores: Scores, members: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """LDS of each query [Q].

    Args:
        scores: [Q, N].
        members: [S, N] bool, the sequences of each subset.
        measured: [S, Q] f of each query after training on each subset.

    Returns:
        Spearman's ρ over the subsets; NaN where one of the two is constant.
    """
    return spearman(members.astype(np.float64) @ scores.T, measured)


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """r of each column of x with that of y [columns]; NaN where one of them is constant."""
    x, y = (values - values.mean(0) for values in (x, y))
    sizes = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(0) / sizes


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """ρ of each column of x with that of y [columns]; NaN where one of them is constant."""
    from scipy.stats import rankdata  # half a second, which each worker would spend

    return pearson(*(rankdata(values, axis=0) for values in (x, y)))


def _mean(values: np.ndarray) -> float:
    """Over the queries that have a correlation: with few subsets a draw may hold one of them again and again."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


@dataclass(frozen=True)
class Judgement:
    """Mean LDS, or another figure, of each method, and by how much it is above that of the one compared with."""

    lds: dict[str, Estimate]
    above: dict[str, Estimate]


def judge(
    methods: Mapping[str, Scores],
    members: np.ndarray,
    measured: np.ndarray,
    against: str,
    level: float = 0.9,
    draws: int = 2000,
    seed: int = 0,
) -> Judgement:
    """Mean LDS over the queries, with percentile intervals of a bootstrap.

    Subsets and queries are both drawn again, the same for all methods, so that differences between methods are
    those on the same draws.

    Args:
        methods: name -> scores [Q, N].
        members: [S, N] bool.
        measured: [S, Q].
        against: the method that differences are taken from.
        level: of the intervals.
        draws: of the bootstrap.
        seed: of the draws.
    """
    sums = {name: (members.astype(np.float64) @ scores.T, measured) for name, scores in methods.items()}
    return compare(sums, against, spearman, level, draws, seed)


def compare(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    against: str,
    figure: Callable[[np.ndarray, np.ndarray], np.ndarray | float],
    level: float = 0.9,
    draws: int = 2000,
    seed: int = 0,
) -> Judgement:
    """A figure of each of some pairs of arrays, with percentile intervals of a bootstrap of rows and columns.

    Args:
        pairs: name -> two arrays [S, Q]: what is predicted and what was measured, say.
        against: the name that differences are taken from.
        figure: of two arrays [S, Q]: a value of each column [Q], of which the mean is taken, or one of all.
        level: as of ``judge``.
        draws: as of ``judge``.
        seed: as of ``judge``.
    """
    shape = pairs[against][0].shape
    random = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(draws):
        places = np.ix_(*(random.integers(0, count, count) for count in shape))
        for name, (one, other) in pairs.items():
            drawn[name].append(_mean(np.atleast_1d(figure(one[places], other[places]))))
    value = {name: _mean(np.atleast_1d(figure(*both))) for name, both in pairs.items()}
    base = np.array(drawn[against])
    return Judgement(
        {name: interval(value[name], np.array(drawn[name]), level) for name in pairs},
        {name: interval(value[name] - value[against], np.array(drawn[name]) - base, level) for name in pairs},
    )


def mean_of_each(
    values: Mapping[str, np.ndarray], against: str, level: float = 0.9, draws: int = 2000, seed: int = 0
) -> Judgement:
    """Mean over the queries of what each method reached, with percentile intervals of a bootstrap over queries.

    Args:
        values: name -> [Q]; NaN where a query says nothing.
        against: as of ``judge``.
        level: as of ``judge``.
        draws: as of ``judge``.
        seed: as of ``judge``.
    """
    count = len(values[against])
    places = np.random.default_rng(seed).integers(0, count, (draws, count))
    drawn = {name: np.array([_mean(one[row]) for row in places]) for name, one in values.items()}
    value = {name: _mean(one) for name, one in values.items()}
    return Judgement(
        {name: interval(value[name], drawn[name], level) for name in values},
        {name: interval(value[name] - value[against], drawn[name] - drawn[against], level) for name in values},
    )


def interval(middle: float, drawn: np.ndarray, level: float) -> Estimate:
    """A figure with the percentiles of what a bootstrap made of it; NaN where no draw had it."""
    known = drawn[np.isfinite(drawn)]
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else (np.nan, np.nan)
    return Estimate(middle, float(low), float(high))


def agreement_of_repeats(measured: np.ndarray) -> float:
    """Mean over queries of Spearman's ρ between two models of the same subset; NaN where there is one for each.

    Args:
        measured: [S, repeats, Q].
    """
    if measured.shape[1] < 2:
        return float("nan")
    return _mean(spearman(measured[:, 0], measured[:, 1]))


def ceiling(measured: np.ndarray) -> float:
    """The correlation that the subset's true effect itself would have with the mean of the repeats (Spearman-Brown)."""
    one, repeats = agreement_of_repeats(measured), measured.shape[1]
    return float(np.sqrt(repeats * one / (1 + (repeats - 1) * one))) if one > 0 else float("nan")
