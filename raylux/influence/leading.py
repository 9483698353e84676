"""Estimated scores of all pairs, a first stage before exact scores of the few that matter: leading directions.

In the eigenbasis a layer's score is Σ_ij V_ij G_ij with the preconditioned query V and the sequence's gradient
G = Σ_t g_t a_tᵀ, both [P, M]. Over sequences G_ij has mean square Λ_ij, so that a query's scores vary by V_ij² Λ_ij
from one entry, and nearly all of Σ V² Λ stands in few columns and some rows: activations have few large directions,
and 1 / (Λ + λ) keeps V small along the rest. An estimate is the sum over such a block of r rows and c columns:

- tokens are projected, T·(P·r + M·c) at most, and a gradient of r × c numbers is formed, never one of P × M;
- queries are cut to their blocks once, and put against it, Q·r·c;
- what is left out has a variance that Λ tells beforehand, the same for all sequences: a sequence with larger gradients
  has larger errors, but the best are all of that kind. So the blocks of all layers are chosen together, such that
  estimates and the pairs that they leave open cost least (``raylux.cost.two_stage``).

A curvature without a basis has its Λ in the coordinates themselves; where nothing was fitted, directions and mean
squares are those of the queries, which are gradients then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raylux.blocks import Blocks, Square
from raylux.cost.two_stage import block_cost, relative_cost, share_within
from raylux.curvature.spectral import Spectral
from raylux.influence.dots import Held, in_memory, whole_blocks
from raylux.profiling import of

Query = Tensor | tuple[Tensor, Tensor]
"""V [P, M], or its factors (left [P, R], right [M, R])."""

SEEN = 64
"""Queries whose variances say which directions matter, at least: blocks need not be exactly the best."""

# Standard errors that the choice of blocks allows for: 99 of 100 of the wanted pairs lie within, were errors normal.
_ALLOWED = 2.33
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

    def cut(self, columns: int, rows: int) -> Cut:
        """The ``columns``-th of ``counts(M)`` and the ``rows``-th of ``counts(P)``."""
        outputs, inputs = self.shape
        beyond = max(1 / max(self.held[columns, rows], _ROUNDING) - 1, _ROUNDING)
        own = self.rows[columns][: counts(outputs)[rows]]
        return Cut(own, self.columns[: counts(inputs)[columns]], beyond)


@dataclass(frozen=True)
class Cut:
    """Which rows and columns of a layer an estimate sees.

    Attributes:
        rows: [r] places.
        columns: [c].
        beyond: variance of what is left out, in that of the block.
    """

    rows: Tensor
    columns: Tensor
    beyond: float

    @property
    def shape(self) -> tuple[int, int]:
        """(r, c)."""
        return len(self.rows), len(self.columns)


@dataclass(frozen=True)
class Block:
    """What an estimate sees of a layer.

    Attributes:
        outputs: r directions of g.
        inputs: c of a.
        values: Λ of them [r, c].
        beyond: see ``Cut``.
    """

    outputs: Side
    inputs: Side
    values: Tensor
    beyond: float

    @classmethod
    def of(cls, cut: Cut, curvature: Spectral) -> Block:
        whole = curvature.values
        assert whole is not None
        values = whole[cut.rows][:, cut.columns]
        sides = (Side.of(cut.rows, curvature.q_s, whole.shape[0]), Side.of(cut.columns, curvature.q_a, whole.shape[1]))
        return cls(*sides, values, cut.beyond)

    def gradients(self, a: Tensor, g: Tensor) -> Tensor:
        """[N, r·c] of a [N, T, M] and g [N, T, P] in the standard basis.

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
            return self.outputs.project(torch.bmm(self.inputs.project(a).mT, g)).mT.flatten(1)
        if columns > 2 * rows:
            return self.inputs.project(torch.bmm(self.outputs.project(g).mT, a)).flatten(1)
        return torch.bmm(self.outputs.project(g).mT, self.inputs.project(a)).flatten(1)

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
        return self.inputs.back(self.outputs.back(queries).mT).mT.flatten(1)


def counts(width: int) -> list[int]:
    """Numbers of directions of a side that are looked at: powers of two and the means between them, and all."""
    found = {width}
    for power in range(width.bit_length()):
        found |= {1 << power, 3 << power}
    return sorted(number for number in found if number <= width)


def choose(surveys: Mapping[str, Survey], tokens: float, queries: int, wanted: float) -> dict[str, Cut]:
    """What estimates see of each layer, such that all of two-stage scoring is cheapest.

    Args:
        surveys: of every layer.
        tokens: T, of a sequence.
        queries: Q.
        wanted: share of a query's sequences that are among its best.
    """
    shapes = [survey.shape for survey in surveys.values()]
    whole = (tokens + queries) * sum(outputs * inputs for outputs, inputs in shapes)
    total = np.maximum(sum(survey.variances for survey in surveys.values()), np.finfo(np.float64).tiny)
    costs, missed = [], []
    for survey in surveys.values():
        outputs, inputs = map(counts, survey.shape)
        cost = [[block_cost(survey.shape, tokens, queries, (r, c)) for r in outputs] for c in inputs]
        costs.append(np.array(cost) / whole)
        missed.append(float((survey.variances / total).mean()) * np.maximum(1 - survey.held, 0.0))
    least, best = math.inf, [0] * len(shapes)
    for weight in _WEIGHTS:
        picked = [int(np.argmin(cost + weight * lost)) for cost, lost in zip(costs, missed, strict=True)]
        error = math.sqrt(sum(lost.flat[place] for lost, place in zip(missed, picked, strict=True)))
        estimates = sum(cost.flat[place] for cost, place in zip(costs, picked, strict=True)) * whole
        share = share_within(wanted, _ALLOWED * error)
        expected = relative_cost(shapes, tokens, queries, share, estimates=estimates)
        if expected < least:
            least, best = expected, picked
    found = {}
    for (name, survey), place, table in zip(surveys.items(), best, costs, strict=True):
        columns, rows = np.unravel_index(place, table.shape)
        found[name] = survey.cut(int(columns), int(rows))
    return found


@dataclass(frozen=True)
class LayerEstimates:
    """The queries of a layer, cut to its block.

    Attributes:
        block: which.
        queries: [Q, r·c].
        missed: [Q] variance of what is left out of a query's scores.
    """

    block: Block
    queries: Held
    missed: Tensor

    @classmethod
    def build(
        cls, block: Block, queries: Sequence[Query], inside: bool, hold: Callable[[Tensor], Held] = in_memory
    ) -> LayerEstimates:
        """Of V, in the eigenbasis or not; ``hold`` puts what is made of them where it rests."""
        found = torch.stack([block.query(v, inside) for v in queries])
        missed = block.beyond * (found.square() * block.values).sum((1, 2))
        return cls(block, hold(block.back(found)), missed)

    def estimates(self, batches: Sequence[tuple[Tensor, Tensor]], rows: int) -> Tensor:
        """What the scores [N, Q] of some batches may be.

        Args:
            batches: a [N, T, M] and g [N, T, P] of each, in the standard basis.
            rows: of each product, so that an estimate does not depend on how many there are.
        """
        with of("form"):
            formed = torch.cat([self.block.gradients(a, g) for a, g in batches])
            count = len(formed)
            formed = torch.nn.functional.pad(formed, (0, 0, 0, -count % rows))
        with of("dot"):
            queries = self.queries()
            return torch.cat([part @ queries.T for part in formed.split(rows)])[:count]


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


def _largest(x: Tensor) -> Tensor:
    return torch.sort(x, descending=True, stable=True)[1]


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
