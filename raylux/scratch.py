"""Memory that is taken again and again: fresh pages must be cleared, at times by the host of a virtual machine too."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, dtype


class Scratch:
    """Buffers by use; each is as large as the largest tensor that was taken for that use."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, dtype, str], Tensor] = {}

    def take(self, use: str, shape: Sequence[int], kind: dtype, device: torch.device | str) -> Tensor:
        """A tensor with any entries, valid until the next is taken for the same use."""
        size, key = prod(shape), (use, kind, str(device))
        held = self._held.get(key)
        if held is None or len(held) < size:
            self._held.pop(key, None)  # not beside the larger one
            held = self._held[key] = torch.empty(size, dtype=kind, device=device)
        return held[:size].view(*shape)
