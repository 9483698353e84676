"""Exact scores of chosen pairs of sequences and queries, where most pairs are not wanted.

Gradients are formed as for all pairs, T·P·M per sequence. They and dense queries lie in pieces of a thousand entries:
those of all gradients stay in the processor's cache while each query in turn takes its chosen products, so that a pair
costs about five times what it does in a matrix product. Of bf16 operands gradients are formed as ever, and such a
product is in float32, which knows none of bf16. Low-rank queries are read where a sequence wants them, and put
against its tokens, T·R·(P + M) a pair, without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raylux.cost.sizes import SLICE
from raylux.influence.dots import Held, in_memory, no_vectors, whole_blocks, wide_dtype
from raylux.influence.sampled import PIECE, no_scores, sampled
from raylux.products import gradients_into, wide_product
from raylux.profiling import of


@dataclass
class PairQueries:
    """The preconditioned queries of one layer, ready for some pairs.

    Attributes:
        shape: (P, M).
        count: Q.
        dense: places of the dense queries.
        pieces: of these, [n, entries] each; ``spans`` of P.
        spans: see ``pieces``.
        factors: query -> left [P, R] above right [M, R] of the others, R never 1.
    """

    shape: tuple[int, int]
    count: int
    dense: list[int]
    pieces: list[Held] = field(default_factory=list)
    spans: list[slice] = field(default_factory=list)
    factors: dict[int, Held] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        shape: tuple[int, int],
        queries: Sequence[Tensor | tuple[Tensor, Tensor]],
        hold: Callable[[Tensor], Held] = in_memory,
    ) -> PairQueries:
        """From each query's s_test: dense [P, M], or (left [P, R], right [M, R]), all of one dtype."""
        outputs, inputs = shape
        dense = [place for place, query in enumerate(queries) if isinstance(query, Tensor)]
        found = cls(shape, len(queries), dense)
        for place, query in enumerate(queries):
            if not isinstance(query, Tensor):
                # A GPU is lent those that are wanted: thousands of queries of a large model fit no device.
                found.factors[place] = hold(torch.cat(no_vectors(*query)).cpu())
        if dense:
            step = max(1, PIECE // inputs)
            found.spans = [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]
            for span in found.spans:
                rows = [query[span].reshape(-1) for query in queries if isinstance(query, Tensor)]
                found.pieces.append(hold(torch.stack(rows)))
        return found

    def scores(self, batches: Sequence[tuple[Tensor, Tensor]], chosen: Tensor | None, rows: int) -> Tensor:
        """Scores of pairs.

        Args:
            batches: a [N, T, M] and g [N, T, P] of each, in the dtype of the queries.
            chosen: [N, Q] bool, over all batches; None: every pair.
            rows: of a product of all pairs.

        Returns:
            [N, Q] in float32 or better, zero where a pair was not chosen.
        """
        parts = [(whole_blocks(a), whole_blocks(g)) for a, g in batches]
        count, some = sum(len(a) for a, _ in parts), parts[0][0]
        result = torch.zeros(count, self.count, dtype=wide_dtype(some.dtype), device=some.device)
        if self.dense:
            wanted = None if chosen is None else chosen[:, self.dense]
            result[:, self.dense] = self._of_dense(parts, wanted, rows)
        for query in self.factors if chosen is None else _any(chosen, self.factors):
            result[:, query] = self._of_factors(query, parts, None if chosen is None else chosen[:, query])
        return result

    def _of_factors(self, query: int, parts: Sequence[tuple[Tensor, Tensor]], chosen: Tensor | None) -> Tensor:
        """Scores [N] of one query, zero where a sequence is not chosen."""
        with of("read"):
            left, right = self.factors[query]().to(parts[0][0].device).split(self.shape)
        with of("dot"):
            found, start = [], 0
            for a, g in parts:
                own = torch.ones(len(a), dtype=torch.bool) if chosen is None else chosen[start : start + len(a)].cpu()
                start += len(a)
                scores = a.new_zeros(len(a), dtype=wide_dtype(a.dtype))
                if bool(own.any()):
                    scores[own] = ((g[own] @ left).to(scores.dtype) * (a[own] @ right)).sum((1, 2))
                found.append(scores)
            return torch.cat(found)

    def _of_dense(self, parts: Sequence[tuple[Tensor, Tensor]], chosen: Tensor | None, rows: int) -> Tensor:
        count, inputs = sum(len(a) for a, _ in parts), self.shape[1]
        filled = count if chosen is not None else -(-count // rows) * rows
        some = parts[0][0]
        wide = wide_dtype(some.dtype)
        total = torch.zeros(filled, len(self.dense), dtype=wide, device=some.device)
        if chosen is not None:
            total = no_scores(chosen, wide)
        together = max(1, SLICE // (inputs * (self.spans[0].stop - self.spans[0].start)))
        buffer = some.new_zeros(filled * together * (self.spans[0].stop - self.spans[0].start) * inputs)
        for first in range(0, len(self.spans), together):
            spans = self.spans[first : first + together]
            formed = _form(parts, slice(spans[0].start, spans[-1].stop), filled, buffer)
            for span, piece in zip(spans, self.pieces[first : first + together], strict=True):
                own = formed[:, span.start - spans[0].start : span.stop - spans[0].start].flatten(1)
                with of("read"):
                    queries = piece()
                with of("dot"):
                    if chosen is None:
                        for gradients, scores in zip(own.split(rows), total.split(rows), strict=True):
                            scores += wide_product(gradients, queries.T)
                    else:
                        total = sampled(total, queries.to(wide), own.to(wide))
        return total[:count] if chosen is None else total.to_dense().T


def _any(chosen: Tensor, queries: Iterable[int]) -> list[int]:
    """The queries that some sequence has chosen; others are not even read."""
    some = chosen.any(0).cpu()
    return [query for query in queries if some[query]]


def _form(parts: Sequence[tuple[Tensor, Tensor]], span: slice, filled: int, buffer: Tensor) -> Tensor:
    """Rows of G [filled, span, M] in the buffer's memory; what lies beyond the sequences is of no use."""
    size, inputs, at = span.stop - span.start, parts[0][0].shape[2], 0
    found = buffer[: filled * size * inputs].view(filled, size, inputs)
    with of("form"):
        for a, g in parts:
            gradients_into(a, g[..., span], found[at : at + len(a)])
            at += len(a)
    return found
