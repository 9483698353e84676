"""What a worker keeps of the sequences it has run, on its own disk, so that it need not run them again.

A pure saving: what is kept has the bits that another forward pass would give, and whoever has lost it, or never had
it, computes it again. The file has no name: it is gone with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Hashable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

# Of the disk's free space, at most, where the config names no limit.
_SHARE = 0.25


def kept_bytes(setting: int | str, device: str) -> int | None:
    """What ``engine.keep_captured`` means: bytes that a worker may keep, None for a share of its disk.

    On a GPU "auto" keeps nothing: another pass takes a fraction of the time in which its a and g could be written.
    """
    if isinstance(setting, int):
        return setting
    return 0 if setting == "never" or device == "cuda" else None


class Kept:
    """Tensors by key, up to a number of bytes.

    Args:
        limit: bytes at most; None: a quarter of what is free where temporary files go.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit if limit is not None else int(shutil.disk_usage(tempfile.gettempdir()).free * _SHARE)
        self._file: BinaryIO | None = None
        self._end = 0
        self._places: dict[Hashable, dict[str, tuple[int, tuple[int, ...], torch.dtype]]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def put(self, key: Hashable, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors, unless they no longer fit."""
        size = sum(x.numel() * x.element_size() for x in tensors.values())
        if key in self._places or self._end + size > self._limit:
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        places = {}
        try:
            for name, x in tensors.items():
                data = memoryview(_bytes(x.detach().cpu().contiguous()))
                at = self._end
                self._end += os.pwrite(self._file.fileno(), data, at)
                if self._end - at != data.nbytes:
                    return  # the disk is full: what is not kept is computed again
                places[name] = at, tuple(x.shape), x.dtype
        except OSError:
            return
        self._places[key] = places

    def read(self, key: Hashable, into: Mapping[str, Tensor]) -> bool:
        """Fill tensors of the shapes that were kept, on the CPU; whether that could be done."""
        if key not in self._places or self._file is None:
            return False
        for name, x in into.items():
            at, shape, dtype = self._places[key][name]
            assert (shape, dtype) == (tuple(x.shape), x.dtype), "kept for another use"
            buffer = memoryview(_bytes(x))
            with contextlib.suppress(OSError):
                if os.preadv(self._file.fileno(), [buffer], at) == len(buffer):
                    continue
            return False
        return True

    def shapes(self, key: Hashable) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors under a key."""
        return {name: shape for name, (_, shape, _) in self._places[key].items()}


def _bytes(x: Tensor) -> Any:
    """A tensor's memory, flat."""
    return x.view(-1).view(torch.uint8).numpy()
