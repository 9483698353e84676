"""What two-stage scoring goes by: the best scores so far, and how far estimates may be trusted, by its pilot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from raylux.cost.two_stage import Seen
from raylux.engine.bars import FINE, FIRST, Bars
from raylux.engine.context import Context
from raylux.engine.stages import prefilter
from raylux.engine.stages.query import answerable
from raylux.store import CHOSEN, PILOT, RunFolder, score_blocks
from raylux.store.arrays import Group

# Of the pilot's best so many must be missed before their share tells anything.
_TELLING = 3
# Of the pairs that may be missed, the share that may be so by what comes first: a pair that this leaves open costs less
# than one that is scored, so that its margin is the wider one.
_FIRST = 0.3
# The smallest slope of a line, and size of a sequence beside the largest.
_SMALLEST = 1e-9


def rank_of(expected: float) -> int:
    """Of a threshold: of so many of the best expected among what was seen, rarely are there more.

    One that is too high leaves out sequences that run through the model again, one that is too low lets pairs through
    in vain: by scores of workload A of the benchmark two standard deviations cost less than three or one and a half.
    """
    return math.ceil(expected + 2 * math.sqrt(expected)) if expected else 1


@dataclass(frozen=True)
class Estimates:
    """Of pairs [Q, n].

    Attributes:
        values: estimates.
        sizes: [n] of the sequences, which errors are in proportion to.
        refined: whether an estimate is by all that is seen, or by what comes first.
        first: by what comes first, where both are known; otherwise None.
    """

    values: np.ndarray
    sizes: np.ndarray
    refined: np.ndarray
    first: np.ndarray | None = None

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
        return cls(values, sizes, refined, first)

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

    def of_some(self, places: Sequence[int]) -> Trust:
        """Of some of the queries."""
        return Trust(self.offsets[places], self.slopes[places], self.rooms[places])

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

    def trust(self, best: int, every: int, recall: float) -> Trust:
        """Such that this share of its best would be found.

        Args:
            best: K, of a query.
            every: sequences that this is of.
            recall: the share.
        """
        rank = max(1, round(best * self.total.shape[1] / every))
        # Halfway to the next: of few, one that stood at the threshold itself would be far from what most are.
        kth = -np.sort(-self.total, 1)[:, rank - 1 : rank + 1].mean(1, keepdims=True)
        among, own, fits = self.total >= kth, self.estimates, self.fits
        fine, off = fits[0].off(kth, own.values), fits[0].off(self.total, own.values)
        if own.first is None:
            return Trust.of(fits, [_told(fine[among], off, _surely(recall, among))])
        needed, kept = fits[1].off(kth, own.first), 1 - _FIRST * (1 - recall)
        first = _told(needed[among], fits[1].off(self.total, own.first), kept)
        left = fine[among & (needed <= first)]
        return Trust.of(fits, [_told(left, off, min(1.0, _surely(recall, among) / kept)), first])


def _surely(recall: float, among: np.ndarray) -> float:
    """A share of these pairs that leaves a standard error of what may be missed for chance."""
    missed = float(among.sum()) * (1 - recall)
    return recall if missed < _TELLING else 1 - (missed - math.sqrt(missed)) / float(among.sum())


def _told(needed: np.ndarray, off: np.ndarray, recall: float) -> float:
    """The standard errors that a share of some pairs need."""
    found = float(np.quantile(needed, recall))
    if len(needed) * (1 - recall) < _TELLING:
        # Too few to tell: what errors of a normal distribution need where a score is the threshold itself.
        found = max(found, float(np.sqrt(np.mean(off**2))) * NormalDist().inv_cdf(recall))
    return max(found, 0.0)


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


def trust_of(ctx: Context, ids: Sequence[str]) -> Trust:
    """Of queries [Q], for K and recall as they are now, by the pilots that each was in with others."""
    asked, best = {query.id for query in answerable(ctx)}, ctx.config.score.best
    assert best is not None
    company: dict[str, list[int]] = {}
    for number, block in enumerate(x for x in score_blocks(ctx.folder) if x.stage == PILOT):
        for query in asked.intersection(block.queries):
            company.setdefault(query, []).append(number)
    together: dict[tuple[int, ...], list[str]] = {}
    for query, numbers in sorted(company.items()):
        together.setdefault(tuple(numbers), []).append(query)
    found: dict[str, Trust] = {}
    for own in together.values():
        pilot = read_pilot(ctx.folder, own)
        assert pilot is not None, "they were in one"
        trust = pilot.trust(best, len(prefilter.union(ctx)), ctx.config.score.recall)
        found |= {query: trust.of_some([place]) for place, query in enumerate(own)}
    some = [found[query] for query in ids]
    return Trust(*(np.concatenate([getattr(x, own.name) for x in some]) for own in fields(Trust)))


def largest_scores(ctx: Context, ids: Sequence[str], count: int) -> tuple[np.ndarray, list[int]]:
    """The ``count`` largest scores of each query, descending, −inf beyond them; and the rows it was seen on."""
    place = {query: number for number, query in enumerate(ids)}
    largest, seen = np.full((len(ids), count), -np.inf), [0] * len(ids)
    for block in score_blocks(ctx.folder):
        own = [at for at, query in enumerate(block.queries) if query in place]
        if not own:
            continue
        total = ctx.folder.group(block.key).read("total")[own]
        where = [place[block.queries[at]] for at in own]
        held = np.concatenate([largest[where], np.where(np.isnan(total), -np.inf, total)], 1)
        largest[where] = -np.sort(-held, 1)[:, :count]
        if block.stage != CHOSEN:
            for at in where:
                seen[at] += len(block.rows)
    return largest, seen


def outcome(ctx: Context) -> dict[str, Any]:
    """What two stages came to: the share of pairs that are scored, and of the pilot's best that would be."""
    ids = [query.id for query in answerable(ctx)]
    best, trust = ctx.config.score.best, trust_of(ctx, ids)
    assert best is not None
    largest, _ = largest_scores(ctx, ids, best)
    place = {query: number for number, query in enumerate(ids)}
    scored = pairs = among = found = 0
    for block in score_blocks(ctx.folder):
        own = [at for at, query in enumerate(block.queries) if query in place]
        if not own:
            continue
        group = ctx.folder.group(block.key)
        total = group.read("total")[own]
        scored += int((~np.isnan(total)).sum())
        pairs += 0 if block.stage == CHOSEN else total.size
        if block.stage == PILOT:
            where = [place[block.queries[at]] for at in own]
            limits = largest[where, best - 1]
            best_here = total >= limits[:, None]
            among += int(best_here.sum())
            found += int((best_here & Estimates.read(group, own).reach(trust.of_some(where).bars(limits))).sum())
    return {
        "best": best, "queries": ids, "share": scored / pairs, "among": among,
        "recall": found / among if among else None,
    }  # fmt: skip
