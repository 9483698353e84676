"""Estimated scores of all pairs, a first stage before exact scores of the few that matter: leading directions.

In the eigenbasis a layer's score is Σ_ij V_ij G_ij with the preconditioned query V and the sequence's gradient
G = Σ_t g_t a_tᵀ, both [P, M]. Over sequences G_ij has mean square Λ_ij, so that a query's scores vary by V_ij² Λ_ij
from one entry, and nearly all of Σ V² Λ stands in few columns and some rows: activations have few large directions,
and 1 / (Λ + λ) keeps V small along the rest. An estimate is the sum over such a block of r rows and c columns:

- tokens are projected, T·(P·r + M·c) at most, and a gradient of r × c numbers is formed, never one of P × M;
- queries are cut to their blocks once, and put against it, Q·r·c;
- what is left out has a variance that Λ tells beforehand, the same for all sequences: a sequence with larger gradients
  has larger errors, but the best are all of that kind. So the blocks of all layers are chosen together, such that
  estimates and the pairs that they leave open cost least (``raylux.cost.two_stage``);
- most of what that costs are the products with all queries. They take the first few rows or columns of a block, the
  narrower side's; what these leave open is put against the rest of the block, pair by pair, before any gradient is
  formed.

A curvature without a basis has its Λ in the coordinates themselves; where nothing was fitted, directions and mean
squares are those of the queries, which are gradients then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from raylux.blocks import Blocks, Square
from raylux.cost.two_stage import Seen, projecting_cost, relative_cost, share_within
from raylux.curvature.spectral import Spectral
from raylux.influence.dots import Held, in_memory, whole_blocks
from raylux.influence.sampled import PIECE, no_scores, sampled
from raylux.profiling import of

Query = Tensor | tuple[Tensor, Tensor]
"""V [P, M], or its factors (left [P, R], right [M, R])."""

SEEN = 64
"""Queries whose variances say which directions matter, at least: blocks need not be exactly the best."""

# Standard errors that the choice of blocks allows for, as were taken on workload A of the benchmark: 2 to 3.4, and of
# what comes first 3 to 6.5, more for rarer pairs. Errors of sequences among the best are larger than most.
_ALLOWED, _ALLOWED_FIRST = 3.0, 5.0
# How much a variance left out counts for against a multiplication, from little to much.
_WEIGHTS = np.logspace(-5, 3, 65)
# Of a layer's variance: what rounding may change, where nothing is left out.
_ROUNDING = 1e-8


@dataclass(frozen=True)
class Side:
    """Chosen directions of the inputs, or of the outputs, of a layer.

    Attributes:
        places: [r] of the eigenvectors, or of the coordinates themselves.
        vectors: [n, r]; None: coordinates are chosen.
        whole: all are chosen: tokens stay in the standard basis, into which queries are brought back.
    """

    places: Tensor
    vectors: Tensor | None
    whole: bool

    @classmethod
    def of(cls, places: Tensor, basis: Square | None, width: int) -> Side:
        if isinstance(basis, Blocks):
            like = basis.parts[0]
            basis = basis @ torch.eye(width, dtype=like.dtype, device=like.device)
        vectors = None if basis is None else basis[:, places].contiguous()
        return cls(places, vectors, vectors is not None and len(places) == width)

    def project(self, x: Tensor) -> Tensor:
        """x [..., n] in the standard basis, along the directions [..., r]; as it is where they are all."""
        if self.whole:
            return x
        return x[..., self.places] if self.vectors is None else x @ self.vectors

    def part(self, x: Tensor, inside: bool) -> Tensor:
        """[r, m] of x [n, m] in the eigenbasis (``inside``) or in the standard one."""
        return x[self.places] if inside or self.vectors is None else self.vectors.T @ x

    def back(self, x: Tensor) -> Tensor:
        """What ``project`` leaves is put against: x [..., r, m] along the directions, or in the standard basis."""
        return self.vectors @ x if self.whole and self.vectors is not None else x


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
            total += energy / max(variances[-1], _tiny(energy))
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
class Block:
    """What an estimate sees of a layer.

    Attributes:
        outputs: r directions of g.
        inputs: c of a.
        values: Λ of them [r, c].
        beyond: see ``Cut``.
        seen: in numbers.
    """

    outputs: Side
    inputs: Side
    values: Tensor
    beyond: float
    seen: Seen

    @classmethod
    def of(cls, cut: Cut, curvature: Spectral) -> Block:
        whole = curvature.values
        assert whole is not None
        values = whole[cut.rows][:, cut.columns]
        sides = (Side.of(cut.rows, curvature.q_s, whole.shape[0]), Side.of(cut.columns, curvature.q_a, whole.shape[1]))
        return cls(*sides, values, cut.beyond, cut.seen)

    def gradients(self, a: Tensor, g: Tensor) -> Tensor:
        """[N, r·c], laid out as ``flat`` has it, of a [N, T, M] and g [N, T, P] in the standard basis.

        On a CPU one by one, since they would depend on how many stand in a batch (``products.gradients_into``).
        """
        a, g = whole_blocks(a), whole_blocks(g)
        if a.is_cuda:
            return self._of(a, g)
        return torch.cat([self._of(own_a, own_g) for own_a, own_g in zip(a.split(1), g.split(1), strict=True)])

    def _of(self, a: Tensor, g: Tensor) -> Tensor:
        rows, columns = self.values.shape
        # Many directions are cheaper taken of what few directions of the other side have left of a gradient.
        if rows > 2 * columns:
            return self.flat(self.outputs.project(torch.bmm(self.inputs.project(a).mT, g)).mT)
        if columns > 2 * rows:
            return self.flat(self.inputs.project(torch.bmm(self.outputs.project(g).mT, a)))
        return self.flat(torch.bmm(self.outputs.project(g).mT, self.inputs.project(a)))

    def flat(self, x: Tensor) -> Tensor:
        """[N, r·c] of x [N, r, c], the narrower side's directions one after another."""
        return (x.mT if self.seen.columns <= self.seen.rows else x).flatten(1)

    def pieces(self, x: Tensor) -> list[Tensor]:
        """What does not come first of x [n, r·c], ``PIECE`` entries at most of each."""
        return [x[:, start : start + PIECE] for start in range(self.seen.before, x.shape[1], PIECE)]

    def query(self, v: Query, inside: bool) -> Tensor:
        """[r, c] of V [P, M], or its factors, in the eigenbasis (``inside``) or in the standard one."""
        if not isinstance(v, Tensor):
            left, right = v
            return self.outputs.part(left, inside) @ self.inputs.part(right, inside).T
        rows, columns = self.values.shape
        if columns <= rows:
            return self.outputs.part(self.inputs.part(v.T, inside).T, inside)
        return self.inputs.part(self.outputs.part(v, inside).T, inside).T

    def back(self, queries: Tensor) -> Tensor:
        """What ``gradients`` are put against, [Q, r·c] of [Q, r, c]."""
        return self.flat(self.inputs.back(self.outputs.back(queries).mT).mT)


def counts(width: int) -> list[int]:
    """Numbers of directions of a side that are looked at: powers of two and the means between them, and all."""
    found = {width}
    for power in range(width.bit_length()):
        found |= {1 << power, 3 << power}
    return sorted(number for number in found if number <= width)


def choose(
    surveys: Mapping[str, Survey], tokens: float, queries: int, wanted: float, by_steps: bool = True
) -> dict[str, Cut]:
    """What estimates see of each layer, such that all of two-stage scoring is cheapest.

    Args:
        surveys: of every layer.
        tokens: T, of a sequence.
        queries: Q.
        wanted: share of a query's sequences that are among its best.
        by_steps: some of a block may come first; otherwise all of it is put against every query.
    """
    layers = list(surveys.values())
    shapes = [survey.shape for survey in layers]
    whole = (tokens + queries) * sum(outputs * inputs for outputs, inputs in shapes)
    total = np.maximum(sum(survey.variances for survey in layers), np.finfo(np.float64).tiny)
    parts = [float((survey.variances / total).mean()) for survey in layers]
    costs, missed = [], []
    for survey, part in zip(layers, parts, strict=True):
        outputs, inputs = map(counts, survey.shape)
        cost = [[projecting_cost(survey.shape, tokens, (r, c)) + queries * r * c for r in outputs] for c in inputs]
        costs.append(np.array(cost) / whole)
        missed.append(part * np.maximum(1 - survey.held, 0.0))
    least, best = math.inf, {}
    for weight in _WEIGHTS:
        picked = [
            divmod(int(np.argmin(cost + weight * lost)), cost.shape[1])
            for cost, lost in zip(costs, missed, strict=True)
        ]
        error = _error(sum(lost[place] for lost, place in zip(missed, picked, strict=True)))
        share = share_within(wanted, _ALLOWED * error)
        for found in _firsts(layers, parts, picked, queries / whole, by_steps):
            estimates = sum(
                projecting_cost(x.shape, tokens, y.block) + queries * y.before
                for x, y in zip(layers, found.seen, strict=True)
            )
            refined = queries * sum(y.after for y in found.seen) * share_within(wanted, _ALLOWED_FIRST * found.error)
            expected = relative_cost(shapes, tokens, queries, share, estimates=estimates, refined=refined)
            if expected < least:
                least = expected
                best = dict(
                    zip(surveys, ((*place, y.first) for place, y in zip(picked, found.seen, strict=True)), strict=True)
                )
    return {name: survey.cut(*best[name]) for name, survey in surveys.items()}


@dataclass(frozen=True)
class _Firsts:
    """What comes first of each layer, and the error of what is estimated by it, in spreads of a query's scores."""

    seen: list[Seen]
    error: float


def _firsts(
    layers: Sequence[Survey], parts: Sequence[float], picked: Sequence[tuple[int, int]], each: float, by_steps: bool
) -> Iterator[_Firsts]:
    """From all of each block to little of it.

    Args:
        layers: what is known of them.
        parts: of a query's variance, a layer's.
        picked: its columns and rows, as ``Survey.cut`` takes them.
        each: cost of an entry.
        by_steps: as ``choose`` has it.
    """
    seen, costs, missed = [], [], []
    for survey, part, (columns, rows) in zip(layers, parts, picked, strict=True):
        numbers, held = survey.firsts(columns, rows)
        block = counts(survey.shape[0])[rows], counts(survey.shape[1])[columns]
        seen.append([Seen(*block, number) for number in numbers])
        costs.append(np.array([each * own.before for own in seen[-1]]))
        missed.append(part * np.maximum(1 - held, 0.0))
    known = set()
    for weight in (math.inf, *_WEIGHTS[::2]) if by_steps else (math.inf,):
        places = tuple(
            len(cost) - 1 if weight == math.inf else int(np.argmin(cost + weight * lost))
            for cost, lost in zip(costs, missed, strict=True)
        )
        if places not in known:
            known.add(places)
            error = _error(sum(lost[place] for lost, place in zip(missed, places, strict=True)))
            yield _Firsts([own[place] for own, place in zip(seen, places, strict=True)], error)


@dataclass(frozen=True)
class LayerEstimates:
    """The queries of a layer, cut to its block.

    Attributes:
        block: which.
        first: [Q, entries] of the queries, what is put against every sequence.
        rest: of the other entries, [Q, PIECE] at most of each.
        missed: [Q, 2] variance of what is left out of a query's scores: of the block, and of what comes first alone.
    """

    block: Block
    first: Held
    rest: list[Held]
    missed: Tensor

    @classmethod
    def build(
        cls, block: Block, queries: Sequence[Query], inside: bool, hold: Callable[[Tensor], Held] = in_memory
    ) -> LayerEstimates:
        """Of V, in the eigenbasis or not; ``hold`` puts what is made of them where it rests."""
        found = torch.stack([block.query(v, inside) for v in queries])
        variances = block.flat(found.square() * block.values)
        beyond = block.beyond * variances.sum(1)
        missed = torch.stack([beyond, beyond + variances[:, block.seen.before :].sum(1)], 1)
        laid = block.back(found)
        rest = [hold(part.contiguous()) for part in block.pieces(laid)]
        return cls(block, hold(laid[:, : block.seen.before].contiguous()), rest, missed)

    def gradients(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """[N, r·c] of batches: a [N, T, M] and g [N, T, P] of each, in the standard basis."""
        with of("form"):
            return torch.cat([self.block.gradients(a, g) for a, g in batches])

    def estimates(self, gradients: Tensor, rows: int) -> Tensor:
        """What the scores [N, Q] of gradients [N, r·c] may be, by what comes first.

        Args:
            gradients: of the block.
            rows: of each product, so that an estimate does not depend on how many there are.
        """
        return self._products(gradients[:, : self.block.seen.before], self.first, rows)

    def refinements(self, gradients: Tensor, chosen: Tensor | None, rows: int) -> Tensor:
        """What the rest of the block adds [N, Q]; zero where a pair is not ``chosen`` [N, Q], None: of all."""
        parts = self.block.pieces(gradients)
        if chosen is None:
            every = (self._products(part, piece, rows) for part, piece in zip(parts, self.rest, strict=True))
            return sum(every, torch.zeros((), dtype=gradients.dtype, device=gradients.device))
        total = no_scores(chosen, gradients.dtype)
        for part, piece in zip(parts, self.rest, strict=True):
            with of("dot"):
                total = sampled(total, piece(), part)
        return total.to_dense().T

    @staticmethod
    def _products(gradients: Tensor, held: Held, rows: int) -> Tensor:
        with of("dot"):
            queries, count = held(), len(gradients)
            filled = torch.nn.functional.pad(gradients, (0, 0, 0, -count % rows))
            return torch.cat([part @ queries.T for part in filled.split(rows)])[:count]


def principal(queries: Callable[[], Iterable[Tensor]]) -> Spectral:
    """The directions of some queries V [P, M], which are gone through twice, and their mean squares along them."""
    inputs = outputs = torch.zeros(())
    for v in queries():
        weighed = v / v.norm().clamp_min(_tiny(v))
        inputs, outputs = inputs.to(v) + weighed.T @ weighed, outputs.to(v) + weighed @ weighed.T
    found = Spectral(None, torch.linalg.eigh(inputs)[1], torch.linalg.eigh(outputs)[1])
    squares = [found.into(v).square() for v in queries()]
    found.values = sum(squares[1:], squares[0]) / len(squares)
    return found


def _error(missed: float) -> float:
    """Of an estimate that a share of the variance is missing from, in spreads of a query's scores.

    Were entries independent it would be the root. They are not: the leading ones add up more than the others do. On
    workload A of the benchmark 0.48, 0.21, 0.11 and 0.054 were found for shares of 0.31, 0.10, 0.055 and 0.030.
    """
    return min(math.sqrt(missed), 2 * missed)


def _largest(x: Tensor) -> Tensor:
    return torch.sort(x, descending=True, stable=True)[1]


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
