"""Convolutions as linear maps of patches: rows of a are patches of the input, rows of g places of the output.

A convolution with weight [P, C, *kernel] is y = W a at every place, with W the weight as [P, C·kernel] and a the patch
that the kernel lies on (Grosse & Martens 2016): so its tracked weight is [P, M] as any other layer's, and a sequence
(an example) has one row for each place instead of each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

Convolution = nn.Conv1d | nn.Conv2d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Patches:
    """Where a convolution's kernel lies; of one dimension it is the last of two, the first having size 1.

    Attributes:
        kernel: its size.
        stride: from one place to the next.
        dilation: between its entries.
        padding: added on each side, (left, right, top, bottom).
        mode: what is added, as ``torch.nn.functional.pad`` has it.
        flat: the convolution is of one dimension.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    mode: str
    flat: bool

    @classmethod
    def of(cls, module: Convolution) -> Patches:
        """Those of a module whose ``groups`` is 1."""
        kernel, dilation = _both(module.kernel_size), _both(module.dilation, 1)
        pads: list[tuple[int, int]] = []
        for size, gap, wanted in zip(kernel, dilation, _sides(module), strict=True):
            total = gap * (size - 1) if wanted == "same" else 0
            pads.append((total // 2, total - total // 2) if isinstance(wanted, str) else (wanted, wanted))
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        flat = isinstance(module, nn.Conv1d)
        return cls(kernel, _both(module.stride, 1), dilation, (*pads[1], *pads[0]), mode, flat)

    def rows(self, x: Tensor) -> Tensor:
        """Patches [N, places, C·kernel] of an input [N, C, *size]."""
        if any(self.padding):
            x = functional.pad(x, self.padding[:2] if self.flat else self.padding, self.mode)
        return functional.unfold(x.unsqueeze(2) if self.flat else x, self.kernel, self.dilation, 0, self.stride).mT


def output_rows(y: Tensor) -> Tensor:
    """Places [N, places, P] of an output [N, P, *size]."""
    return y.flatten(2).mT


def output_like(rows: Tensor, y: Tensor) -> Tensor:
    """``rows`` [N·places, P] in the layout of an output ``y`` [N, P, *size]."""
    return rows.view(len(y), -1, y.shape[1]).mT.reshape(y.shape)


def _both(values: Sequence[int], first: int | None = None) -> tuple[int, int]:
    """One or two numbers as two."""
    found = tuple(values)
    return (found[0], found[1]) if len(found) == 2 else (1 if first is None else first, found[0])


def _sides(module: Convolution) -> Sequence[int | str]:
    """Padding of the two dimensions: a number, ``same`` or ``valid``."""
    if isinstance(module.padding, str):
        return (module.padding, module.padding)
    return _both(tuple(module.padding), 0)
