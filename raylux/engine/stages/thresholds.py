"""What two-stage scoring goes by: the best scores so far, and how far estimates may be trusted, by its pilot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from raylux.cost.two_stage import Seen
from raylux.engine.context import Context
from raylux.engine.estimating import Margins
from raylux.engine.stages import prefilter
from raylux.engine.stages.query import answerable
from raylux.store import CHOSEN, PILOT, score_blocks
from raylux.store.arrays import Group

# Of the pilot's best so many must be missed before their share tells anything.
_TELLING = 3
# Of the pairs that may be missed, the share that may be so by what comes first: a pair that this leaves open costs less
# than one that is scored, so that its margin is the wider one.
_FIRST = 0.3


def rank_of(expected: float) -> int:
    """Of a threshold: of so many of the best expected among what was seen, hardly ever are there more.

    A threshold that is too high costs more than one that is too low: what it left out runs through the model again.
    """
    return math.ceil(expected + 3 * math.sqrt(expected)) if expected else 1


@dataclass(frozen=True)
class Estimates:
    """Of pairs [Q, n].

    Attributes:
        values: estimates.
        errors: [Q, 2] standard errors of those by all that is seen, and by what comes first.
        refined: by which of the two an estimate is.
        first: by what comes first, where both are known; otherwise None.
    """

    values: np.ndarray
    errors: np.ndarray
    refined: np.ndarray
    first: np.ndarray | None = None

    @classmethod
    def read(cls, group: Group, places: Sequence[int]) -> Estimates:
        """Of some of a unit's queries."""
        values = group.read("estimate")[places].astype(np.float64)
        errors, refined = group.read("error")[places].astype(np.float64), np.ones(values.shape, bool)
        if "first" not in group and "refined" not in group:  # one step: an error of each query, or once of each pair
            errors = np.repeat(np.sqrt(np.mean(errors**2, 1, keepdims=True)), 2, 1)
        if "refined" in group:
            refined = np.unpackbits(group.read("refined")[places], 1, values.shape[1]).astype(bool)
        first = group.read("first")[places].astype(np.float64) if "first" in group else None
        return cls(values, errors, refined, first)

    def reach(self, limits: np.ndarray, margins: Sequence[Margins]) -> np.ndarray:
        """The pairs that may reach their query's limit [Q], by its margins."""
        fine, first = (np.array([getattr(own, name) for own in margins])[:, None] for name in ("fine", "first"))
        with np.errstate(invalid="ignore"):  # an error of nothing, infinitely often
            near, room = (
                np.where(np.isinf(x), x, x * error[:, None])
                for x, error in zip((fine, first), self.errors.T, strict=True)
            )
        found = self.values + np.where(self.refined, near, room) >= limits[:, None]
        return found if self.first is None else found & (self.first + room >= limits[:, None])

    def opened(self, limits: np.ndarray, margins: Margins) -> float:
        """Share of the pairs that what comes first leaves open."""
        if self.first is None:
            return 1.0
        by_first = Estimates(self.first, self.errors, np.zeros(self.first.shape, bool))
        return float(by_first.reach(limits, [margins] * len(limits)).mean())


@dataclass(frozen=True)
class Pilot:
    """Scores [Q, n] of the pilot, and estimates; what these see of each layer."""

    total: np.ndarray
    estimates: Estimates
    seen: dict[str, Seen]

    def margins(self, best: int, every: int, recall: float) -> Margins:
        """Standard errors that find this share of its best.

        Args:
            best: K, of a query.
            every: sequences that this is of.
            recall: the share.
        """
        rank = max(1, round(best * self.total.shape[1] / every))
        # Halfway to the next: of few, one that stood at the threshold itself would be far from what most are.
        kth = -np.sort(-self.total, 1)[:, rank - 1 : rank + 1].mean(1, keepdims=True)
        among = self.total >= kth
        own = self.estimates
        fine, off = self._needed(own.values, own.errors[:, :1], kth)
        if own.first is None:
            return Margins(_told(fine[among], off, _surely(recall, among)))
        needed, off_first = self._needed(own.first, own.errors[:, 1:], kth)
        kept = 1 - _FIRST * (1 - recall)
        first = _told(needed[among], off_first, kept)
        return Margins(_told(fine[among & (needed <= first)], off, min(1.0, _surely(recall, among) / kept)), first)

    def _needed(self, values: np.ndarray, error: np.ndarray, kth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """In standard errors: how far estimates lie below their thresholds, and off the scores."""
        with np.errstate(divide="ignore", invalid="ignore"):
            below, off = (np.where(error > 0, (x - values) / error, 0.0) for x in (kth, self.total))
        return below, off


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


def read_pilot(ctx: Context, ids: Sequence[str]) -> Pilot | None:
    """What pilots have of some queries; None: they have not all been in one."""
    totals, parts = [], []
    seen: dict[str, Seen] = {}
    for block in score_blocks(ctx.folder):
        if block.stage == PILOT and set(ids) <= set(block.queries):
            group, places = ctx.folder.group(block.key), [block.queries.index(query) for query in ids]
            totals.append(group.read("total")[places].astype(np.float64))
            parts.append(Estimates.read(group, places))
            if "seen" in group.attrs:  # a run of before estimated otherwise
                seen = {name: Seen.of(numbers) for name, numbers in group.attrs["seen"].items()}
    if not parts:
        return None
    firsts = [part.first for part in parts if part.first is not None]
    every = Estimates(
        np.concatenate([part.values for part in parts], 1),
        np.sqrt(np.mean([part.errors**2 for part in parts], 0)),
        np.concatenate([part.refined for part in parts], 1),
        np.concatenate(firsts, 1) if len(firsts) == len(parts) else None,
    )
    return Pilot(np.concatenate(totals, 1), every, seen)


def margins_of(ctx: Context) -> dict[str, Margins]:
    """Query -> the margins for K and recall as they are now, by the pilots that it was in with others."""
    asked, best = {query.id for query in answerable(ctx)}, ctx.config.score.best
    assert best is not None
    company: dict[str, list[int]] = {}
    for number, block in enumerate(x for x in score_blocks(ctx.folder) if x.stage == PILOT):
        for query in asked.intersection(block.queries):
            company.setdefault(query, []).append(number)
    together: dict[tuple[int, ...], list[str]] = {}
    for query, numbers in sorted(company.items()):
        together.setdefault(tuple(numbers), []).append(query)
    found: dict[str, Margins] = {}
    for ids in together.values():
        pilot = read_pilot(ctx, ids)
        assert pilot is not None, "they were in one"
        found |= dict.fromkeys(ids, pilot.margins(best, len(prefilter.union(ctx)), ctx.config.score.recall))
    return found


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
    best, margins = ctx.config.score.best, margins_of(ctx)
    assert best is not None
    largest, _ = largest_scores(ctx, ids, best)
    kth = dict(zip(ids, largest[:, best - 1], strict=True))
    scored = pairs = among = found = 0
    for block in score_blocks(ctx.folder):
        own = [at for at, query in enumerate(block.queries) if query in kth]
        if not own:
            continue
        group = ctx.folder.group(block.key)
        total = group.read("total")[own]
        scored += int((~np.isnan(total)).sum())
        pairs += 0 if block.stage == CHOSEN else total.size
        if block.stage == PILOT:
            limits, rooms = (
                np.array([kth[block.queries[at]] for at in own]),
                [margins[block.queries[at]] for at in own],
            )
            best_here = total >= limits[:, None]
            among += int(best_here.sum())
            found += int((best_here & Estimates.read(group, own).reach(limits, rooms)).sum())
    return {
        "best": best, "queries": ids, "share": scored / pairs, "among": among,
        "recall": found / among if among else None,
    }  # fmt: skip
