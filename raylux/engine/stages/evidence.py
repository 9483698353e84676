"""What recall two-stage scoring has, and what margins find the share that is wanted, by the best pairs so far.

A pilot alone tells little of that: scores of all queries go along with one another, so that the best of a thousand
queries are a few dozen of its sequences. Later waves add to it. Their thresholds are lower than what turns out to be a
query's K-th best score, so that most of what estimates needed to be found is seen there as well; what a unit could not
have found is reckoned by how often that was found elsewhere (as Horvitz & Thompson 1952 weigh samples). What no unit
could find is not in it. Weights that make up for that (Efron & Petrosian 1999) rest on the few pairs of the pilot: they
told margins that were right at one time and twice too large at another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from raylux.engine.bars import Bars
from raylux.engine.stages.thresholds import Best, Estimates, Fit, Pilot, Trust, best_so_far, company, read_pilot
from raylux.store import ESTIMATED, PILOT, RunFolder, score_blocks
from raylux.store.arrays import Group

# Of the best so many must be missed before their share tells anything.
_TELLING = 3
# Of the pairs that may be missed, the share that may be so by what comes first: a pair that this leaves open costs less
# than one that is scored, so that its margin is the wider one.
_FIRST = 0.3
# Margins of a wave may miss so many times what may be missed, as its thresholds are low; in the end so much of it.
_OF_WAVES, _IN_THE_END = 2.0, 0.5
# Errors of what comes first have a long tail, of which waves see little: on workload A of the benchmark margins told by
# what was found were so many times too small.
_UNSEEN = 1.3
# What few sequences tell may be too little: margins are taken 1 + √(16 / n) times as large.
_FEW = 16


@dataclass(frozen=True)
class Evidence:
    """The best pairs that were found, and their estimates.

    Attributes:
        needed: [n, steps] standard errors by which the limit of a pair's query lies above what was estimated of it.
        allowed: [n, steps] by which it might have, in its unit; infinite in a pilot.
    """

    needed: np.ndarray
    allowed: np.ndarray

    def margins(self, recall: float, lenient: float) -> list[float]:
        """Standard errors, of each step.

        Args:
            recall: the share of the best that is to be found.
            lenient: how many times as much as may be missed margins may miss, beside what comes first.
        """
        found = max(1 - lenient * (1 - recall), 0.5)
        if self.needed.shape[1] == 1:
            return [_told(self.needed[:, 0], found)]
        fine, first = self.needed.T
        kept = 1 - _FIRST * (1 - recall)
        margin = _told(first, kept)
        return [_told(fine[first <= margin], min(found, kept) / kept), _UNSEEN * margin]

    def allowing(self, margins: Sequence[float]) -> Evidence:
        """As if these had been allowed, at least."""
        return replace(self, allowed=np.maximum(self.allowed, margins))

    @property
    def missed(self) -> float:
        """How many of the best were not found, beside these."""
        total = 0.0
        for needed, allowed, unseen in zip(self.needed.T, self.allowed.T, (1.0, _UNSEEN), strict=False):
            share = np.searchsorted(np.sort(needed), allowed / unseen, "right") / max(1, len(needed))
            total += float((1 / np.maximum(share, 1 / max(1, len(needed))) - 1).sum())
        return total


def _told(needed: np.ndarray, recall: float) -> float:
    """The margin that a share of some pairs need."""
    found = float(np.quantile(needed, recall)) if len(needed) else 0.0
    if len(needed) * (1 - recall) < _TELLING and recall < 1:
        # Too few to tell: what errors of a normal distribution need where a score is the threshold itself.
        found = max(found, NormalDist().inv_cdf(recall))
    return max(found, 0.0)


def gather(folder: RunFolder, ids: Sequence[str], fits: Sequence[Fit], limits: np.ndarray) -> Evidence:
    """Of the pairs of some queries that reach their limits [Q], by a pilot's fits."""
    steps = len(fits)
    found = [np.zeros((2, 0, steps)), *_of_blocks(folder, ids, fits, np.where(np.isfinite(limits), limits, np.inf))]
    return Evidence(*np.concatenate(found, 1))


def _of_blocks(folder: RunFolder, ids: Sequence[str], fits: Sequence[Fit], limits: np.ndarray) -> Iterator[np.ndarray]:
    place = {query: number for number, query in enumerate(ids)}
    for block in score_blocks(folder):
        own = [at for at, query in enumerate(block.queries) if query in place]
        if block.stage not in (PILOT, ESTIMATED) or not own:
            continue
        group, where = folder.group(block.key), np.array([place[block.queries[at]] for at in own])
        with np.errstate(invalid="ignore"):
            best = np.nonzero(group.read("total")[own] >= limits[where, None])
        if not len(best[0]) or (block.stage == ESTIMATED and not _has_bars(group)):
            continue
        held = Estimates.read(group, own)
        estimates = [held.values, held.opening][: len(fits)]
        if all(x is not None for x in estimates):
            yield _of_pairs(held, estimates, best, [fit.of_some(where) for fit in fits], limits[where])


def _has_bars(group: Group) -> bool:
    """Whether a unit tells what its pairs had to reach: those of before do not."""
    return "limits" in group


def _of_pairs(
    held: Estimates, estimates: Sequence[np.ndarray | None], best: tuple[np.ndarray, ...], fits: Sequence[Fit],
    limits: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Needed and allowed [2, n, steps] of the pairs at ``best``."""
    queries, rows = best
    found = np.full((2, len(queries), len(fits)), np.inf)
    for step, (fit, values) in enumerate(zip(fits, estimates, strict=True)):
        assert values is not None
        error = fit.errors[queries] * held.sizes[rows]
        lowest = np.full(len(rows), -np.inf)
        if held.bars is not None:
            lowest = held.bars.limits[queries, step] - held.bars.rooms[queries, step] * held.sizes[rows]
        for what, estimate in enumerate((values[best], lowest)):
            below = limits[queries] - fit.offsets[queries] - fit.slopes[queries] * estimate
            # What is estimated exactly needs no margin.
            found[what, :, step] = np.divide(
                below, error, out=np.full_like(below, (0.0, np.inf)[what]), where=error > 0
            )
    return found


# what a run goes by


def trust_of_wave(
    folder: RunFolder, ids: Sequence[str], pilot: Pilot, found: Best, best: int, every: int, recall: float
) -> Trust:
    """By all waves before.

    Args:
        folder: of the run.
        ids: queries [Q].
        pilot: that they were in.
        found: of these queries.
        best: K.
        every: sequences that this is of.
        recall: the share of the best that is to be found.
    """
    fits, seen = pilot.fits, max(1, min(found.seen))
    margins = gather(folder, ids, fits, found.typical(best, every)).margins(recall, _OF_WAVES)
    return Trust.of(fits, [(1 + math.sqrt(_FEW / seen)) * margin for margin in margins])


@dataclass(frozen=True)
class Closing:
    """What is scored in the end.

    Attributes:
        bars: of every query, that pairs which were left out must reach to be scored after all.
        among: best pairs that were found before.
        recall: what share of the best has its score then; None: none was seen.
    """

    bars: Bars
    among: int
    recall: float | None


def closing(folder: RunFolder, ids: Sequence[str], best: int, recall: float) -> Closing:
    """Of the K best of some queries [Q]; nothing more where the share of them that is wanted has been found."""
    limits = best_so_far(folder, ids, best).largest[:, best - 1]
    place = {query: number for number, query in enumerate(ids)}
    # Where fewer than K are scored at all there is no limit.
    bars = Bars(np.where(np.isinf(limits), -np.inf, np.inf)[:, None].repeat(2, 1), np.zeros((len(ids), 2)))
    among, missed = 0, 0.0
    for own in company(folder, ids):
        pilot, where = read_pilot(folder, own), np.array([place[query] for query in own])
        assert pilot is not None, "they were in one"
        found = gather(folder, own, pilot.fits, limits[where])
        short = len(found.needed) * (1 - recall) < found.missed * recall or not len(found.needed)
        if short or _some_of_before(folder, own):
            margins = found.margins(recall, _IN_THE_END)
            more = Trust.of(pilot.fits, margins).bars(limits[where])
            bars.limits[where], bars.rooms[where] = more.limits, more.rooms
            found = found.allowing(margins)
        among, missed = among + len(found.needed), missed + found.missed
    return Closing(bars, among, among / (among + missed) if among else None)


def _some_of_before(folder: RunFolder, ids: Sequence[str]) -> bool:
    """Whether units of these queries do not tell what they may have missed."""
    asked = set(ids)
    return any(
        block.stage == ESTIMATED and not asked.isdisjoint(block.queries) and not _has_bars(folder.group(block.key))
        for block in score_blocks(folder)
    )
