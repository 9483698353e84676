"""The cache: things that are made once and read by every later run (converted and copied models).

An entry is a folder. It is built under a temporary name and renamed when it is complete, so a folder
that exists is whole; a file lock keeps two processes from building the same entry side by side.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from raylux.errors import UserError


def cache_folder() -> Path:
    """``$RAYLUX_CACHE``, or ``~/.cache/raylux``."""
    return Path(os.environ.get("RAYLUX_CACHE") or Path.home() / ".cache" / "raylux").expanduser()


def entry_name(label: str, *facts: object) -> str:
    """A folder name that a person can read and that changes with any of the facts."""
    digest = hashlib.sha256("\0".join(str(fact) for fact in facts).encode()).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")[:60] or "entry"
    return f"{readable}-{digest}"


def build_once(kind: str, name: str, build: Callable[[Path], None]) -> Path:
    """The cache entry ``kind/name``; ``build(folder)`` fills an empty folder when there is none yet.

    Safe with several processes and after a crash: an entry appears whole or not at all.
    """
    parent = cache_folder() / kind
    target = parent / name
    if target.is_dir():
        return target
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(parent / f".{name}.lock"):
            if not target.is_dir():
                _build(parent, target, build)
    except OSError as error:
        raise UserError(
            f"{target}: cannot write the cache ({error}); set RAYLUX_CACHE to a folder with space"
        ) from None
    return target


def _build(parent: Path, target: Path, build: Callable[[Path], None]) -> None:
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    try:
        build(part)
        part.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        # Where file locks do not work (some network disks) another process may have won meanwhile.
        if not target.is_dir():
            os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
