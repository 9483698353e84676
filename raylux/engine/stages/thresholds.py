"""What two-stage scoring goes by: the best scores so far, and how far estimates may be trusted, by its pilot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from raylux.cost.two_stage import Seen
from raylux.engine.bars import FINE, FIRST, Bars
from raylux.store import CHOSEN, PILOT, RunFolder, score_blocks
from raylux.store.arrays import Group

# The smallest slope of a line, and size of a sequence beside the largest.
_SMALLEST = 1e-9


def rank_of(expected: float) -> int:
    """Of a threshold: of so many of the best expected among what was seen, rarely are there more.

    One that is too high leaves out sequences that run through the model again, one that is too low lets pairs through
    in vain: by scores of workload A of the benchmark two standard deviations cost less than three or one and a half.
    """
    return math.ceil(expected + 2 * math.sqrt(expected)) if expected else 1


@dataclass(frozen=True)
class Best:
    """The largest scores [Q, count] of some queries, descending, −∞ beyond them; and how many rows each was seen on."""

    largest: np.ndarray
    seen: list[int]

    def thresholds(self, best: int, every: int) -> np.ndarray:
        """[Q] scores that the K best of ``every`` sequences most likely reach (``rank_of``)."""
        return self._at([rank_of(best * count / every) for count in self.seen])

    def typical(self, best: int, every: int) -> np.ndarray:
        """[Q] scores that as large a share of the sequences so far reach as are wanted of all.

        Halfway to the next: of few, one that stood at the threshold itself would be far from what most are.
        """
        ranks = [max(1, round(best * count / every)) for count in self.seen]
        at, after = self._at(ranks), self._at([rank + 1 for rank in ranks])
        return np.where(np.isfinite(after), (at + after) / 2, at)

    def _at(self, ranks: Sequence[int]) -> np.ndarray:
        last = self.largest.shape[1]  # more rows may have been seen than there are candidates now
        return np.array([own[min(rank, last) - 1] for own, rank in zip(self.largest, ranks, strict=True)])


@dataclass(frozen=True)
class Estimates:
    """Of pairs [Q, n].

    Attributes:
        values: estimates.
        sizes: [n] of the sequences, which errors are in proportion to.
        refined: whether an estimate is by all that is seen, or by what comes first.
        first: by what comes first, where both are known; otherwise None.
        bars: that pairs had to reach, to be scored; None: all are.
        opening: by what comes first, of pairs that are scored, NaN elsewhere; None where there is one step.
    """

    values: np.ndarray
    sizes: np.ndarray
    refined: np.ndarray
    first: np.ndarray | None = None
    bars: Bars | None = None
    opening: np.ndarray | None = None

    @classmethod
    def read(cls, group: Group, places: Sequence[int]) -> Estimates:
        """Of some of a unit's queries."""
        values = group.read("estimate")[places].astype(np.float64)
        # Runs of before took the sequences alike.
        sizes = group.read("size").astype(np.float64) if "size" in group else np.ones(values.shape[1])
        refined = np.ones(values.shape, bool)
        if "refined" in group:
            refined = np.unpackbits(group.read("refined")[places], 1, values.shape[1]).astype(bool)
        first = group.read("first")[places].astype(np.float64) if "first" in group else None
        bars, opening = None, first
        if "limits" in group:
            bars = Bars(*(group.read(name)[places].astype(np.float64) for name in ("limits", "rooms")))
        if "opening" in group:
            whole = group.read("total").astype(np.float64)
            whole[~np.isnan(whole)] = group.read("opening")
            opening = whole[places]
        return cls(values, sizes, refined, first, bars, opening)

    def reach(self, bars: Bars) -> np.ndarray:
        """The pairs that may be among the best of their query."""
        first = self.opened(bars)
        fine = bars.reached(self.values, self.sizes, FINE)
        return (fine | ~self.refined) & first

    def opened(self, bars: Bars) -> np.ndarray:
        """The pairs that what comes first leaves open; those that were looked at closely where it is not known."""
        if self.first is not None:
            return bars.reached(self.first, self.sizes, FIRST)
        return self.refined | bars.reached(self.values, self.sizes, FIRST)


@dataclass(frozen=True)
class Fit:
    """Scores by one step of estimates: offset + slope · estimate, give or take error · size of the sequence.

    What is left out goes along with what is seen: it adds to all sequences, and in proportion to their scores.

    Attributes:
        offsets: [Q].
        slopes: [Q].
        errors: [Q], standard ones.
        sizes: [n] of the sequences that this was found by.
    """

    offsets: np.ndarray
    slopes: np.ndarray
    errors: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, total: np.ndarray, values: np.ndarray, sizes: np.ndarray) -> Fit:
        """Least squares of scores [Q, n] to estimates [Q, n] of sequences of these sizes [n]."""
        largest = sizes.max() or 1.0
        relative = np.maximum(sizes / largest, _SMALLEST)
        weights = relative**-2.0 / (relative**-2.0).sum()
        x, y = (own - (own @ weights)[:, None] for own in (values, total))
        both, own = (x * y) @ weights, (x * x) @ weights
        slopes = np.maximum(np.divide(both, own, out=np.ones_like(own), where=own > 0), _SMALLEST)
        offsets = (total - slopes[:, None] * values) @ weights
        found = cls(offsets, slopes, np.ones_like(slopes), relative * largest)
        # A line takes two of the sequences.
        return replace(found, errors=np.sqrt((found.off(total, values) ** 2).sum(1) / max(1, len(sizes) - 2)))

    def of_some(self, places: np.ndarray) -> Fit:
        """Of some of the queries."""
        return replace(self, offsets=self.offsets[places], slopes=self.slopes[places], errors=self.errors[places])

    def scores(self, values: np.ndarray) -> np.ndarray:
        """[Q, n] of estimates [Q, n]."""
        return self.offsets[:, None] + self.slopes[:, None] * values

    def off(self, scores: np.ndarray, values: np.ndarray) -> np.ndarray:
        """How far these [Q, n] lie above what estimates [Q, n] say, in standard errors; nothing where there is none."""
        error = self.errors[:, None] * self.sizes
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(error > 0, (scores - self.scores(values)) / error, 0.0)


@dataclass(frozen=True)
class Trust:
    """How far estimates of some queries are trusted: scores are at most offset + slope · estimate + room · size.

    Attributes:
        offsets: [Q, 2] of either step; ∞ where it leaves nothing out.
        slopes: [Q, 2].
        rooms: [Q, 2].
    """

    offsets: np.ndarray
    slopes: np.ndarray
    rooms: np.ndarray

    @classmethod
    def of(cls, fits: Sequence[Fit], margins: Sequence[float]) -> Trust:
        """Of one step or two, by the standard errors that a score may lie above what is estimated."""
        count = len(fits[0].offsets)
        found = cls(np.full((count, 2), math.inf), np.ones((count, 2)), np.zeros((count, 2)))
        for step, (fit, margin) in enumerate(zip(fits, margins, strict=True)):
            found.offsets[:, step], found.slopes[:, step] = fit.offsets, fit.slopes
            found.rooms[:, step] = margin * fit.errors
        return found

    def bars(self, limits: np.ndarray) -> Bars:
        """Of scores that are to reach the limits [Q]."""
        return Bars((limits[:, None] - self.offsets) / self.slopes, self.rooms / self.slopes)


@dataclass(frozen=True)
class Pilot:
    """Scores [Q, n] of the pilot, and estimates; what these see of each layer."""

    total: np.ndarray
    estimates: Estimates
    seen: dict[str, Seen]

    @property
    def fits(self) -> list[Fit]:
        """Of estimates by all that is seen, and by what comes first where that is known."""
        own = self.estimates
        steps = [own.values] if own.first is None else [own.values, own.first]
        return [Fit.of(self.total, values, own.sizes) for values in steps]


def read_pilot(folder: RunFolder, ids: Sequence[str]) -> Pilot | None:
    """What pilots have of some queries; None: they have not all been in one."""
    totals, parts = [], []
    seen: dict[str, Seen] = {}
    for block in score_blocks(folder):
        if block.stage == PILOT and set(ids) <= set(block.queries):
            group, places = folder.group(block.key), [block.queries.index(query) for query in ids]
            totals.append(group.read("total")[places].astype(np.float64))
            parts.append(Estimates.read(group, places))
            if "seen" in group.attrs:  # a run of before estimated otherwise
                seen = {name: Seen.of(numbers) for name, numbers in group.attrs["seen"].items()}
    if not parts:
        return None
    firsts = [part.first for part in parts if part.first is not None]
    every = Estimates(
        np.concatenate([part.values for part in parts], 1),
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.refined for part in parts], 1),
        np.concatenate(firsts, 1) if len(firsts) == len(parts) else None,
    )
    return Pilot(np.concatenate(totals, 1), every, seen)


def best_so_far(folder: RunFolder, ids: Sequence[str], best: int) -> Best:
    """As many scores of each query as may be asked for where K are wanted.

    Those of pairs that were left out at first do not count: bars are the same before and after these are scored.
    """
    place, count = {query: number for number, query in enumerate(ids)}, rank_of(best) + 1
    largest, seen = np.full((len(ids), count), -np.inf), [0] * len(ids)
    for block in score_blocks(folder):
        own = [at for at, query in enumerate(block.queries) if query in place]
        if not own or block.stage == CHOSEN:
            continue
        total = folder.group(block.key).read("total")[own]
        where = [place[block.queries[at]] for at in own]
        held = np.concatenate([largest[where], np.where(np.isnan(total), -np.inf, total)], 1)
        largest[where] = -np.sort(-held, 1)[:, :count]
        for at in where:
            seen[at] += len(block.rows)
    return Best(largest, seen)


def company(folder: RunFolder, ids: Sequence[str]) -> list[list[str]]:
    """Those of some queries that were in the same pilots."""
    asked, found = set(ids), dict[str, list[int]]()
    for number, block in enumerate(x for x in score_blocks(folder) if x.stage == PILOT):
        for query in asked.intersection(block.queries):
            found.setdefault(query, []).append(number)
    together = dict[tuple[int, ...], list[str]]()
    for query, numbers in sorted(found.items()):
        together.setdefault(tuple(numbers), []).append(query)
    return list(together.values())
