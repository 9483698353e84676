"""What is no longer as it was written: how it is told, and what computes it again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
from isal.isal_zlib import crc32

from raylux.errors import UserError
from raylux.store.files import Files, crc

Read = TypeVar("Read", bytes, np.ndarray)
"""Bytes of an object."""

UNSEALED = "00000000"
_SEAL = re.compile(rb"""checksum["']?: ["']([0-9a-f]{8})["']""")
# First folder of an object's key, or ledger stage -> the stage of the command line.
_STAGES = {
    "corpus": "corpus",
    "factors": "fit",
    "candidates": "prefilter",
    "prefilter": "prefilter",
    "queries": "query",
    "query": "query",
    "scores": "score",
    "score": "score",
    "tokens": "score",
    # Of query files: what was taken is taken again, and answered.
    **dict.fromkeys(("batch", "batch.taken", "batch.aside", "batch.answer"), "score"),
    # Units of any stage may have been given up: the first that can be.
    "quarantine": "fit",
}


class DamagedError(UserError):
    """An object that a manifest names is missing or is not what was written."""


def damaged(files: Files, key: str, what: str) -> DamagedError:
    """The error of one object: where, what is wrong, what to do."""
    return DamagedError(f"{files.where(key)}: {what}; {remedy(key)}")


def remedy(key: str) -> str:
    """What to do about a damaged object."""
    stage = stage_of(key)
    if stage is None:
        return "choose a new run.folder"
    return f"`raylux run CONFIG --restart {stage}` computes it again"


def stage_of(key: str) -> str | None:
    """The stage of the command line that makes an object; None for one of no stage."""
    first, _, rest = key.partition("/")
    name = rest.partition("/")[0] if first in ("ledger", "snapshots") else first
    return "fit" if name.startswith("fit.") else _STAGES.get(name)


def read_whole(files: Files, key: str, size: int, checksum: str) -> bytes:
    """An object's bytes, as they were written.

    Raises:
        DamagedError: it is missing, or has another size or checksum.
    """
    return _whole(files, files.get, key, size, checksum)


def read_array(files: Files, key: str, size: int, checksum: str, into: np.ndarray | None = None) -> np.ndarray:
    """``read_whole`` of a large object, in numpy's memory [size], or in that given [size]."""
    return _whole(files, partial(files.array, into=into), key, size, checksum)


def _whole(files: Files, get: Callable[[str], Read], key: str, size: int, checksum: str) -> Read:
    data, problem = _compare(get, key, size, checksum)
    if problem and files.remote:  # an answer cut on its way is not damage
        data, problem = _compare(get, key, size, checksum)
    if data is None:
        raise damaged(files, key, problem)
    return data


def _compare(get: Callable[[str], Read], key: str, size: int, checksum: str) -> tuple[Read | None, str]:
    """What was read, if it is what was written; and what is wrong with it."""
    try:
        data = get(key)
    except FileNotFoundError:
        return None, "missing"
    if len(data) != size:
        return None, f"{len(data)} bytes instead of {size}"
    return (data, "") if crc(data) == checksum else (None, "checksum differs")


def seal(key: str, text: str) -> bytes:
    """Put the checksum of a text and its key in the place of the first ``checksum: "00000000"`` of the text.

    The key is part of it: an object that stands under another's name is found, too.
    """
    data = text.encode()
    place = _SEAL.search(data)
    assert place is not None and place[1].decode() == UNSEALED
    return _with_seal(data, place, _sum(key, data))


def broken_seal(key: str, data: bytes) -> str:
    """What is wrong with a sealed object; empty if nothing."""
    place = _SEAL.search(data)
    if place is None:
        return "damaged, its checksum is not there"
    return "" if _sum(key, _with_seal(data, place, UNSEALED)) == place[1].decode() else "checksum differs"


def seal_json(key: str, data: dict[str, Any]) -> bytes:
    """A sealed JSON object."""
    return seal(key, json.dumps({"checksum": UNSEALED, **data}, ensure_ascii=False))


def _with_seal(data: bytes, place: re.Match[bytes], checksum: str) -> bytes:
    return data[: place.start(1)] + checksum.encode() + data[place.end(1) :]


def _sum(key: str, data: bytes) -> str:
    return crc(data, crc32(key.encode() + b"\0"))
