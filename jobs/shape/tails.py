"""The tail of a query's influences: a power law against an exponential (Grosse et al. 2023, 5.2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from math import erfc, sqrt

import numpy as np


@dataclass(frozen=True)
class Tail:
    """The largest influences of a query.

    Attributes:
        size: how many there are.
        exponent: α of the power law P(X > x) = (x / x_min)^−α, by maximum likelihood.
        fit: probability that a sample of that power law is further from its own fit, in Kolmogorov and Smirnov's
            distance, than the tail is from its fit: the law is plausible above 0.1.
        ratio: log-likelihood of the power law above that of the exponential, by its own standard deviation (Vuong
            1989): positive where the tail is heavier than an exponential.
        heavier: probability of a ratio as large, were the two equally good.
    """

    size: int
    exponent: float
    fit: float
    ratio: float
    heavier: float


def tail(values: np.ndarray, draws: int = 500, seed: int = 0) -> Tail:
    """Fit both laws to a tail.

    Args:
        values: [n] positive, three at least and not all alike; the least is x_min.
        draws: samples by which the fit is judged.
        seed: of these.
    """
    x = np.sort(np.asarray(values, np.float64))
    exponent = _exponent(x)
    random = np.random.default_rng(seed)
    drawn = np.sort(x[0] * (1 - random.random((draws, len(x)))) ** (-1 / exponent), axis=1)
    further = np.mean([_distance(one) >= _distance(x) for one in drawn])
    # At x_min itself both densities are those of the first of n points; it is left out of the likelihoods.
    rest, rate = x[1:], 1 / (x[1:] - x[0]).mean()
    power = np.log(exponent / x[0]) - (exponent + 1) * np.log(rest / x[0])
    exponential = np.log(rate) - rate * (rest - x[0])
    by_point = power - exponential
    ratio = float(by_point.sum() / (by_point.std() * sqrt(len(rest))))
    return Tail(len(x), exponent, float(further), ratio, 0.5 * erfc(ratio / sqrt(2)))


def _exponent(x: np.ndarray) -> float:
    return float((len(x) - 1) / np.log(x[1:] / x[0]).sum())


def _distance(x: np.ndarray) -> float:
    """Kolmogorov and Smirnov's distance of a sorted sample from its own power law."""
    below = 1 - (x / x[0]) ** -_exponent(x)
    steps = np.arange(len(x) + 1) / len(x)
    return float(max(np.abs(below - steps[:-1]).max(), np.abs(steps[1:] - below).max()))


def top_share(scores: np.ndarray, part: float = 0.01) -> float:
    """What the largest ``part`` of a query's scores [N] has of its total positive influence."""
    positive = np.sort(scores[scores > 0])[::-1]
    return float(positive[: max(1, round(part * len(scores)))].sum() / positive.sum())
