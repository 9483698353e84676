"""What two-stage scoring goes by: the best scores so far, and how far estimates may be trusted, by its pilot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from raylux.engine.context import Context
from raylux.engine.stages import prefilter
from raylux.engine.stages.query import answerable
from raylux.store import CHOSEN, PILOT, score_blocks

# Of the pilot's best so many must be missed before their share tells anything.
_TELLING = 3


def rank_of(expected: float) -> int:
    """Of a threshold: of so many of the best expected among what was seen, hardly ever are there more.

    A threshold that is too high costs more than one that is too low: what it left out runs through the model again.
    """
    return math.ceil(expected + 3 * math.sqrt(expected)) if expected else 1


@dataclass(frozen=True)
class Pilot:
    """Scores, estimates and standard errors [Q, n] of the pilot; of each layer the block (r, c) that estimates see."""

    total: np.ndarray
    estimate: np.ndarray
    error: np.ndarray
    seen: dict[str, tuple[int, int]]

    def margin(self, best: int, every: int, recall: float) -> float:
        """Standard errors that find this share of its best.

        Args:
            best: K, of a query.
            every: sequences that this is of.
            recall: the share.
        """
        rank = max(1, round(best * self.total.shape[1] / every))
        kth = -np.sort(-self.total, 1)[:, rank - 1 : rank]
        with np.errstate(divide="ignore", invalid="ignore"):
            needed = np.where(self.error > 0, (kth - self.estimate) / self.error, 0.0)
            off = np.where(self.error > 0, (self.total - self.estimate) / self.error, 0.0)
        among = needed[self.total >= kth]
        found = float(np.quantile(among, recall))
        if len(among) * (1 - recall) < _TELLING:
            # Too few to tell: what errors of a normal distribution need where a score is the threshold itself.
            found = max(found, float(np.sqrt(np.mean(off**2))) * NormalDist().inv_cdf(recall))
        return max(found, 0.0)


def read_pilot(ctx: Context, ids: Sequence[str]) -> Pilot | None:
    """What pilots have of some queries; None: they have not all been in one."""
    parts: dict[str, list[np.ndarray]] = {"total": [], "estimate": [], "error": []}
    seen: dict[str, tuple[int, int]] = {}
    for block in score_blocks(ctx.folder):
        if block.stage == PILOT and set(ids) <= set(block.queries):
            group, places = ctx.folder.group(block.key), [block.queries.index(query) for query in ids]
            shape = len(ids), len(block.rows)
            for what, held in parts.items():  # an error is of a query, and once was of each pair
                held.append(np.broadcast_to(group.read(what)[places].astype(np.float64), shape))
            if "seen" in group.attrs:  # a run of before estimated otherwise
                seen = {name: (rows, columns) for name, (rows, columns) in group.attrs["seen"].items()}
    if not parts["total"]:
        return None
    return Pilot(**{what: np.concatenate(held, 1) for what, held in parts.items()}, seen=seen)


def margins_of(ctx: Context) -> dict[str, float]:
    """Query -> the margin for K and recall as they are now, by the pilots that it was in with others."""
    asked, best = {query.id for query in answerable(ctx)}, ctx.config.score.best
    assert best is not None
    company: dict[str, list[int]] = {}
    for number, block in enumerate(x for x in score_blocks(ctx.folder) if x.stage == PILOT):
        for query in asked.intersection(block.queries):
            company.setdefault(query, []).append(number)
    together: dict[tuple[int, ...], list[str]] = {}
    for query, numbers in sorted(company.items()):
        together.setdefault(tuple(numbers), []).append(query)
    found: dict[str, float] = {}
    for ids in together.values():
        pilot = read_pilot(ctx, ids)
        assert pilot is not None, "they were in one"
        found |= dict.fromkeys(ids, pilot.margin(best, len(prefilter.union(ctx)), ctx.config.score.recall))
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
            limit, margin = (np.array([of[block.queries[at]] for at in own])[:, None] for of in (kth, margins))
            best_here = total >= limit
            among += int(best_here.sum())
            found += int((best_here & (group.read("estimate")[own] + margin * group.read("error")[own] >= limit)).sum())
    return {
        "best": best, "queries": ids, "share": scored / pairs, "among": among,
        "recall": found / among if among else None,
    }  # fmt: skip
