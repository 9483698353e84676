"""s_test of a block of queries in one layer, and what rounding it does to scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from raylux.blocks import Rotation
from raylux.cost.contraction import rotate_tokens_first
from raylux.curvature import Spectral, rotate
from raylux.engine.records import as_rotation
from raylux.influence.dots import sequence_gradients
from raylux.influence.words import WordGradient
from raylux.products import wide_product
from raylux.routed import whole_blocks

# Scores that are taken both ways: of a block's first query on the sequences of so many queries after it.
_PAIRS = 3
# Token rows of a product with a basis; the last one of a block is filled up with zeros. A token's bits depend on the
# product's shape: so it is the same however many queries stand in the block.
_ROWS = 256

Tokens = tuple[Tensor, Tensor]
"""a [T, M] and g [T, P] of a query."""


@dataclass(frozen=True)
class Solved:
    """A block of queries in one layer.

    Attributes:
        s_test: [Q, P, M], in the precision of the products.
        squares: ‖∇f‖² of each.
        pairs: [2, n] scores of the first query on the next ones' sequences (on its own where it is alone): exact,
            and by s_test and products as they will be; equal where nothing is rounded.
    """

    s_test: Tensor
    squares: list[float]
    pairs: np.ndarray


def solve_layer(
    curvature: Spectral,
    tokens: Sequence[Tokens],
    damping: float,
    dtype: torch.dtype,
    eigen: bool,
    given: Sequence[Tensor] | None = None,
) -> Solved:
    """(G + λI)⁻¹ of each query's gradient.

    Args:
        curvature: of the layer; its bases are in float32 or better.
        tokens: per query, in the precision of the bases; the gradient is Σ_t g_t a_tᵀ.
        damping: λ.
        dtype: of the result; where it is bf16, products with tokens are too (see ``RoundedBasis``), those that bring
            a formed gradient into or out of the eigenbasis never.
        eigen: leave the result in the eigenbasis.
        given: the solution of each query [P, M], where another solver has found it.

    Raises:
        NumericsError: λ = 0 where Λ has a zero.
    """
    wide = tokens[0][0].dtype
    bases = as_rotation(curvature.q_a, dtype), as_rotation(curvature.q_s, dtype)
    inverse = curvature.inverse(damping) if given is None else None
    some = _compared(tokens)
    solved = tokens[0][0].new_empty(len(tokens), tokens[0][1].shape[1], tokens[0][0].shape[1], dtype=dtype)
    squares, exact, rounded = [], [], []
    first = torch.zeros(0)
    for place, gradient in enumerate(_gradients(curvature, tokens, bases)):
        flat = gradient.flatten()
        squares.append(float(torch.dot(flat, flat)))  # a float64 sum of squares takes fifteen times as long
        if given is not None:
            divided = curvature.into(given[place])
        else:
            divided = gradient if inverse is None else gradient * inverse
        if eigen:
            solved[place] = divided
        else:
            solved[place] = curvature.back(divided) if given is None else given[place]
        first = divided if place == 0 else first
        if place in some:
            exact.append(float((first * gradient).sum(dtype=torch.float64)))
            rounded.append(_score(solved[0], tokens[place], bases if eigen else None) if dtype != wide else exact[-1])
    return Solved(solved, squares, np.array([exact, rounded]))


@dataclass(frozen=True)
class SolvedWords:
    """As ``Solved``, in the word embedding: of a kind without curvature, so the gradient itself."""

    s_test: list[WordGradient]
    squares: list[float]
    pairs: np.ndarray


def solve_words(tokens: Sequence[Tokens], dtype: torch.dtype) -> SolvedWords:
    """Each query's gradient by the words that it holds.

    Args:
        tokens: per query, ids [T, 1] and g [T, P].
        dtype: of the result.
    """
    gradients = [WordGradient.of(ids, g) for ids, g in tokens]
    rounded = [gradient.to(dtype) for gradient in gradients]
    pairs = [[each[0].dot(each[place]) for place in _compared(tokens) if place < len(each)]
             for each in (gradients, rounded)]  # fmt: skip
    return SolvedWords(rounded, [gradient.dot(gradient) for gradient in gradients], np.array(pairs))


def _compared(tokens: Sequence[Tokens]) -> range:
    """Places of the queries on whose sequences the first is scored both ways."""
    return range(1, _PAIRS + 1) if len(tokens) > 1 else range(1)


Bases = tuple[Rotation | None, Rotation | None]


def _score(s_test: Tensor, tokens: Tokens, bases: Bases | None) -> float:
    """⟨s_test, G⟩ of operands that are rounded as those of the score stage are; s_test may be in an eigenbasis."""
    a, g = (x.to(s_test.dtype).unsqueeze(0) for x in tokens)
    if bases is not None:
        a, g = rotate(a, bases[0]), rotate(g, bases[1])
    return float((sequence_gradients(a, g)[0].float() * s_test.float()).sum(dtype=torch.float64))


def _gradients(curvature: Spectral, tokens: Sequence[Tokens], bases: Bases) -> Iterator[Tensor]:
    """Q_Sᵀ G Q_A of each query, in the precision of the tokens.

    By the cheaper way: its tokens rotated, or G. Which that is follows from a query's own length, and so do the shapes
    of all products but that with the bases: what stands beside it in the block is not to change its bits.
    """
    short = [place for place, (a, g) in enumerate(tokens) if rotate_tokens_first(len(a), g.shape[1], a.shape[1])]
    turned = [_rotated([tokens[place][side] for place in short], bases[side]) for side in range(2)]
    pairs = dict(zip(short, zip(*turned, strict=True), strict=True))
    for place, (a, g) in enumerate(tokens):
        if place in pairs:
            own_a, own_g = pairs.pop(place)
            yield wide_product(own_g.T, own_a).to(a.dtype)
        else:
            yield curvature.into(g.T @ a)


def _rotated(tokens: Sequence[Tensor], basis: Rotation | None) -> list[Tensor]:
    """x Q of each x [T, D], those of all queries in products of one shape; rows of zeros behind each, up to whole
    blocks."""
    if not tokens:
        return []
    sizes = [whole_blocks(len(x)) for x in tokens]
    ends = list(accumulate(sizes))
    rows = tokens[0].new_zeros(-(-ends[-1] // _ROWS) * _ROWS, tokens[0].shape[1])
    for end, size, x in zip(ends, sizes, tokens, strict=True):
        rows[end - size : end - size + len(x)] = x
    turned = torch.cat([rotate(part, basis) for part in rows.split(_ROWS)])
    return [turned[end - size : end] for end, size in zip(ends, sizes, strict=True)]
