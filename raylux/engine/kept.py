"""A worker's own disk: for the sequences it has run, so that it need not run them again, and for large queries.

A pure saving: what is kept has the bits that another forward pass would give, and whoever has lost it, or never had
it, computes it again. The file has no name: it is gone with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Hashable, Mapping
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

    def put(self, key: Hashable, tensors: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Keep what is not yet under a key, unless it does not fit into a share of the limit."""
        known = self._places.get(key, {})
        tensors = {name: x for name, x in tensors.items() if name not in known}
        size = sum(x.numel() * x.element_size() for x in tensors.values())
        if not tensors or self._end + size > self._limit * share:
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        places = {}
        try:
            for name, x in tensors.items():
                data = _bytes(x.detach().cpu().contiguous())
                at = self._end
                self._end += os.pwrite(self._file.fileno(), data, at)
                if self._end - at != data.nbytes:
                    return  # the disk is full: what is not kept is computed again
                places[name] = at, tuple(x.shape), x.dtype
        except OSError:
            return
        self._places[key] = known | places

    def names(self, key: Hashable, dtype: torch.dtype) -> Collection[str]:
        """Of the tensors under a key that are in a precision."""
        return [name for name, (_, _, kind) in self._places.get(key, {}).items() if kind == dtype]

    def read(self, key: Hashable, into: Mapping[str, Tensor]) -> bool:
        """Fill tensors of the shapes that were kept, on the CPU; whether that could be done."""
        if key not in self._places or self._file is None:
            return False
        for name, x in into.items():
            at, shape, dtype = self._places[key][name]
            assert (shape, dtype) == (tuple(x.shape), x.dtype), "kept for another use"
            buffer = _bytes(x)
            with contextlib.suppress(OSError):
                if os.preadv(self._file.fileno(), [buffer], at) == len(buffer):
                    continue
            return False
        return True

    def shapes(self, key: Hashable) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors under a key."""
        return {name: shape for name, (_, shape, _) in self._places[key].items()}


class Resting:
    """Tensors that rest on the worker's disk and are read, one at a time, when they are asked for.

    For what is used over and over, but does not fit beside the rest: the system keeps in its page cache what memory
    allows. Where the disk has no room a tensor stays in memory.
    """

    def __init__(self) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as what rests in it)
        self._end = 0
        self._buffer = torch.zeros(0, dtype=torch.uint8)

    def hold(self, x: Tensor) -> Callable[[], Tensor]:
        """Put a tensor to rest; what is returned reads it, into a buffer that the next one takes over.

        On a CPU its memory may be written over then.
        """
        if x.device.type != "cpu":
            return lambda: x
        data, at = _bytes(x.contiguous()), self._end
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file.fileno(), data[written:], at + written)
        except OSError:
            own = x.clone()
            return lambda: own
        # Whole pages, so that each tensor begins where memory of its own would.
        self._end += -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
        size, shape, dtype = len(data), x.shape, x.dtype
        return lambda: self._read(at, size).view(dtype).view(shape)

    def _read(self, at: int, size: int) -> Tensor:
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        into, done = _bytes(self._buffer[:size]), 0
        while done < size:
            count = os.preadv(self._file.fileno(), [into[done:]], at + done)
            if not count:
                raise OSError(errno.EIO, "a file of the worker's own became shorter")
            done += count
        return self._buffer[:size]


def _bytes(x: Tensor) -> memoryview:
    """A tensor's memory, flat."""
    array: Any = x.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
