"""Looking over a whole run folder: what is damaged, and what nobody names any more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from raylux.errors import UserError
from raylux.store.damage import DamagedError, remedy
from raylux.store.disk import PART
from raylux.store.files import Files

if TYPE_CHECKING:
    from raylux.store.folder import Manifest, RunFolder

DATA = ("batch", "candidates", "corpus", "factors", "queries", "scores", "snapshots")


def check(folder: RunFolder, checksums: bool) -> list[str]:
    """See ``RunFolder.check``."""
    lines = []
    try:
        folder.settings()
    except UserError as error:
        lines.append(str(error))
    sizes: dict[str, dict[str, int]] = {}
    for manifest in _manifests(folder, lines):
        for key, facts in manifest.objects.items():
            place = key.partition("/")[0]
            if place not in sizes:  # one listing per folder instead of a call per object
                sizes[place] = dict(folder.files.walk(place))
            line = problem(folder.files, key, facts, sizes[place].get(key), checksums)
            if line:
                lines.append(f"{folder.path}/{line}; {remedy(key)}")
    return lines


def sweep(folder: RunFolder) -> tuple[int, int]:
    """See ``RunFolder.sweep``."""
    named = {key for manifest in _manifests(folder) for key in manifest.objects}
    found = {key: size for place in DATA for key, size in folder.files.walk(place) if key not in named}
    parts = {name: folder.files.size(name) or 0 for name in folder.files.names("", PART)}
    parts |= {key: size for place in ("ledger", "report") for key, size in folder.files.walk(place)}
    found |= {key: size for key, size in parts.items() if key.endswith(PART)}
    folder.files.clear(found)
    return len(found), sum(found.values())


def problem(files: Files, key: str, facts: tuple[int, str], size: int | None, checksums: bool) -> str:
    """What is wrong with an object of ``size`` bytes; empty if nothing."""
    if size is None:
        return f"{key}: missing"
    if size != facts[0]:
        return f"{key}: {size} bytes instead of {facts[0]}"
    try:
        return f"{key}: checksum differs" if checksums and files.checksum(key) != facts[1] else ""
    except FileNotFoundError:
        return f"{key}: missing"


def _manifests(folder: RunFolder, lines: list[str] | None = None) -> Iterator[Manifest]:
    """Every manifest; one that is damaged is a line in ``lines``, or an error without them."""
    for stage in folder.stages():
        for unit in sorted(folder.committed(stage)):
            try:
                yield folder.manifest(stage, unit)
            except DamagedError as error:
                if lines is None:
                    raise
                lines.append(str(error))
