"""Sizes: by how much predictions have to be multiplied to come true, and what a whole copy does beyond first order.

The slope of measured m on predicted p is Σ p m / Σ p² over pairs of query and sequence, the least squares line
through the origin: 1 where predictions have the right size, below 1 where they overstate.

A copy is a finite step. With H_z the Gauss-Newton matrix of the sequence z by itself, adding c copies of it makes the
curvature G + λ + (c/N) H_z. Along the step of first order, x = (G + λ)⁻¹∇log p(z), the best length is then the first
order's divided by 1 + c · h with the leverage

    h = xᵀ H_z x / (N xᵀ (G + λ) x).

For one residual (least squares) that is the whole effect; otherwise the step also turns. Where H_z is taken as
∇log p ∇log pᵀ, which it is on average over labels drawn from the model, h becomes ∇log pᵀ (G + λ)⁻¹∇log p / N, as RIF
has it (arXiv 2506.06656). Taking z away is c = −1, a division by 1 − h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raylux.evaluate.datamodel import Estimate

# Fewer queries, or sequences, than this are not drawn again: two or three of them say nothing of how they vary.
_FEWEST = 3


@dataclass(frozen=True)
class Agreement:
    """How measured changes follow predicted ones.

    Attributes:
        slope: measured per predicted, with its interval.
        r_squared: square of Pearson's correlation.
        pairs: of query and sequence.
    """

    slope: Estimate
    r_squared: float
    pairs: int


def slope(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Σ p m / Σ p² over the pairs that have both; NaN where there is none, or all predictions are 0."""
    p, m = _pairs(predicted, measured)
    with np.errstate(invalid="ignore"):
        return float(np.float64(p.ravel() @ m.ravel()) / np.float64(p.ravel() @ p.ravel()))


def agreement(
    predicted: np.ndarray, measured: np.ndarray, level: float = 0.9, draws: int = 2000, seed: int = 0
) -> Agreement:
    """The slope with a percentile interval of a bootstrap that draws queries and sequences again, both at once.

    Pairs of one query, and of one sequence, go together: drawn again one by one they would make the interval too
    narrow. Of n there are n − 1 drawn (Rao & Wu 1988), which matters where queries are few. Where there are fewer than
    three queries (or sequences) they are kept as they are, and the interval is for these very ones. No interval can
    know of rare pairs that outweigh all that were drawn.

    Args:
        predicted: [Q, n]; NaN where a pair has none.
        measured: [Q, n], likewise.
        level: of the interval.
        draws: of the bootstrap.
        seed: of the draws.
    """
    p, m = _pairs(predicted, measured)
    random = np.random.default_rng(seed)
    queries, sequences = (_drawn(count, draws, random) for count in p.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = ((queries @ (p * m)) * sequences).sum(1) / ((queries @ (p * p)) * sequences).sum(1)
    found = found[np.isfinite(found)]
    tails = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]) if len(found) else (np.nan, np.nan)
    known = ~np.isnan(predicted) & ~np.isnan(measured)
    return Agreement(
        Estimate(slope(predicted, measured), float(tails[0]), float(tails[1])),
        _r_squared(predicted[known], measured[known]),
        int(known.sum()),
    )


def whole(predicted: np.ndarray, leverage: np.ndarray, copies: float = 1.0) -> np.ndarray:
    """What a change of ``copies`` whole copies does, from the change per copy to first order.

    Args:
        predicted: [..., n] nats per copy.
        leverage: [n] h of each sequence.
        copies: added; negative: taken away.

    Returns:
        [..., n] nats in all; NaN where so many copies cannot be taken away (copies · h ≤ −1).
    """
    divisor = 1 + copies * np.asarray(leverage, np.float64)
    return copies * predicted / np.where(divisor > 0, divisor, np.nan)


def _pairs(predicted: np.ndarray, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64, zeros where a pair lacks one of the two."""
    p, m = (np.asarray(x, np.float64) for x in (predicted, measured))
    known = ~np.isnan(p) & ~np.isnan(m)
    return np.where(known, p, 0.0), np.where(known, m, 0.0)


def _drawn(count: int, draws: int, random: np.random.Generator) -> np.ndarray:
    """How often each of ``count`` is drawn again, [draws, count]."""
    if count < _FEWEST:
        return np.ones((draws, count))
    # One less than there are: by as much as a mean's variance over drawn ones falls short of that over new ones.
    return random.multinomial(count - 1, np.full(count, 1 / count), draws).astype(np.float64)


def _r_squared(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or not x.std() or not y.std():
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1] ** 2)
