"""a and g of every sequence, captured once and kept on a scratch disk: the study goes over them layer by layer.

They are kept in float16, g times ``SCALE``; both passes of the study read the same numbers, so what it compares is not
touched by the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.twostage.cases import Study
from raylux.batches import TokenRow, collate
from raylux.capture import Capture
from raylux.layers import TrackedLayer, coverage
from raylux.sampling import sample_labels

SCALE = 256.0
_ROWS = 8


def layers(study: Study) -> tuple[TrackedLayer, ...]:
    """The model's tracked layers."""
    return coverage(study.model).tracked


def keep(study: Study, folder: Path) -> None:
    """Capture the parts that the folder lacks."""
    for part, rows in study.rows.items():
        done = folder / f"{part}.done"
        if not done.exists():
            _keep(study, part, rows, folder)
            done.write_text(f"{sum(len(row.tokens) for row in rows)} {len(rows)}\n", encoding="utf-8")


def _keep(study: Study, part: str, rows: Sequence[TokenRow], folder: Path) -> None:
    tracked = layers(study)
    longest = max(len(row.tokens) for row in rows)
    files = {
        (layer.name, kind): np.lib.format.open_memmap(
            _path(folder, part, layer.name, kind), "w+", np.float16, (len(rows), longest, width)
        )
        for layer in tracked
        for kind, width in (("a", layer.inputs - layer.bias), ("g", layer.outputs))
    }
    capture = Capture(study.model, tracked)
    labeller = partial(sample_labels, seed=0) if part == "fit" else None
    order = sorted(range(len(rows)), key=lambda place: len(rows[place].tokens))
    for start in range(0, len(rows), _ROWS):
        places = order[start : start + _ROWS]
        padded = len(rows[places[-1]].tokens)
        found = capture.run(collate([rows[place] for place in places], places, padded), labeller)
        for layer in tracked:
            a, g = found.inputs[layer.name], found.grads[layer.name] * -SCALE
            for kind, x in (("a", a[..., : layer.inputs - layer.bias]), ("g", g)):
                half = x.half()
                assert bool(torch.isfinite(half).all()), f"{layer.name}: {kind} is beyond float16"
                files[layer.name, kind][places, :padded] = half.numpy()
    for file in files.values():
        file.flush()


@dataclass
class Tokens:
    """a and g of one layer and part of the study.

    Attributes:
        a: [N, T, M] or, without the bias's ones, [N, T, M - 1], float16 on disk.
        g: [N, T, P], times ``SCALE``.
        bias: whether ones are to be added.
    """

    a: np.ndarray
    g: np.ndarray
    bias: bool

    @classmethod
    def open(cls, folder: Path, part: str, layer: TrackedLayer, most: int | None = None) -> Tokens:
        """The first ``most`` sequences of a part."""
        a, g = (np.load(_path(folder, part, layer.name, kind), mmap_mode="r")[:most] for kind in "ag")
        return cls(a, g, layer.bias)

    def __len__(self) -> int:
        return len(self.g)

    def blocks(self, size: int, step: int = 1) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(places, a [n, T, M], g [n, T, P]) of blocks of ``size`` sequences, every ``step``-th of them; float32."""
        for start in range(0, len(self), size * step):
            places = slice(start, min(start + size, len(self)))
            a, g = (torch.from_numpy(np.array(x[places])).float() for x in (self.a, self.g))
            if self.bias:
                a = torch.cat([a, torch.ones(*a.shape[:2], 1)], 2)
            yield places, a, g


def mean_tokens(folder: Path, part: str) -> float:
    """Tokens per sequence of a part, padding left out."""
    tokens, count = map(int, (folder / f"{part}.done").read_text(encoding="utf-8").split())
    return tokens / count


def _path(folder: Path, part: str, layer: str, kind: str) -> Path:
    return folder / f"{part}.{layer}.{kind}.npy"
