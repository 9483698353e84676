"""Scores of captured sequences: ⟨s_test_q, G_n⟩ with G_n = Σ_t g_t a_tᵀ, layer by layer.

Contractions (DESIGN decision 6): form G_n and take one product against dense queries, T·P·M + Q·P·M per
sequence; or put low-rank queries against tokens, T·Q·R·(P + M). Which one a query takes in a layer depends
on that query and layer alone, and products have a fixed number of rows (sequences) and columns (dense queries),
filled up with zeros: so a score has the same bits whichever other queries and sequences are scored beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from raylux.cost.contraction import tokens_pay
from raylux.cost.sizes import GPU_SLICE, SLICE
from raylux.influence.words import are_words, word_squares
from raylux.products import aligned, aligned_width, gradients_into, wide_product
from raylux.profiling import of
from raylux.routed import ROW_BLOCK, Routed, Rows, sequence_parts, width
from raylux.scratch import Scratch

TILE = 8
"""Dense queries per matrix product, unless the plan says more."""


Held = Callable[[], Tensor]
"""A tensor that rests somewhere; valid until the next one is asked for."""


def in_memory(x: Tensor) -> Held:
    """Where queries rest unless there are too many."""
    return lambda: x


def sequence_gradients(a: Rows, g: Rows) -> Tensor:
    """G [N, P, M] from a [N, T, M] and g [N, T, P]; zero where no token of a sequence was routed to an expert."""
    if isinstance(a, Tensor) and isinstance(g, Tensor):
        return torch.bmm(g.mT, a)
    rows = a.rows if isinstance(a, Routed) else a
    gradients = rows.new_zeros(len(a), width(g), width(a))
    for places, own_a, own_g in sequence_parts(a, g):
        gradients[places.start : places.stop] = torch.bmm(own_g.mT, own_a)
    return gradients


def _laid_out(
    queries: Mapping[int, Tensor], part: slice, shape: tuple[int, int, int], like: Tensor, scratch: Scratch | None
) -> Tensor:
    """A slice of P of a tile's queries, by their places in it: [tile, entries], zero where it has none.

    ``like``: any query [P, M]. ``shape``: (tile, rows of the slice, filled width).
    """
    rows, inputs = (scratch or Scratch()).take("tile", shape, like.dtype, like.device), like.shape[1]
    rows[..., inputs:] = 0
    rows[[place for place in range(len(rows)) if place not in queries]] = 0
    for place, query in queries.items():
        rows[place, :, :inputs] = query[part]
    return rows.view(len(rows), -1)


@dataclass
class LayerQueries:
    """The preconditioned queries of one layer, ready to be put against sequences.

    Attributes:
        count: Q.
        shape: (P, M).
        dtype: of the products.
        tiles: dense s_test, each [tile, P, M], zero where a query is not dense, slice by slice of P; its rows
            filled up to their ``aligned_width``.
        tile: queries of one.
        factors: query -> (left [P, R], right [M, R]) of the low-rank ones, R never 1.
        slices: of P, in which a gradient is formed and multiplied.
    """

    count: int
    shape: tuple[int, int]
    dtype: torch.dtype
    tiles: list[list[Held]] = field(default_factory=list)
    tile: int = TILE
    factors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    slices: list[slice] = field(default_factory=list)

    @classmethod
    def build(
        cls,
        shape: tuple[int, int],
        queries: Sequence[Tensor | tuple[Tensor, Tensor]],
        tokens: float,
        tile: int = TILE,
        hold: Callable[[Tensor], Held] = in_memory,
        scratch: Scratch | None = None,
        once: bool = False,
    ) -> LayerQueries:
        """From each query's s_test: dense [P, M], or (left [P, R], right [M, R]), all of one dtype.

        Args:
            shape: (P, M).
            queries: in order; a place in the list is the query's column in the scores.
            tokens: typical tokens per sequence, by which the contraction is chosen.
            tile: dense queries per matrix product.
            hold: puts a slice of a tile where it rests.
            scratch: memory of one of them, where ``hold`` puts them elsewhere; None: each has its own.
            once: they are asked for once, and laid out then in ``scratch``; ``hold`` holds nothing.
        """
        outputs, inputs = shape
        first = queries[0] if queries else torch.zeros(0)
        some = first if isinstance(first, Tensor) else first[0]
        result = cls(len(queries), shape, some.dtype)
        step = max(1, (GPU_SLICE if some.is_cuda else SLICE) // inputs)
        result.slices = [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]
        dense: dict[int, Tensor] = {}
        for place, query in enumerate(queries):
            if isinstance(query, Tensor):
                dense[place] = query
            elif tokens_pay(query[0].shape[1], outputs, inputs, tokens):
                result.factors[place] = no_vectors(*query)
            else:
                dense[place] = query[0] @ query[1].T
        if dense:
            some = next(iter(dense.values()))
            width = aligned_width(inputs, some.dtype, some.device)
            result.tile = tile
            for start in range(0, len(queries), tile):
                mine = {place - start: dense.pop(place) for place in sorted(dense.keys() & range(start, start + tile))}
                shapes = [(tile, part.stop - part.start, width) for part in result.slices]
                laid = [
                    partial(_laid_out, mine, part, shape, some, scratch)
                    for part, shape in zip(result.slices, shapes, strict=True)
                ]
                result.tiles.append(list(laid) if once else [hold(rows()) for rows in laid])
        return result

    def scores(
        self, batches: Sequence[tuple[Rows, Rows]], rows: int | None = None, scratch: Scratch | None = None
    ) -> Tensor:
        """Scores of the sequences of some batches.

        Args:
            batches: a [N, T, M] and g [N, T, P] of each, in the dtype of the queries.
            rows: of each product; default: as many as there are sequences.
            scratch: memory for gradients; None: of their own.

        Returns:
            [N, Q] over all batches, in float32 or better.
        """
        count, taken, places = 0, [], []
        for a, g in batches:
            for own, own_a, own_g in sequence_parts(a, g):
                taken.append((own_a, own_g))
                places += [count + place for place in own]
            count += len(a)
        if len(places) == count:
            return self._scores(taken, rows, scratch or Scratch())
        # An expert that not every sequence has tokens at: the others' score is 0.
        result = torch.zeros(count, self.count, dtype=wide_dtype(self.dtype), device=batches[0][1].device)
        if places:
            result[places] = self._scores(taken, rows or count, scratch or Scratch())
        return result

    def _scores(self, parts: Sequence[tuple[Tensor, Tensor]], rows: int | None, scratch: Scratch) -> Tensor:
        parts = [(whole_blocks(a), whole_blocks(g)) for a, g in parts]
        count = sum(len(a) for a, _ in parts)
        some, rows = parts[0][0], rows or count
        result = torch.zeros(-(-count // rows) * rows, self.count, dtype=wide_dtype(self.dtype), device=some.device)
        if self.tiles:
            self._dense(parts, result, rows, scratch)
        for place, (left, right) in self.factors.items():
            with of("dot"):
                shares = [((g @ left).to(result.dtype) * (a @ right)).sum((1, 2)) for a, g in parts]
                result[:count, place] += torch.cat(shares)
        return result[:count]

    def _dense(self, parts: Sequence[tuple[Tensor, Tensor]], result: Tensor, rows: int, scratch: Scratch) -> None:
        parts = [(aligned(a), g) for a, g in parts]
        inputs, count = parts[0][0].shape[2], sum(len(a) for a, _ in parts)
        largest = max(part.stop - part.start for part in self.slices) * inputs
        formed = scratch.take("formed", (len(result) * largest,), self.dtype, result.device)
        for index, part in enumerate(self.slices):
            size = part.stop - part.start
            gradient = formed[: len(result) * size * inputs].view(len(result), size, inputs)
            gradient[count:] = 0
            at = 0
            with of("form"):
                for a, g in parts:
                    gradients_into(a, g[..., part], gradient[at : at + len(a)])
                    at += len(a)
            products = list(zip(gradient.flatten(1).split(rows), result.split(rows), strict=True))
            for number, tile in enumerate(self.tiles):
                with of("read"):
                    queries = tile[index]()
                with of("dot"):
                    for flat, scores in products:
                        columns = scores[:, number * self.tile : (number + 1) * self.tile]
                        columns += wide_product(flat, queries.T)[:, : columns.shape[1]]

    def token_scores(self, place: int, a: Tensor, g: Tensor) -> Tensor:
        """Each token's share of the score of query ``place``: [N, T]; they sum to the sequence's score."""
        tokens = a.shape[1]
        a, g = whole_blocks(a), whole_blocks(g)
        wide = wide_dtype(self.dtype)
        if place in self.factors:
            left, right = self.factors[place]
            return ((g @ left).to(wide) * (a @ right)).sum(2)[:, :tokens]
        total = torch.zeros(a.shape[:2], dtype=wide, device=a.device)
        for part, tile in zip(self.slices, self.tiles[place // self.tile], strict=True):
            query = tile()[place % self.tile].view(part.stop - part.start, -1)[:, : self.shape[1]]
            total += ((g[..., part] @ query).to(wide) * a).sum(2)
        return total[:, :tokens]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums of products are kept in float32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def whole_blocks(x: Tensor) -> Tensor:
    """[N, T, ·] with rows of zeros behind each sequence up to whole blocks; batches of a run have them already.

    BLAS works on blocks of rows and takes the rest by another kernel: a token has the same bits wherever in the
    batch it stands only where every sequence has whole blocks.
    """
    rest = -x.shape[1] % ROW_BLOCK
    return torch.nn.functional.pad(x, (0, 0, 0, rest)) if rest else x


def no_vectors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of rank 1 with a second column of zeros.

    A product with a single column is a matrix times a vector, which BLAS cuts into blocks of rows: a token's
    result then depends on where in the batch it stands. With two columns or more it does not.
    """
    if left.shape[1] != 1:
        return left, right
    return torch.nn.functional.pad(left, (0, 1)), torch.nn.functional.pad(right, (0, 1))


def squared_norms(inputs: Mapping[str, Rows], grads: Mapping[str, Rows], groups: Mapping[str, str]) -> Tensor:
    """‖G_n‖² over all layers, [N], in float32 or better."""
    total: Tensor | None = None
    for name, g in grads.items():
        a = inputs[groups[name]]
        if are_words(a):
            assert isinstance(a, Tensor) and isinstance(g, Tensor)
            part = word_squares(a, g)
        else:
            gradient = sequence_gradients(a, g)
            part = gradient.to(wide_dtype(gradient.dtype)).square().sum((1, 2))
        total = part if total is None else total + part.to(total.device)
    assert total is not None
    return total
