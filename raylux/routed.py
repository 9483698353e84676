"""Rows of which each sequence has another number: the tokens that were routed to one expert.

An expert of a mixture sees some tokens of some sequences. Its inputs a and output gradients g are kept sequence after
sequence, each in whole blocks of rows with zeros behind, so that whatever is computed of a sequence is computed from
tensors whose shapes follow from that sequence alone: its bits do not depend on which others stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, device, dtype

# A multiple of the rows that any BLAS takes together.
ROW_BLOCK = 8


def whole_blocks(rows: int) -> int:
    """``rows``, filled up to whole blocks."""
    return -(-rows // ROW_BLOCK) * ROW_BLOCK


@dataclass(frozen=True)
class Routed:
    """Legend: N sequences, C_n rows of sequence n, D columns.

    Attributes:
        rows: [Σ C_n, D], zero behind the rows of each sequence.
        sizes: C_n of each sequence, in whole blocks; 0 where no token of it was routed here.
        places: [Σ C_n] int64, the place of a row's token in its padded sequence, -1 on rows of zeros; None where that
            is not known any more.
    """

    rows: Tensor
    sizes: tuple[int, ...]
    places: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, place: int) -> Tensor:
        """[C_n, D] of one sequence."""
        start = sum(self.sizes[:place])
        return self.rows[start : start + self.sizes[place]]

    @property
    def device(self) -> device:
        """Where the rows are."""
        return self.rows.device

    @property
    def count(self) -> int:
        """Tokens that were routed here, rows of zeros left out."""
        assert self.places is not None
        return int((self.places >= 0).sum())

    @property
    def typical(self) -> float:
        """Mean rows of the sequences that have any."""
        return sum(self.sizes) / max(1, sum(map(bool, self.sizes)))

    def over(self, rows: Tensor) -> Routed:
        """Other rows of the same tokens."""
        return replace(self, rows=rows)

    def to(self, kind: dtype) -> Routed:
        """In another precision."""
        return self.over(self.rows.to(kind))


Rows = Tensor | Routed
"""a or g of a batch: [N, T, D], or those of an expert."""


def row_count(x: Rows) -> float:
    """Rows of a sequence: T, or the mean of those that an expert has of a sequence."""
    return x.typical if isinstance(x, Routed) else float(x.shape[1])


def width(x: Rows) -> int:
    """D."""
    return (x.rows if isinstance(x, Routed) else x).shape[-1]


def sequence_parts(a: Rows, g: Rows) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Sequences, and their a [n, T, M] and g [n, T, P]: all together, or an expert's one by one, if they have any."""
    if not isinstance(a, Routed):
        assert not isinstance(g, Routed)
        yield range(len(a)), a, g
        return
    assert isinstance(g, Routed) and a.sizes == g.sizes, "a and g of different tokens"
    pairs = zip(a.rows.split(a.sizes), g.rows.split(g.sizes), strict=True)
    for place, (own_a, own_g) in enumerate(pairs):
        if len(own_a):
            yield range(place, place + 1), own_a[None], own_g[None]
