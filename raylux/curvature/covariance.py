"""Uncentred covariances A = E[a aᵀ], S = E[g gᵀ] over tokens.

Martens & Grosse 2015; for transformers as in Grosse et al. 2023, eq. 12-17: tokens as if independent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raylux.batches import mask_of_rows
from raylux.blas import add_gram
from raylux.blocks import Blocks, block_sizes
from raylux.products import aligned, wide_product
from raylux.routed import Routed, Rows
from raylux.triangles import pack


@dataclass
class Covariances:
    """Running sums over tokens, on the device and in the precision of what is added.

    Attributes:
        rows: layer -> number of token rows summed (real tokens × calls of the module; of an expert, those sent there).
        sequences: number of sequences summed.
        blocks: A and S are summed within so many blocks of their coordinates.
    """

    rows: dict[str, int] = field(default_factory=dict)
    sequences: int = 0
    blocks: int = 1
    _inputs: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    _grads: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def add(self, inputs: Mapping[str, Rows], grads: Mapping[str, Rows], mask: Tensor) -> None:
        """Add a batch.

        Args:
            inputs: input group -> a [N, c·T, M], zero on padding, c the calls of the module; an expert's ``Routed``.
            grads: layer -> g [N, c·T, P], zero on padding.
            mask: [N, T] bool, True on real tokens; a layer above a classifier's pooling has one row of each sequence.
        """
        for name, a in inputs.items():
            self._add(self._inputs.setdefault(name, {}), a)
        for name, g in grads.items():
            self._add(self._grads.setdefault(name, {}), g)
            self.rows[name] = self.rows.get(name, 0) + (g.count if isinstance(g, Routed) else _counted(g, mask))
        self.sequences += len(mask)

    def _add(self, sums: dict[int, Tensor], x: Rows) -> None:
        rows = x.rows if isinstance(x, Routed) else x.reshape(-1, x.shape[-1])
        for place, part in enumerate(rows.split(block_sizes(rows.shape[1], self.blocks), 1)):
            _add_gram(sums, place, part)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Input group -> Σ a aᵀ [M, M]; of several blocks their entries, block after block (``Blocks.of``)."""
        return {name: _joined(parts) for name, parts in self._inputs.items()}

    @property
    def grads(self) -> dict[str, Tensor]:
        """Layer -> Σ g gᵀ [P, P]; likewise."""
        return {name: _joined(parts) for name, parts in self._grads.items()}

    def triangles(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``inputs`` and ``grads`` as lower triangles, block after block (``triangles.pack``)."""
        inputs, grads = (
            {name: torch.cat([pack(part) for part in parts.values()]) for name, parts in sums.items()}
            for sums in (self._inputs, self._grads)
        )
        return inputs, grads


def _counted(g: Tensor, mask: Tensor) -> int:
    """Rows of g [N, ·, P] that are no padding."""
    counts = mask_of_rows(mask, g.shape[1])
    return len(g) * g.shape[1] if counts is None else int(counts.sum())


def _add_gram(sums: dict[int, Tensor], place: int, rows: Tensor) -> None:
    """Add xᵀx of rows x [·, n]; on a CPU only one triangle of it, by the BLAS routine for products that are symmetric.

    On a GPU tokens in bf16 are multiplied as they are, with sums in float32: a product of two of them is exact there.
    """
    if not len(rows):  # an expert that no token of the batch was routed to
        wide = torch.float32 if rows.dtype == torch.bfloat16 else rows.dtype
        sums.setdefault(place, torch.zeros(rows.shape[1], rows.shape[1], dtype=wide, device=rows.device))
        return
    if rows.dtype == torch.bfloat16 and rows.is_cuda:
        width, rows = rows.shape[1], aligned(rows)
        part = wide_product(rows.T, rows)[:width, :width]
        sums[place] = sums[place].add_(part) if place in sums else part.contiguous()
        return
    rows = rows.float() if rows.dtype == torch.bfloat16 else rows
    if place not in sums:
        sums[place] = torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype, device=rows.device)
    if rows.device.type != "cpu":
        sums[place].addmm_(rows.T, rows)
        return
    add_gram(sums[place], rows)


def _joined(parts: Mapping[int, Tensor]) -> Tensor:
    whole = tuple(_whole(part) for part in parts.values())
    return whole[0] if len(whole) == 1 else Blocks(whole).flat()


def _whole(total: Tensor) -> Tensor:
    """Both triangles of a sum of which the lower one was computed; in place, since sums are large."""
    return total if total.device.type != "cpu" else total.tril_().add_(total.tril(-1).T)
