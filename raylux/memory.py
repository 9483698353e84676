"""Freed memory, given back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

# Of malloc.h; a block of more bytes than that is a mapping of its own.
_MMAP_THRESHOLD, _LARGE = -3, 1 << 18


def give_back() -> None:
    """Return what was freed, which glibc keeps for later: called where a stage has ended and its buffers with it."""
    trim = _trim()
    if trim is not None:
        trim(0)


def give_back_at_once() -> None:
    """From now on, in this process, return what is large when it is freed.

    Where weights come and go, glibc's heap would grow by a part of each block: what is kept lies in between.
    """
    setting = _of_libc("mallopt")
    if setting is not None:
        setting(_MMAP_THRESHOLD, _LARGE)


def _trim() -> Any:
    return _of_libc("malloc_trim")


@cache
def _of_libc(name: str) -> Any:
    """A function of the C library, where it has it."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
