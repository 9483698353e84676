"""Arithmetic of the benchmark: times in F, medians and spreads over rounds, cost per query, agreement of scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from jobs.bench.records import Measured

FIT, ASKED = ("covariance", "eigenbases", "lambda"), ("query", "score")
JOB = (*FIT, *ASKED, "rest")
CPU, WALL = "cpu", "wall"


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None of no values."""
        held = list(values)
        return cls(median(held), min(held), max(held)) if held else None

    def text(self, digits: int = 2) -> str:
        """The median, and the others in brackets where they differ from it."""
        middle, low, high = (f"{x:.{digits}f}" for x in (self.median, self.low, self.high))
        return middle if low == high else f"{middle} ({low} to {high})"


def bare(measured: Measured, clock: str) -> float:
    """F: the median bare pass of the same process, in seconds.

    Raises:
        ValueError: it ran none.
    """
    return median(measured.bare_cpu if clock == CPU else measured.bare_wall)


def seconds(measured: Measured, names: Sequence[str], queries: int, clock: str) -> float:
    """Seconds of the stages named, in a job of so many queries."""
    return sum(getattr(x, clock) for x in measured.stages if x.name in names and x.queries in (None, queries))


def stage(measured: Measured, name: str, queries: int, clock: str) -> float:
    """One stage in F."""
    return seconds(measured, (name,), queries, clock) / bare(measured, clock)


def job(measured: Measured, queries: int, clock: str) -> float:
    """The whole job in F: covariances, eigenbases, Λ, preconditioned queries, scores, and what is done between."""
    return seconds(measured, JOB, queries, clock) / bare(measured, clock)


def line(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """(fixed, per query) by least squares.

    Raises:
        ValueError: fewer than two different sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError("a line needs two sizes")
    slope, fixed = np.polyfit(np.asarray(sizes, float), np.asarray(values, float), 1)
    return float(fixed), float(slope)


def cost(measured: Measured, clock: str) -> tuple[float, float] | None:
    """(fixed, per query) of a whole job in F; None where there is one number of queries only."""
    sizes = measured.spec.sizes
    if len(set(sizes)) < 2:
        return None
    return line(sizes, [job(measured, size, clock) for size in sizes])


def peak(measured: Measured, queries: int, kind: str) -> int:
    """Peak memory in bytes over the fit and the stages of so many queries; ``kind``: ``rss`` or ``uss``."""
    return max(
        (getattr(x, kind) for x in measured.stages if x.name in FIT + ASKED and x.queries in (None, queries)), default=0
    )


@dataclass(frozen=True)
class Agreement:
    """How two programs' scores [Q, N] agree.

    Attributes:
        pearson: over all pairs.
        error: max |Δ| / RMS.
        top: mean share of a query's ten largest that both have.
    """

    pearson: float
    error: float
    top: float

    @classmethod
    def of(cls, found: np.ndarray, exact: np.ndarray, count: int = 10) -> Agreement:
        """Of ``found`` with ``exact``; a query with fewer than ``count`` sequences is taken whole."""
        x, y = np.asarray(found, np.float64), np.asarray(exact, np.float64)
        count = min(count, y.shape[1])
        best = [np.argsort(-array, axis=1, kind="stable")[:, :count] for array in (x, y)]
        shares = [len(set(a) & set(b)) / count for a, b in zip(*(rows.tolist() for rows in best), strict=True)]
        return cls(
            float(np.corrcoef(x.ravel(), y.ravel())[0, 1]),
            float(np.abs(x - y).max() / np.sqrt(np.mean(y**2))),
            float(np.mean(shares)),
        )
