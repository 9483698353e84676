"""Gradients of a word embedding, kept by token: what TracIn-WE multiplies (Yeh et al. 2022).

The gradient of a sequence by the embedding matrix [V, P] has a row for each of its tokens and zeros elsewhere: row w is
the sum of g over the positions where w stands, g the gradient of the loss by that position's embedding. The dot product
of two of them is Σ over shared tokens w of ⟨G_w, G'_w⟩ = Σ_{s,t} [x_s = y_t] g_s · g'_t, and no [V, P] is ever formed.
Here a is x itself: token ids, [N, T, 1] int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylux.profiling import of
from raylux.routed import Rows


def are_words(a: object) -> bool:
    """Whether these inputs are token ids."""
    return isinstance(a, Tensor) and not a.is_floating_point()


def wide(x: Tensor) -> Tensor:
    """In float32 or better: sums are not rounded."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class WordGradient:
    """A gradient by an embedding matrix: ``vectors`` [U, P] of the tokens ``ids`` [U] int64, ascending."""

    ids: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, ids: Tensor, g: Tensor) -> WordGradient:
        """From the ids of a sequence's tokens [T, 1] and g [T, P], one token after the other."""
        found = ids[:, 0].unique()
        # A product, as a GPU's sums by index come in any order.
        return cls(found, ((found[:, None] == ids[:, 0]).to(wide(g).dtype) @ wide(g)).to(g.dtype))

    def to(self, dtype: torch.dtype) -> WordGradient:
        """In another precision."""
        return WordGradient(self.ids, self.vectors.to(dtype))

    def at(self, ids: Tensor) -> Tensor:
        """The row of each of some tokens [..., P]; zeros where it has none."""
        if not len(self.ids):
            return self.vectors.new_zeros(*ids.shape, self.vectors.shape[1])
        places = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        return self.vectors[places] * (self.ids[places] == ids).unsqueeze(-1)

    def dot(self, other: WordGradient) -> float:
        """Σ over shared tokens of the dot products of their rows."""
        return float((wide(self.at(other.ids)) * wide(other.vectors)).sum(dtype=torch.float64))


def word_squares(a: Tensor, g: Tensor) -> Tensor:
    """‖G_n‖² [N], in float32 or better, from ids [N, T, 1] and g [N, T, P]."""
    gradients = [WordGradient.of(ids, own).vectors for ids, own in zip(a, g, strict=True)]
    return torch.stack([wide(vectors).square().sum() for vectors in gradients])


@dataclass
class WordQueries:
    """Queries of the word embedding, ready to be put against sequences: what ``LayerQueries`` are to other layers."""

    queries: Sequence[WordGradient]

    def scores(self, batches: Sequence[tuple[Rows, Rows]], rows: int | None = None, scratch: object = None) -> Tensor:
        """Scores [N, Q] of the sequences of some batches: ids [N, T, 1] and g [N, T, P] of each; no more is asked."""
        with of("dot"):
            found = [torch.stack([self._shares(query, a, g).sum(1) for query in self.queries], 1) for a, g in batches]
        return torch.cat(found)

    def token_scores(self, place: int, a: Rows, g: Rows) -> Tensor:
        """Each token's share of the score of query ``place``: [N, T]; those of a word sum to the word's share."""
        return self._shares(self.queries[place], a, g)

    @staticmethod
    def _shares(query: WordGradient, a: Rows, g: Rows) -> Tensor:
        assert isinstance(a, Tensor) and isinstance(g, Tensor), "an embedding's tokens are never routed"
        return (wide(query.at(a[..., 0])) * wide(g)).sum(2)
