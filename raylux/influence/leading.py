"""Estimated scores of all pairs, a first stage before exact scores of the few that matter: leading directions.

In the eigenbasis a layer's score is Σ_ij V_ij G_ij with the preconditioned query V and the sequence's gradient
G = Σ_t g_t a_tᵀ, both [P, M]. Over sequences G_ij has mean square Λ_ij, so that a query's scores vary by V_ij² Λ_ij
from one entry, and nearly all of Σ V² Λ stands in few columns and some rows: activations have few large directions,
and 1 / (Λ + λ) keeps V small along the rest. An estimate is the sum over such a block of r rows and c columns:

- tokens are projected, T·(P·r + M·c) at most, and a gradient of r × c numbers is formed, never one of P × M;
- queries are cut to their blocks once, and put against it, Q·r·c;
- what is left out has a variance that Λ tells beforehand, on average over sequences. So the blocks of all layers are
  chosen together, such that estimates and the pairs that they leave open cost least (``raylux.influence.surveys``). How
  far off estimates really are is for whoever uses them to find out, by scores that are known;
- most of what that costs are the products with all queries. They take the first few rows or columns of a block, the
  narrower side's; what these leave open is put against the rest of the block, pair by pair, before any gradient is
  formed.

A curvature without a basis has its Λ in the coordinates themselves; where nothing was fitted, directions and mean
squares are those of the queries, which are gradients then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylux.blocks import Blocks, Square
from raylux.cost.two_stage import Seen
from raylux.curvature.spectral import Spectral
from raylux.influence.dots import Held, in_memory, whole_blocks
from raylux.influence.sampled import PIECE, no_scores, sampled
from raylux.influence.surveys import Cut, tiny
from raylux.profiling import of

Query = Tensor | tuple[Tensor, Tensor]
"""V [P, M], or its factors (left [P, R], right [M, R])."""


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

        Tokens in bf16 are widened: what is narrow gains nothing by it, and bases rounded to it would leak.
        On a CPU one by one, since they would depend on how many stand in a batch (``products.gradients_into``).
        """
        a, g = whole_blocks(a), whole_blocks(g)
        if a.is_cuda:
            return self._of(a, g)
        pairs = zip(a.split(1), g.split(1), strict=True)
        return torch.cat([self._of(own_a.to(self.values), own_g.to(self.values)) for own_a, own_g in pairs])

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
            left, right = (x.to(self.values) for x in v)
            return self.outputs.part(left, inside) @ self.inputs.part(right, inside).T
        rows, columns = self.values.shape
        v = v.to(self.values)
        if columns <= rows:
            return self.outputs.part(self.inputs.part(v.T, inside).T, inside)
        return self.inputs.part(self.outputs.part(v, inside).T, inside).T

    def back(self, queries: Tensor) -> Tensor:
        """What ``gradients`` are put against, [Q, r·c] of [Q, r, c]."""
        return self.flat(self.inputs.back(self.outputs.back(queries).mT).mT)


@dataclass(frozen=True)
class LayerEstimates:
    """The queries of a layer, cut to its block.

    Attributes:
        block: which.
        first: [Q, entries] of the queries, what is put against every sequence.
        rest: of the other entries, [Q, PIECE] at most of each.
        variances: [Q, 2] of a query's scores, and of what is left out of them by what comes first.
    """

    block: Block
    first: Held
    rest: list[Held]
    variances: Tensor

    @classmethod
    def build(
        cls, block: Block, queries: Sequence[Query], inside: bool, hold: Callable[[Tensor], Held] = in_memory
    ) -> LayerEstimates:
        """Of V, in the eigenbasis or not; ``hold`` puts what is made of them where it rests."""
        found = torch.stack([block.query(v, inside) for v in queries])
        variances = block.flat(found.square() * block.values)
        whole = (1 + block.beyond) * variances.sum(1)
        missed = block.beyond * variances.sum(1) + variances[:, block.seen.before :].sum(1)
        laid = block.back(found)
        rest = [hold(part.contiguous()) for part in block.pieces(laid)]
        return cls(block, hold(laid[:, : block.seen.before].contiguous()), rest, torch.stack([whole, missed], 1))

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
        weighed = v / v.norm().clamp_min(tiny(v))
        inputs, outputs = inputs.to(v) + weighed.T @ weighed, outputs.to(v) + weighed @ weighed.T
    found = Spectral(None, torch.linalg.eigh(inputs)[1], torch.linalg.eigh(outputs)[1])
    squares = [found.into(v).square() for v in queries()]
    found.values = sum(squares[1:], squares[0]) / len(squares)
    return found
