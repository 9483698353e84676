"""What a worker has captured of sequences, kept by corpus row, and made a batch of again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from raylux.batches import Batch
from raylux.cost.contraction import captured_width
from raylux.engine.kept import Kept
from raylux.engine.records import FactorFiles
from raylux.layers import TrackedLayer
from raylux.profiling import of
from raylux.routed import Routed, Rows

# What is kept of a sequence: its inputs, its gradients on the labels of the fit, and on those given; and its inputs in
# the eigenbases.
INPUTS, FIT, GIVEN, TURNED = "inputs", "fit", "given", "turned"

Captures = Mapping[str, Rows]
"""a by input group, or g by layer, of a batch."""

Captured = tuple[Captures, Captures]
"""a and g of a batch."""


class _OnDisk(Mapping[str, Rows]):
    """What is kept of a batch; each tensor is read when it is asked for, and is not held here.

    Args:
        names: of the tensors.
        read: one of them; None where the disk fails.
        again: all of them, computed; asked for at most once by those who share it.
    """

    def __init__(self, names: Sequence[str], read: Callable[[str], Rows | None], again: Callable[[], Captures]) -> None:
        self._names, self._read, self._again = names, read, again

    def __getitem__(self, name: str) -> Rows:
        if name not in self._names:
            raise KeyError(name)
        found = self._read(name)
        return self._again()[name] if found is None else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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
        self._basis: FactorFiles | None = None

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

    def has(self, row: int, which: str, dtype: torch.dtype, wanted: Collection[str] | None = None) -> bool:
        """Whether a and g of a corpus row are there in a precision, of all layers or of those that are wanted."""
        inputs, grads = self._names(wanted)
        there = self._kept.names((INPUTS, row), dtype), self._kept.names((which, row), dtype)
        return all(name in there[0] for name in inputs) and all(name in there[1] for name in grads)

    def keep_turned(self, rows: np.ndarray, batch: Batch, basis: FactorFiles, turned: Captures) -> None:
        """Keep inputs of a batch as they are in the eigenbases ``basis``, for the scores: as far as they fit.

        Of sequences whose gradients on their own labels are kept; the others are run again for the scores.

        Args:
            rows: corpus rows, in which ``batch.rows`` are places.
            batch: whose inputs they are.
            basis: the eigenbases.
            turned: a Q by input group.
        """
        self._basis = basis
        share = self._share(turned)
        with of("keep"):
            for place, at in enumerate(batch.rows):
                if (GIVEN, int(rows[at])) in self._kept:
                    self._kept.put((TURNED, int(rows[at])), {name: x[place] for name, x in turned.items()}, share)

    def batch(
        self,
        rows: np.ndarray,
        batch: Batch,
        which: str,
        dtype: torch.dtype,
        wanted: Collection[str] | None,
        again: Callable[[], Captured],
    ) -> Captured | None:
        """a and g of a batch whose sequences are all kept, each read when it is asked for.

        Rows beyond the sequences repeat the first, as the batch's tokens do. ``again`` runs the batch, should the disk
        fail.
        """
        if not all(self.has(int(rows[at]), which, dtype, wanted) for at in batch.rows):
            return None
        filled, computed = self._filled(rows, batch), cache(again)
        inputs, grads = self._names(wanted)
        return (
            _OnDisk(inputs, lambda name: self._read(INPUTS, filled, name, dtype), lambda: computed()[0]),
            _OnDisk(grads, lambda name: self._read(which, filled, name, dtype), lambda: computed()[1]),
        )

    def turned(self, rows: np.ndarray, batch: Batch, dtype: torch.dtype, name: str, basis: FactorFiles) -> Rows | None:
        """Inputs of a batch in the eigenbases, where all of its sequences' are kept so."""
        filled = self._filled(rows, batch)
        if basis != self._basis or not all(name in self._kept.names((TURNED, row), dtype) for row in filled):
            return None
        return self._read(TURNED, filled, name, dtype)

    @staticmethod
    def _filled(rows: np.ndarray, batch: Batch) -> list[int]:
        """The corpus row of each row of a batch."""
        places = [int(rows[at]) for at in batch.rows]
        return [places[at] if at < len(places) else places[0] for at in range(len(batch.mask))]

    def _read(self, what: str, rows: Sequence[int], name: str, dtype: torch.dtype) -> Rows | None:
        """One tensor of a batch with so many rows; None where the disk fails."""
        with of("read"):
            found = self._empty(name, [self._kept.shapes((what, row))[name] for row in rows], dtype)
            for place, row in enumerate(rows):
                if not self._kept.read((what, row), {name: found[place]}):
                    return None
            return self._moved(name, found)

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
