"""Hashes of files, kept in the cache so that a file that did not change is read once.

An entry of the cache stands for one path. It holds what the file system said of the file when it was hashed
(size, times, inode) and the hashes. Any other answer of the file system, or an entry that is not whole, means
that the file is read again: an entry can save time, it can not make a changed file pass for the old one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from raylux.cache import cache_folder
from raylux.errors import UserError

Hashes = dict[str, str]
"""Name (of the whole file, or of a tensor in it) -> 16 hexadecimal digits."""

_FORMAT = 1
_BLOCK = 1 << 22
# A file that changed this recently (seconds) may change again without the clock of its times moving on.
_SETTLED = 2.0


def of_file(path: Path) -> str:
    """BLAKE2b of a file's bytes, 16 hexadecimal digits.

    Raises:
        UserError: the file cannot be read.
    """
    return cached(path, "bytes", lambda real: {"": _of_bytes(real)})[""]


def cached(path: Path, kind: str, compute: Callable[[Path], Hashes]) -> Hashes:
    """The hashes of a file, from the cache where the file is as it was.

    Args:
        path: the file; a link stands for what it points at.
        kind: of hashes: "bytes", "tensors".
        compute: reads the file.

    Raises:
        UserError: the file cannot be read.
    """
    real = Path(os.path.realpath(path))
    try:
        before = _state(real)
        entry = _entry(real, kind)
        known = _read(entry, before)
        if known is not None:
            return known
        hashes = compute(real)
        after = _state(real)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if before != after:
        raise UserError(f"{path}: changed while it was read; run again when it is complete")
    if abs(time.time() - os.stat(real).st_mtime) > _SETTLED:
        _write(entry, before, hashes)
    return hashes


def _of_bytes(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _state(path: Path) -> list[object]:
    """What tells one state of a file from another.

    The time of the inode's change and its number are there because archives and copies give files the times they
    had elsewhere: other weights of the same size may come with the same modification time.
    """
    facts = path.stat()
    return [str(path), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _entry(path: Path, kind: str) -> Path:
    name = hashlib.blake2b(f"{kind}\0{path}".encode(), digest_size=16).hexdigest()
    return cache_folder() / "hashes" / f"{name}.json"


def _read(entry: Path, state: list[object]) -> Hashes | None:
    """The entry's hashes; None where there is none, it is of another state, or it is damaged."""
    try:
        data = json.loads(entry.read_bytes())
        if data["format"] != _FORMAT or data["state"] != state or data["check"] != _check(state, data["hashes"]):
            return None
        return {str(name): str(value) for name, value in data["hashes"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(entry: Path, state: list[object], hashes: Hashes) -> None:
    """Whole or not at all. A cache that cannot be written costs time, so it is no error."""
    data = {"format": _FORMAT, "state": state, "check": _check(state, hashes), "hashes": hashes}
    part = None
    with contextlib.suppress(OSError):
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(prefix=f".{entry.name}.", dir=entry.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(data, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, entry)
        except OSError:
            if part is not None:
                os.unlink(part)


def _check(state: list[object], hashes: Hashes) -> str:
    text = json.dumps([state, hashes], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
