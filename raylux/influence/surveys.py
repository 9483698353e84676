"""Which entries of each layer's gradients estimates see: where the variance of scores stands, and what is cheapest.

Blocks of all layers are chosen together, from what some queries and Λ tell (``raylux.influence.leading``): the more is
seen of a gradient, the fewer pairs are left open, which have to be looked at closer and scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from raylux.cost.two_stage import Pace, Seen, estimates_cost, projecting_cost, relative_cost, share_within
from raylux.curvature.spectral import Spectral

SEEN = 64
"""Queries whose variances say which directions matter, at least: blocks need not be exactly the best."""

# Errors that the choice of blocks allows for (``_error``), as were found on workload A of the benchmark where 100 of
# 4,096 and of 16,384 sequences are wanted, in steps of estimates that are fitted to scores.
_ALLOWED, _ALLOWED_FIRST = 2.3, 4.0
# How much a variance left out counts for against a multiplication, from little to much.
_WEIGHTS = np.logspace(-5, 3, 65)
# Of a layer's variance: what rounding may change, where nothing is left out.
_ROUNDING = 1e-8


@dataclass(frozen=True)
class Cut:
    """Which rows and columns of a layer an estimate sees.

    Attributes:
        rows: [r] places.
        columns: [c].
        beyond: variance of what is left out, in that of the block.
        first: of the narrower side's directions, those that are put against every query; None: all.
    """

    rows: Tensor
    columns: Tensor
    beyond: float
    first: int | None = None

    @property
    def seen(self) -> Seen:
        """In numbers."""
        rows, columns = len(self.rows), len(self.columns)
        return Seen(rows, columns, min(rows, columns) if self.first is None else self.first)


@dataclass(frozen=True)
class Survey:
    """Where the variance of a layer's scores stands.

    Attributes:
        shape: (P, M).
        columns: [M] places, those of the largest variance first.
        rows: [P] likewise, for each of ``counts(M)`` columns; of the variance within these.
        held: [counts(M), counts(P)] share of a query's variance within so many columns and rows, a mean over queries.
        variances: [q] Σ V² Λ of each query that was seen.
    """

    shape: tuple[int, int]
    columns: Tensor
    rows: list[Tensor]
    held: np.ndarray
    variances: np.ndarray

    @classmethod
    def of(cls, queries: Iterable[Tensor], curvature: Spectral, inside: bool) -> Survey:
        """From some queries V [P, M], which lie in the eigenbasis (``inside``) or in the standard one."""
        assert curvature.values is not None
        total, variances = torch.zeros_like(curvature.values, dtype=torch.float64), []
        for v in queries:
            energy = (v if inside else curvature.into(v)).square() * curvature.values
            variances.append(float(energy.sum(dtype=torch.float64)))
            total += energy / max(variances[-1], tiny(energy))
        mean = total / len(variances)
        columns = _largest(mean.sum(0))
        rows, held, outputs = [], [], counts(len(mean))
        for count in counts(mean.shape[1]):
            within = mean[:, columns[:count]].sum(1)
            rows.append(_largest(within))
            held.append(within[rows[-1]].cumsum(0)[[number - 1 for number in outputs]].cpu().numpy())
        return cls((mean.shape[0], mean.shape[1]), columns, rows, np.stack(held), np.array(variances))

    def cut(self, columns: int, rows: int, first: int | None = None) -> Cut:
        """The ``columns``-th of ``counts(M)`` and the ``rows``-th of ``counts(P)``; ``first``: as ``Cut`` has it."""
        outputs, inputs = self.shape
        beyond = max(1 / max(self.held[columns, rows], _ROUNDING) - 1, _ROUNDING)
        found = Cut(self.rows[columns][: counts(outputs)[rows]], self.columns[: counts(inputs)[columns]], beyond)
        return found if first is None else replace(found, first=first)

    def firsts(self, columns: int, rows: int) -> tuple[list[int], np.ndarray]:
        """How many of the narrower side's directions may come first, all of them last; and what each has ``held``."""
        outputs, inputs = (counts(width) for width in self.shape)
        numbers, held = (
            (inputs[: columns + 1], self.held[: columns + 1, rows])
            if inputs[columns] <= outputs[rows]
            else (outputs[: rows + 1], self.held[columns, : rows + 1])
        )
        # Tokens of a side that is seen whole are not along its directions.
        whole = numbers[-1] == self.shape[1 if inputs[columns] <= outputs[rows] else 0]
        return (numbers[-1:], held[-1:]) if whole else (numbers, held)


def counts(width: int) -> list[int]:
    """Numbers of directions of a side that are looked at: powers of two and the means between them, and all."""
    found = {width}
    for power in range(width.bit_length()):
        found |= {1 << power, 3 << power}
    return sorted(number for number in found if number <= width)


def choose(
    surveys: Mapping[str, Survey], tokens: float, queries: int, wanted: float, pace: Pace, by_steps: bool = True
) -> dict[str, Cut]:
    """What estimates see of each layer, such that all of two-stage scoring is cheapest.

    Args:
        surveys: of every layer.
        tokens: T, of a sequence.
        queries: Q.
        wanted: share of a query's sequences that are among its best.
        pace: of what two stages take, in products of all pairs.
        by_steps: some of a block may come first; otherwise all of it is put against every query.
    """
    layers = list(surveys.values())
    shapes = [survey.shape for survey in layers]
    whole = (tokens + queries) * sum(outputs * inputs for outputs, inputs in shapes)
    total = np.maximum(sum(survey.variances for survey in layers), np.finfo(np.float64).tiny)
    parts = [float((survey.variances / total).mean()) for survey in layers]

    def expected(blocks: Sequence[_Option], firsts: Sequence[_Option]) -> float:
        share = share_within(wanted, _ALLOWED * _error(blocks))
        opened = share_within(wanted, _ALLOWED_FIRST * _rare_error(firsts))
        estimates, refined = estimates_cost(shapes, tokens, queries, [own.seen for own in firsts], opened)
        return relative_cost(shapes, tokens, queries, share, pace, estimates=estimates, refined=refined)

    found = (
        (blocks, firsts)
        for blocks in _frontier([_blocks(*own, tokens, queries) for own in zip(layers, parts, strict=True)], whole)
        for firsts in (
            _frontier([_firsts(*own, queries) for own in zip(layers, parts, blocks, strict=True)], whole)
            if by_steps
            else [blocks]
        )
    )
    _, best = min(found, key=lambda own: expected(*own))
    return {
        name: surveys[name].cut(own.columns, own.rows, own.seen.first) for name, own in zip(surveys, best, strict=True)
    }


@dataclass(frozen=True)
class _Option:
    """What may be seen of a layer.

    Attributes:
        columns: as ``Survey.cut`` takes them.
        rows: likewise.
        seen: in numbers.
        cost: multiplications of a sequence's estimates by what comes first.
        missed: share of a query's variance, that of all layers, which is not among what comes first.
    """

    columns: int
    rows: int
    seen: Seen
    cost: float
    missed: float


def _blocks(survey: Survey, part: float, tokens: float, queries: int) -> list[_Option]:
    """Of every size, all of which comes first; ``part``: of a query's variance, the layer's."""
    found = []
    for columns, c in enumerate(counts(survey.shape[1])):
        for rows, r in enumerate(counts(survey.shape[0])):
            cost = projecting_cost(survey.shape, tokens, (r, c)) + queries * r * c
            found.append(_Option(columns, rows, Seen.of((r, c)), cost, part * _missed(survey.held[columns, rows])))
    return found


def _firsts(survey: Survey, part: float, block: _Option, queries: int) -> list[_Option]:
    """From little of a block to all of it, whose own cost is that of its products alone."""
    found = []
    for first, held in zip(*survey.firsts(block.columns, block.rows), strict=True):
        seen = replace(block.seen, first=first)
        found.append(replace(block, seen=seen, cost=queries * seen.before, missed=part * _missed(held)))
    return found


def _missed(held: float) -> float:
    return max(1 - float(held), 0.0)


def _frontier(options: Sequence[Sequence[_Option]], whole: float) -> Iterable[tuple[_Option, ...]]:
    """An option of each layer, such that no others would miss less at the cost; the last of each to begin with.

    Args:
        options: of every layer.
        whole: multiplications that a variance is weighed against.
    """
    costs = [np.array([own.cost for own in layer]) for layer in options]
    missed = [np.array([own.missed for own in layer]) for layer in options]
    places = dict.fromkeys([tuple(len(layer) - 1 for layer in options)])
    for weight in whole * _WEIGHTS:
        places[tuple(int(np.argmin(cost + weight * lost)) for cost, lost in zip(costs, missed, strict=True))] = None
    return (tuple(layer[place] for layer, place in zip(options, own, strict=True)) for own in places)


def _error(options: Sequence[_Option]) -> float:
    """Of an estimate by what comes first, in spreads of a query's scores.

    Were entries independent it would be the root of the share of the variance that is missed. They are not: the leading
    ones add up more than the others do. On workload A of the benchmark 0.48, 0.21, 0.11 and 0.054 were found for shares
    of 0.31, 0.10, 0.055 and 0.030, and three quarters of it once scores were fitted to estimates; on the demo 0.20 and
    0.15 for 0.12 and 0.079.
    """
    missed = sum(own.missed for own in options)
    return min(math.sqrt(missed), 1.5 * missed)


def _rare_error(options: Sequence[_Option]) -> float:
    """Likewise of what comes first, as large as hardly any: the more is missed, the more errors are unlike one another.

    On workload A of the benchmark 99.7 % of the best were found within 0.9 and 2.5 spreads where 0.091 and 0.146 are
    missed.
    """
    missed = sum(own.missed for own in options)
    return min(1.0, 1.5 * missed * (1 + 8 * missed))


def _largest(x: Tensor) -> Tensor:
    return torch.sort(x, descending=True, stable=True)[1]


def tiny(x: Tensor) -> float:
    """The smallest number that its dtype divides by."""
    return torch.finfo(x.dtype).tiny
