"""What a worker has captured of sequences, kept by corpus row, and made a batch of again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from raylux.batches import Batch
from raylux.cost.contraction import captured_width
from raylux.engine.kept import Kept
from raylux.layers import TrackedLayer
from raylux.routed import Routed, Rows

# What is kept of a sequence: its inputs, its gradients on the labels of the fit, and on those given.
INPUTS, FIT, GIVEN = "inputs", "fit", "given"

Captures = Mapping[str, Rows]
"""a by input group, or g by layer, of a batch."""


class CapturedSequences:
    """a and g of sequences on the worker's disk, in the precision of the products.

    Args:
        limit: bytes at most, as ``Kept``.
        layers: whose a and g there are; of experts' each sequence has its own number of rows.
        groups: layer -> leader of its input group.
        devices: layer -> where its a and g go.
    """

    def __init__(
        self, limit: int | None, layers: Sequence[TrackedLayer], groups: Mapping[str, str], devices: Mapping[str, str]
    ) -> None:
        self._kept, self._layers, self._groups, self._devices = Kept(limit), layers, groups, devices
        self._routed = frozenset(layer.name for layer in layers if layer.routed)

    def keep(self, rows: np.ndarray, batch: Batch, inputs: Captures, grads: Captures, given: Captures) -> None:
        """Keep the sequences of a batch, as far as they fit.

        In layer passes, which go from the last layers down, each leaves room for those to come: what is kept of a
        sequence is of use to the scores where all its layers are.

        Args:
            rows: corpus rows, in which ``batch.rows`` are places.
            batch: that was run.
            inputs: a of it; ``grads``: g on the labels of the fit; ``given``: g on its own, if they were asked for.
            grads: see ``inputs``.
            given: see ``inputs``.
        """
        share = self._share(grads)
        for place, at in enumerate(batch.rows):
            for what, found in ((INPUTS, inputs), (FIT, grads), (GIVEN, given)):
                if found:
                    self._kept.put((what, int(rows[at])), {name: x[place] for name, x in found.items()}, share)

    def has(self, row: int, which: str, wanted: Collection[str] | None = None) -> bool:
        """Whether a and g of a corpus row are there, of all layers or of those that are wanted."""
        inputs, grads = self._names(wanted)
        there = self._kept.names((INPUTS, row)), self._kept.names((which, row))
        return all(name in there[0] for name in inputs) and all(name in there[1] for name in grads)

    def batch(
        self,
        rows: np.ndarray,
        batch: Batch,
        which: str,
        dtype: torch.dtype,
        wanted: Collection[str] | None = None,
    ) -> tuple[dict[str, Rows], dict[str, Rows]] | None:
        """a and g of a batch whose sequences are all kept; rows beyond them repeat the first, as its tokens do."""
        places = [int(rows[at]) for at in batch.rows]
        if not all(self.has(row, which, wanted) for row in places):
            return None
        filled = [places[at] if at < len(places) else places[0] for at in range(len(batch.mask))]
        found = []
        for what, names in zip((INPUTS, which), self._names(wanted), strict=True):
            shapes = [self._kept.shapes((what, row)) for row in filled]
            tensors = {name: self._empty(name, [own[name] for own in shapes], dtype) for name in names}
            for place, row in enumerate(filled):
                if not self._kept.read((what, row), {name: x[place] for name, x in tensors.items()}):
                    return None
            found.append({name: self._moved(name, x) for name, x in tensors.items()})
        return found[0], found[1]

    def _names(self, wanted: Collection[str] | None) -> tuple[list[str], list[str]]:
        """Input groups and layers, in order."""
        layers = [layer.name for layer in self._layers if wanted is None or layer.name in wanted]
        return list(dict.fromkeys(self._groups[name] for name in layers)), layers

    def _share(self, wanted: Collection[str]) -> float:
        """Of all that is captured of a sequence, what a pass has with those before it."""
        first = next((at for at, layer in enumerate(self._layers) if layer.name in wanted), 0)
        width = [captured_width(layer, self._groups) for layer in self._layers]
        return 1.0 if not first else sum(width[first:]) / sum(width)

    def _empty(self, name: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Rows:
        if name not in self._routed:
            return torch.empty(len(shapes), *shapes[0], dtype=dtype)
        sizes = tuple(shape[0] for shape in shapes)
        return Routed(torch.empty(sum(sizes), shapes[0][1], dtype=dtype), sizes)

    def _moved(self, name: str, x: Rows) -> Rows:
        where = self._devices[name]
        return x.to(where) if isinstance(x, Tensor) else x.over(x.rows.to(where))
