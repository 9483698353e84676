"""Recall against cost: what a first pass with given sketches and pivots leaves to be rescored, and what it costs.

Costs are multiplications per sequence, as in ``raylux.cost.contraction``; forward and backward, and the query stage
that makes s_test, are the same either way and left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.twostage.sketch import Deflated, narrowed
from raylux.layers import TrackedLayer

TOP = 100
WANTED = 0.99


@dataclass(frozen=True)
class Kept:
    """What the two passes kept of one layer: exact [N, Q], gradients [N, K], queries [Q, K]."""

    exact: np.ndarray
    gradients: np.ndarray
    queries: np.ndarray


@dataclass(frozen=True)
class FirstPass:
    """Settings of a first pass.

    Attributes:
        sizes: layer -> k of its sketch.
        pivots: r, of every layer.
    """

    sizes: Mapping[str, int]
    pivots: int


@dataclass(frozen=True)
class Estimate:
    """What a first pass knows.

    Attributes:
        scores: [N, Q], approximate, over all layers.
        variance: [N, Q] that the sketches' norms promise of them.
        layers: layer -> (scores, variance), float32.
    """

    scores: np.ndarray
    variance: np.ndarray
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]]


def estimate(kept: Mapping[str, Kept], scale: np.ndarray, setting: FirstPass, pilot: int) -> Estimate:
    """Approximate scores of all pairs by a first pass; ``scale`` and ``pilot`` as in ``Deflated.split``."""
    layers = {}
    for seed, (name, layer) in enumerate(kept.items()):
        size = setting.sizes[name]
        sketches = [x if size >= x.shape[1] else narrowed(x, size, seed) for x in (layer.gradients, layer.queries)]
        split = Deflated.split(layer.exact, *sketches, scale, setting.pivots, pilot)
        layers[name] = split.estimate().astype(np.float32), split.variance().astype(np.float32)
    scores, variance = (sum(x[at].astype(np.float64) for x in layers.values()) for at in (0, 1))
    return Estimate(scores, variance, layers)


def allocate(kept: Mapping[str, Kept], scale: np.ndarray, pivots: int, mean: int, pilot: int) -> dict[str, int]:
    """Layer -> k: their sum is about ``mean`` per layer, each as its error asks.

    The error of a layer falls with √k, so k goes with the square root of its variance at equal k; powers of two.
    """
    loss = {}
    for name, layer in kept.items():
        split = Deflated.split(layer.exact, layer.gradients, layer.queries, scale, pivots, pilot)
        norms = [np.square(x).sum(1, dtype=np.float64) for x in (split.gradients, split.queries / scale[:, None])]
        loss[name] = float(np.sqrt(np.median(norms[0]) * np.median(norms[1])))
    share = mean * len(loss) / sum(loss.values())
    largest = {name: layer.gradients.shape[1] for name, layer in kept.items()}
    return {name: int(min(largest[name], 2 ** round(np.log2(max(2.0, share * x))))) for name, x in loss.items()}


@dataclass(frozen=True)
class Rescored:
    """What must be rescored for the wanted recall.

    Attributes:
        pairs: share of all pairs, the same number for every query.
        adaptive: share of all pairs, those whose estimate comes within so many standard errors of the threshold.
        sequences: share of the sequences that are in some such pair, by the fixed number.
        error: median over queries of the estimate's error, relative to the spread of the query's scores.
        promised: the same by the sketches' own norms.
    """

    pairs: float
    adaptive: float
    sequences: float
    error: float
    promised: float


def rescored(exact: np.ndarray, found: Estimate, top: int = TOP, wanted: float = WANTED) -> Rescored:
    """How many pairs must be rescored so that the share ``wanted`` of all queries' best ``top`` is among them."""
    best = np.argsort(-exact, 0)[:top]
    order = np.argsort(-found.scores, 0)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(len(exact))[:, None], 0)
    place = np.sort(np.take_along_axis(rank, best, 0).ravel())
    count = int(place[int(np.ceil(wanted * len(place))) - 1]) + 1
    # A query's K-th estimate is its threshold; pairs are taken by their distance from it in standard errors.
    threshold = np.take_along_axis(found.scores, order[top - 1 : top], 0)
    margin = (threshold - found.scores) / np.sqrt(found.variance + 1e-30)
    needed = np.sort(np.take_along_axis(margin, best, 0).ravel())
    limit = needed[int(np.ceil(wanted * len(needed))) - 1]
    off = found.scores - exact
    spread = exact.std(0)
    return Rescored(
        count / len(exact),
        float((margin <= limit).mean()),
        float((rank < count).any(1).mean()),
        float(np.median(off.std(0) / spread)),
        float(np.median(np.sqrt(found.variance.mean(0)) / spread)),
    )


def eliminated(
    kept: Mapping[str, Kept], found: Estimate, weights: Mapping[str, float], errors: float, top: int = TOP
) -> tuple[float, float]:
    """Rescore layer by layer, the least certain first, and drop pairs on the way.

    After each layer its exact scores replace its estimates; a pair goes on while its estimate is within ``errors``
    standard errors of its query's threshold, the ``top``-th of what is known then.

    Args:
        kept: of every layer.
        found: by the first pass.
        weights: layer -> its entries P·M.
        errors: standard errors.
        top: of each query that are wanted.

    Returns:
        The share of all pairs' multiplications, and the recall.
    """
    # Queries in rows: each has its own threshold.
    exact = sum(layer.exact.T.astype(np.float32) for layer in kept.values())
    best = np.argpartition(-exact, top - 1, 1)[:, :top]
    scores, variance = (np.ascontiguousarray(x.T, np.float32) for x in (found.scores, found.variance))
    alive, spent = np.ones(scores.shape, bool), 0.0
    for name in sorted(kept, key=lambda name: -float(np.median(found.layers[name][1])) / weights[name]):
        threshold = -np.partition(np.where(alive, -scores, np.inf), top - 1, 1)[:, top - 1 : top]
        alive &= threshold - scores <= errors * np.sqrt(np.maximum(variance, 0))
        spent += float(alive.mean()) * weights[name]
        approximate, error = (x.T for x in found.layers[name])
        scores += np.where(alive, kept[name].exact.T - approximate, 0)
        variance -= np.where(alive, error, 0)
    return spent / sum(weights.values()), float(np.take_along_axis(alive, best, 1).mean())


def least_eliminated(
    kept: Mapping[str, Kept], found: Estimate, weights: Mapping[str, float], top: int = TOP, wanted: float = WANTED
) -> float:
    """The smallest share of ``eliminated`` with the wanted recall, by bisection of the standard errors."""
    low, high = 0.0, 6.0
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (low, middle) if eliminated(kept, found, weights, middle, top)[1] >= wanted else (middle, high)
    return eliminated(kept, found, weights, high, top)[0]


@dataclass(frozen=True)
class Shape:
    """Sizes on which costs depend: T tokens, Q queries, N candidates."""

    tokens: float
    queries: int
    candidates: int


@dataclass(frozen=True)
class Cost:
    """Shares of the exact contraction's multiplications."""

    form: float
    balance: float
    sketch: float
    pivots: float
    dots: float
    rescore: float

    @property
    def total(self) -> float:
        return self.form + self.balance + self.sketch + self.pivots + self.dots + self.rescore


def cost(
    layers: Sequence[TrackedLayer],
    shape: Shape,
    setting: FirstPass,
    sides: Mapping[str, tuple[int, int]],
    pairs: float,
) -> Cost:
    """What two stages cost, of forming all gradients and multiplying all with all queries: Σ (T + Q)·P·M.

    Every sequence is formed once: nearly all are somebody's best. Per query and layer, the sketch of its s_test and
    its part in the pivots are taken once, and count with 1/N of themselves.
    """
    t, q, n, r = shape.tokens, shape.queries, shape.candidates, setting.pivots
    entries = float(sum(layer.parameters for layer in layers))
    sizes = float(sum(setting.sizes[layer.name] for layer in layers))
    turned = sum(
        2 * t * (sides[layer.name][0] * layer.outputs + sides[layer.name][1] * layer.inputs) for layer in layers
    )
    whole = (t + q) * entries
    return Cost(
        t * entries / whole,
        turned / whole,
        entries * (1 + q / n) / whole,
        (r * (entries * (1 + q / n) + (q + sizes / len(layers)) * len(layers))) / whole if r else 0.0,
        q * sizes / whole,
        pairs * q * entries / whole,
    )


def covering(exact: np.ndarray, top: int = TOP, wanted: float = WANTED) -> float:
    """Share of the sequences that must be formed so that ``wanted`` of all queries' best ``top`` can be rescored."""
    best = np.argsort(-exact, 0)[:top]
    counts = np.sort(np.bincount(best.ravel(), minlength=len(exact)))[::-1]
    return float((np.cumsum(counts) / counts.sum() < wanted).mean())


def energies(exact: np.ndarray, shares: Sequence[float] = (0.05, 0.1, 0.25, 0.5)) -> dict[str, float]:
    """Share of the scores' variance, each query's counted alike, that the best r pivots keep, by r / Q.

    No first pass that is linear in r numbers of a sequence keeps more, whatever those are (Eckart and Young).
    """
    centred = (exact - exact.mean(0)) / exact.std(0)
    values = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    return {str(share): float(values[: round(share * len(values))].sum() / values.sum()) for share in shares}
