"""Where the run folder is to be: room for it, and whether files can be made, renamed, read and deleted there."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import fsspec

from raylux.doctor.case import Case
from raylux.doctor.finding import FAIL, OK, WARN, Finding
from raylux.doctor.need import Need, need
from raylux.engine.plan import GIB
from raylux.store import RunFolder

_TRIAL = b"raylux doctor tried whether it can write here; this file may be deleted\n"
# A disk that a run fills to the last byte is in nobody's interest.
_TIGHT = 1.2


def disk(case: Case) -> Finding:
    """Free disk against what the run will write."""
    wanted = need(case)
    files = RunFolder(case.config.run.folder).files
    if files.remote:
        return Finding("disk", OK, f"needs {_told(wanted)} at {files.root}, whose room cannot be asked")
    place = _existing(Path(files.place))
    have = sum(size for _, size in files.walk("")) if Path(files.place).is_dir() else 0
    free, missing = shutil.disk_usage(place).free, max(0, wanted.total - have)
    there = f", {_bytes(have)} of it there" if have else ""
    detail = f"needs {_told(wanted)}{there}; {_bytes(free)} free at {place}"
    advice = "free some room, choose another run.folder, track fewer model.layers or ask fewer queries"
    if missing > free:
        return Finding("disk", FAIL, detail, advice)
    if missing * _TIGHT > free:
        return Finding("disk", WARN, f"{detail}: that is tight", advice)
    if wanted.documents is None:
        return Finding("disk", WARN, f"{detail}; only the corpus's first rows are in it: nothing says how many it has")
    return Finding("disk", OK, detail)


def store(case: Case) -> Finding:
    """A file made, renamed, read back and deleted where the run folder is to be; nothing stays."""
    folder = RunFolder(case.config.run.folder)
    if not folder.exists and not folder.files.empty():
        return Finding("store", FAIL, f"{folder.path}: not empty, and holds no run", "choose another run.folder")
    if folder.files.remote:
        return _try_remote(folder.files.root)
    place = _existing(Path(folder.files.place))
    return _try_local(place)


def _try_local(place: Path) -> Finding:
    # An unfinished file, should this process be killed: the store takes no notice of it.
    first = place / f".raylux-doctor-{uuid.uuid4().hex[:12]}.part"
    second = first.with_suffix(".renamed.part")
    try:
        with first.open("xb") as file:
            file.write(_TRIAL)
            file.flush()
            os.fsync(file.fileno())
        os.replace(first, second)
        intact = second.read_bytes() == _TRIAL
        second.unlink()
    except OSError as error:
        detail = f"{place}: cannot write, rename, read and delete there ({error.strerror or error})"
        return Finding("store", FAIL, detail, "choose another run.folder, or mend its permissions")
    finally:
        for path in (first, second):
            with contextlib.suppress(OSError):
                path.unlink()
    return _verdict(str(place), intact, "write, rename, read, delete")


def _try_remote(root: str) -> Finding:
    try:
        system, base = fsspec.core.url_to_fs(root)
        system.invalidate_cache()
        made = not system.exists(base)
        first = f"{base}/.raylux-doctor-{uuid.uuid4().hex[:12]}.part"
        second = first.removesuffix(".part") + ".renamed.part"
        try:
            intact, done = _round_trip(system, first, second)
        finally:
            _clear(system, first, second, base if made else "")
    except Exception as error:  # every remote file system has its own exceptions
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        advice = "check the address, the credentials in the environment, and the rights to write and delete there"
        return Finding("store", FAIL, f"{root}: cannot write, read and delete there ({said})", advice)
    return _verdict(root, intact, done)


def _round_trip(system: Any, first: str, second: str) -> tuple[bool, str]:
    """Whether the bytes came back, and what was done. raylux itself renames nothing on an object store."""
    system.pipe_file(first, _TRIAL)
    done, place = "write, rename, read, delete", first
    try:
        system.mv(first, second)
        place = second
    except Exception:
        done = "write, read, delete (it refuses to rename, which raylux does not need there)"
    intact = bytes(system.cat_file(place)) == _TRIAL
    system.rm_file(place)
    return intact, done


def _clear(system: Any, first: str, second: str, folder: str) -> None:
    for path in (first, second):
        with contextlib.suppress(Exception):
            system.rm_file(path)
    if folder:  # it came into being with the file
        with contextlib.suppress(Exception):
            system.rmdir(folder)


def _verdict(place: str, intact: bool, done: str) -> Finding:
    if not intact:
        return Finding(
            "store", FAIL, f"{place}: what is read back is not what was written", "choose another run.folder"
        )
    return Finding("store", OK, f"{place}: {done}")


def _existing(place: Path) -> Path:
    """The folder itself, or the nearest one above it that is there: where it would be made."""
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return place


def _told(wanted: Need) -> str:
    about = "at least" if wanted.documents is None else "about"
    return (
        f"{about} {_bytes(wanted.total)} (corpus {_bytes(wanted.corpus)}, factors {_bytes(wanted.factors)}, "
        f"queries {_bytes(wanted.queries)} at most, scores {_bytes(wanted.scores)})"
    )


def _bytes(count: float) -> str:
    """As 1.5 GiB, 20 MiB or 300 KiB."""
    for size, unit in ((GIB, "GiB"), (1 << 20, "MiB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.0f} KiB"
