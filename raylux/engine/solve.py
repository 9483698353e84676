"""s_test of a block of queries in one layer, and what rounding it does to scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from raylux.blocks import FilledBasis, Rotation, RoundedBasis
from raylux.cost.contraction import rotate_tokens_first
from raylux.curvature import Spectral, rotate
from raylux.influence.dots import sequence_gradients
from raylux.influence.words import WordGradient
from raylux.products import aligned_width, rotated, rotation, wide_product
from raylux.routed import whole_blocks
from raylux.scratch import Scratch

# Scores that are taken both ways: of a block's first query on the sequences of so many queries after it, of so many
# tokens of each: of all of these and of halves of them, since an error that is seen at three scores alone may be five
# times as large at others.
_PAIRS, _CHECKED = 3, 32
# Token rows of a product with a basis; the last one of a block is filled up with zeros. A token's bits depend on the
# product's shape: so it is the same however many queries stand in the block. Where whole blocks of queries are sure to
# come, more rows keep the hardware busier: a product is twice as fast by AMX, at 1,024 columns.
_ROWS, _MANY_ROWS = 256, 1024

Tokens = tuple[Tensor, Tensor]
"""a [T, M] and g [T, P] of a query."""


@dataclass(frozen=True)
class Form:
    """How the queries of a run are solved, and left.

    Attributes:
        dtype: of s_test; where it is bf16, products with tokens are too (see ``RoundedBasis``), those that bring a
            formed gradient into or out of the eigenbasis never.
        eigen: leave s_test in the eigenbasis.
        many: whole blocks of queries are sure to come.
    """

    dtype: torch.dtype
    eigen: bool
    many: bool = False

    @property
    def rows(self) -> int:
        """Token rows of a product with a basis."""
        return _MANY_ROWS if self.many else _ROWS


@dataclass(frozen=True)
class Solved:
    """A block of queries in one layer.

    Attributes:
        s_test: [Q, P, M], in the precision of the products.
        squares: ‖∇f‖² of each.
        pairs: [2, n] scores of some tokens of the first query on samples of those of some of the next ones (of its own
            where it is alone): in full precision from the tokens as they came, and by s_test and products as they are
            taken; n = 0 where nobody asked.
    """

    s_test: Tensor
    squares: list[float]
    pairs: np.ndarray


def solve_layer(
    curvature: Spectral,
    tokens: Sequence[Tokens],
    damping: float,
    form: Form,
    given: Sequence[Tensor] | None = None,
    checked: bool = True,
    scratch: Scratch | None = None,
    found: Scratch | None = None,
) -> Solved:
    """(G + λI)⁻¹ of each query's gradient.

    Args:
        curvature: of the layer; its bases are in float32 or better.
        tokens: per query, in the precision of the bases or in bf16, wherever they lie; the gradient is Σ_t g_t a_tᵀ.
        damping: λ.
        form: how.
        given: the solution of each query [P, M], where another solver has found it.
        checked: take some scores both ways.
        scratch: memory for what is computed on the way; None: of its own.
        found: for the result; None: ``scratch``.

    Raises:
        NumericsError: λ = 0 where Λ has a zero.
    """
    outputs, inputs = tokens[0][1].shape[1], tokens[0][0].shape[1]
    scratch = scratch or Scratch()
    bases = rotation(curvature.q_a, form.dtype, scratch, "q_a"), rotation(curvature.q_s, form.dtype, scratch, "q_s")
    inverse = curvature.inverse(damping) if given is None else None
    solved = (found or scratch).take("s_test", (len(tokens), outputs, inputs), form.dtype, tokens[0][0].device)
    squares = []
    for place, gradient in enumerate(_gradients(curvature, tokens, bases, form.rows, scratch)):
        flat = gradient.flatten()
        squares.append(float(torch.dot(flat, flat)))  # a float64 sum of squares takes fifteen times as long
        own = gradient[:, :inputs]
        if given is not None:
            solved[place] = curvature.into(given[place]) if form.eigen else given[place]
        elif not form.eigen:
            solved[place] = curvature.back(own if inverse is None else own * inverse)
        elif inverse is not None and solved.dtype == own.dtype:
            torch.mul(own, inverse, out=solved[place])
        else:
            solved[place] = own if inverse is None else own.mul_(inverse)
    pairs = np.zeros((2, 0))
    if checked:
        first = None if given is None else given[0]
        pairs = _both_ways(curvature, tokens, damping, first, form, bases)
    return Solved(solved, squares, pairs)


@dataclass(frozen=True)
class SolvedWords:
    """As ``Solved``, in the word embedding: of a kind without curvature, so the gradient itself."""

    s_test: list[WordGradient]
    squares: list[float]
    pairs: np.ndarray


def solve_words(tokens: Sequence[Tokens], dtype: torch.dtype, checked: bool) -> SolvedWords:
    """Each query's gradient by the words that it holds.

    Args:
        tokens: per query, ids [T, 1] and g [T, P].
        dtype: of the result.
        checked: as in ``solve_layer``.
    """
    gradients = [WordGradient.of(ids, g) for ids, g in tokens]
    rounded = [gradient.to(dtype) for gradient in gradients]
    places = _compared(len(tokens)) if checked else ()
    samples = [WordGradient.of(*some) for place in places for some in _samples(_spread(tokens[place]))]
    pairs = [[gradients[0].dot(some) for some in samples], [rounded[0].dot(some.to(dtype)) for some in samples]]
    return SolvedWords(rounded, [gradient.dot(gradient) for gradient in gradients], np.array(pairs))


def _compared(count: int) -> range:
    """Places of the queries on whose sequences the first of a block is scored both ways."""
    return range(1, min(count, _PAIRS + 1)) if count > 1 else range(1)


Bases = tuple[Rotation | None, Rotation | None]


def _both_ways(
    curvature: Spectral, tokens: Sequence[Tokens], damping: float, given: Tensor | None, form: Form, bases: Bases
) -> np.ndarray:
    """``Solved.pairs``. What a whole query takes in float32 would be a third of the time of its block.

    Args:
        curvature: as in ``solve_layer``, like ``tokens``, ``damping`` and ``form``.
        tokens: see ``curvature``.
        damping: see ``curvature``.
        given: the first query's solution, where another solver has found it.
        form: see ``curvature``.
        bases: of the curvature, for products of ``form.dtype``.
    """
    places = _compared(len(tokens))
    some = {place: _spread(tokens[place]) for place in {0, *places}}

    def turned(place: int) -> Tokens:
        a, g = (_wide(x) for x in some[place])
        own_a, own_g = (x if q is None else rotated(x, q) for x, q in ((a, curvature.q_a), (g, curvature.q_s)))
        return own_a, own_g

    own_a, own_g = turned(0)
    first = curvature.divide(own_g.T @ own_a, damping) if given is None else curvature.into(given)
    wanted = [float(_summed(first, g.T @ a)) for place in places for a, g in _samples(turned(place))]
    if given is None:
        (gradient,) = _gradients(curvature, [some[0]], bases, _CHECKED, Scratch())
        first = curvature.divide(gradient[:, : some[0][0].shape[1]], damping)
    s_test = (first if form.eigen else curvature.back(first)).to(form.dtype)
    inside = bases if form.eigen else None
    return np.array([wanted, [score for place in places for score in _scores(s_test, some[place], inside)]])


def _spread(tokens: Tokens) -> Tokens:
    """Some tokens of a query, from all over it."""
    a, g = tokens
    rows = torch.linspace(0, len(a) - 1, min(len(a), _CHECKED), device=a.device).round().long()
    return a[rows], g[rows]


def _samples(tokens: Tokens) -> Iterator[Tokens]:
    """Of the tokens of a query all, either half, and every other one; some of these may have none."""
    half = len(tokens[0]) // 2
    for rows in (slice(None), slice(half), slice(half, None), slice(0, None, 2), slice(1, None, 2)):
        yield tokens[0][rows], tokens[1][rows]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def _scores(s_test: Tensor, tokens: Tokens, bases: Bases | None) -> Iterator[float]:
    """⟨s_test, G⟩ of samples, of operands that are rounded as those of the score stage are.

    ``bases``: s_test is in these eigenbases; None: in the standard one.
    """
    a, g = (x.to(s_test.dtype) for x in tokens)
    if bases is not None:
        a, g = rotate(a[None], bases[0])[0], rotate(g[None], bases[1])[0]
    wide = _wide(s_test)
    for own_a, own_g in _samples((a, g)):
        yield float(_summed(wide, _wide(sequence_gradients(own_a[None], own_g[None])[0])))


def _summed(x: Tensor, y: Tensor) -> Tensor:
    """Σ x y [P, M]; a sum that is in float64 throughout takes fifteen times as long."""
    return (x * y).sum(1).sum(dtype=torch.float64)


def _gradients(
    curvature: Spectral, tokens: Sequence[Tokens], bases: Bases, rows: int, scratch: Scratch
) -> Iterator[Tensor]:
    """Q_Sᵀ G Q_A of each query [P, M or more], in the precision of the curvature, zeros behind the rows of M.

    Each is valid until the next, and may be overwritten.

    By the cheaper way: its tokens rotated, or G. Which that is follows from a query's own length, and so do the shapes
    of all products but that with the bases: what stands beside it in the block is not to change its bits.
    """
    short = [place for place, (a, g) in enumerate(tokens) if rotate_tokens_first(len(a), g.shape[1], a.shape[1])]
    turned = [
        _rotated([tokens[place][side] for place in short], bases[side], rows, scratch, use)
        for side, use in enumerate(("a", "g"))
    ]
    pairs = dict(zip(short, zip(*turned, strict=True), strict=True))
    for place, (a, g) in enumerate(tokens):
        if place in pairs:
            own_a, own_g = pairs.pop(place)
            yield _formed(own_a, own_g[:, : g.shape[1]], scratch)
        else:
            # Where tokens lie in memory is not to change bits.
            yield curvature.into(_wide(g).clone().T @ _wide(a).clone())


def _formed(a: Tensor, g: Tensor, scratch: Scratch) -> Tensor:
    """Σ_t g_t a_tᵀ in float32 or better."""
    if a.dtype == torch.bfloat16:
        return _wide(wide_product(g.T, a))
    out = scratch.take("gradient", (g.shape[1], a.shape[1]), a.dtype, a.device)
    return torch.mm(g.T, a, out=out)


def _rotated(tokens: Sequence[Tensor], basis: Rotation | None, count: int, scratch: Scratch, use: str) -> list[Tensor]:
    """x Q of each x [T, D], those of all queries in products of ``count`` rows; rows of zeros behind each, up to whole
    blocks, and zeros behind the rows, up to their ``aligned_width``."""
    if not tokens:
        return []
    sizes = [whole_blocks(len(x)) for x in tokens]
    ends = list(accumulate(sizes))
    kind = basis.kind if isinstance(basis, RoundedBasis) else _wide(tokens[0][:0]).dtype
    width, device = tokens[0].shape[1], tokens[0].device
    shape = -(-ends[-1] // count) * count, aligned_width(width, kind, device)
    rows = scratch.take(use, shape, kind, device)
    for end, size, x in zip(ends, sizes, tokens, strict=True):
        rows[end - size : end - size + len(x), :width] = x
        rows[end - size + len(x) : end] = 0
    rows[ends[-1] :] = 0
    rows[:, width:] = 0
    if basis is not None:
        for part in rows.split(count):
            part[:, :width] = rotate(part if isinstance(basis, FilledBasis) else part[:, :width], basis)
    return [rows[end - size : end] for end, size in zip(ends, sizes, strict=True)]
