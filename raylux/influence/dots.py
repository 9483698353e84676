"""Scores of captured sequences: ⟨s_test_q, G_n⟩ with G_n = Σ_t g_t a_tᵀ, layer by layer.

Contractions (DESIGN decision 6): form G_n and take one product against dense queries, T·P·M + Q·P·M per
sequence; or put low-rank queries against tokens, T·Q·R·(P + M). Which one a query takes in a layer depends
on that query and layer alone, and dense queries stand in tiles of fixed size, so a score has the same bits
whichever other queries are scored beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raylux.batches import ROW_BLOCK
from raylux.profiling import of

TILE = 8
"""Dense queries per matrix product; a shorter tile is filled with zeros."""

# Low-rank factors are put against tokens while that costs no more than this many dense dot products.
_TOKEN_CONTRACTION_LIMIT = 4.0


def sequence_gradients(a: Tensor, g: Tensor) -> Tensor:
    """G [N, P, M] from a [N, T, M] and g [N, T, P]."""
    return torch.bmm(g.mT, a)


def tokens_pay(rank: int, outputs: int, inputs: int, tokens: float) -> bool:
    """True where a low-rank query is cheaper put against tokens than expanded once and used dense."""
    return tokens * rank * (outputs + inputs) <= _TOKEN_CONTRACTION_LIMIT * outputs * inputs


@dataclass
class LayerQueries:
    """The preconditioned queries of one layer, ready to be put against sequences.

    Attributes:
        count: Q.
        tiles: dense s_test, each [TILE, P·M], zero where a query is not dense.
        factors: query -> (left [P, R], right [M, R]) of the low-rank ones, R never 1.
        shape: (P, M).
    """

    count: int
    shape: tuple[int, int]
    tiles: list[Tensor] = field(default_factory=list)
    factors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        shape: tuple[int, int],
        queries: Sequence[Tensor | tuple[Tensor, Tensor]],
        tokens: float,
    ) -> LayerQueries:
        """From each query's s_test: dense [P, M], or (left [P, R], right [M, R]).

        Args:
            shape: (P, M).
            queries: in order; a place in the list is the query's column in the scores.
            tokens: typical tokens per sequence, by which the contraction is chosen.
        """
        outputs, inputs = shape
        result = cls(len(queries), shape)
        dense: dict[int, Tensor] = {}
        for place, query in enumerate(queries):
            if isinstance(query, Tensor):
                dense[place] = query
            elif tokens_pay(query[0].shape[1], outputs, inputs, tokens):
                result.factors[place] = _no_vectors(*query)
            else:
                dense[place] = query[0] @ query[1].T
        if dense:
            some = next(iter(dense.values()))
            for start in range(0, len(queries), TILE):
                tile = torch.zeros(TILE, outputs * inputs, dtype=some.dtype, device=some.device)
                for place in range(start, min(start + TILE, len(queries))):
                    if place in dense:
                        tile[place - start] = dense[place].reshape(-1)
                result.tiles.append(tile)
        return result

    def scores(self, a: Tensor, g: Tensor) -> Tensor:
        """[N, Q] from a [N, T, M] and g [N, T, P]; a sequence's scores have the same bits in any company."""
        a, g = _whole_blocks(a), _whole_blocks(g)
        result = torch.zeros(len(a), self.count, dtype=a.dtype, device=a.device)
        if self.tiles:
            with of("form"):
                gradient = sequence_gradients(a, g).reshape(len(a), -1)
            with of("dot"):
                for index, tile in enumerate(self.tiles):
                    columns = result[:, index * TILE : (index + 1) * TILE]
                    columns += (gradient @ tile.T)[:, : columns.shape[1]]
        with of("dot"):
            for place, (left, right) in self.factors.items():
                result[:, place] += ((g @ left) * (a @ right)).sum((1, 2))
        return result

    def token_scores(self, place: int, a: Tensor, g: Tensor) -> Tensor:
        """Each token's share of the score of query ``place``: [N, T]; they sum to the sequence's score."""
        tokens = a.shape[1]
        a, g = _whole_blocks(a), _whole_blocks(g)
        with of("dot"):
            if place in self.factors:
                left, right = self.factors[place]
                return ((g @ left) * (a @ right)).sum(2)[:, :tokens]
            tile = self.tiles[place // TILE][place % TILE].reshape(self.shape)
            return ((g @ tile) * a).sum(2)[:, :tokens]


def _whole_blocks(x: Tensor) -> Tensor:
    """[N, T, ·] with rows of zeros behind each sequence up to whole blocks; batches of a run have them already.

    BLAS works on blocks of rows and takes the rest by another kernel: a token has the same bits wherever in the
    batch it stands only where every sequence has whole blocks.
    """
    rest = -x.shape[1] % ROW_BLOCK
    return torch.nn.functional.pad(x, (0, 0, 0, rest)) if rest else x


def _no_vectors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of rank 1 with a second column of zeros.

    A product with a single column is a matrix times a vector, which BLAS cuts into blocks of rows: a token's
    result then depends on where in the batch it stands. With two columns or more it does not.
    """
    if left.shape[1] != 1:
        return left, right
    return torch.nn.functional.pad(left, (0, 1)), torch.nn.functional.pad(right, (0, 1))


def squared_norms(inputs: Mapping[str, Tensor], grads: Mapping[str, Tensor], groups: Mapping[str, str]) -> Tensor:
    """‖G_n‖² over all layers, [N]."""
    total: Tensor | None = None
    for name, g in grads.items():
        part = sequence_gradients(inputs[groups[name]], g).square().sum((1, 2))
        total = part if total is None else total + part
    assert total is not None
    return total
