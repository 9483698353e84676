"""A driver killed anywhere leaves the old state or the new one; what a manifest names is on the disk before it is."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raylux.errors import UserError
from raylux.store import Lease, RunFolder


def test_a_kill_at_every_step_of_the_file_system(tmp_path: Path) -> None:
    """Every open sees the state before or after the step that was killed, and the same commands then run through."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 150


class Recorder:
    """Follows what a power loss would keep: which files' bytes and which folders' names are on the disk."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.safe: set[str] = set()
        self.manifests: list[str] = []
        self._fsync, self._replace = os.fsync, os.replace
        patch.setattr(os, "fsync", self.fsync)
        patch.setattr(os, "replace", self.replace)

    def fsync(self, handle: int) -> None:
        self._fsync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_dir():
            self.safe |= {f"{found} in its folder" for found in path.iterdir()}
        else:
            self.safe.add(str(path))

    def replace(self, part: str, path: str) -> None:
        assert part in self.safe
        if "/ledger/" in path:
            root = Path(path.partition("/ledger/")[0])
            for key in json.loads(Path(part).read_bytes())["objects"]:
                self.check(root / key, root)
            self.manifests.append(path)
        self._replace(part, path)
        self.safe.discard(f"{path} in its folder")
        self.safe.add(path)

    def check(self, path: Path, root: Path) -> None:
        assert str(path) in self.safe, path
        for place in (path, *path.parents):
            assert f"{place} in its folder" in self.safe, place
            if place == root:
                return


def test_objects_are_on_the_disk_before_their_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    for _ in range(2):  # another process need not anchor the folders again, but its own objects
        folder = RunFolder(str(tmp_path / "deep" / "run"))
        with Lease.take(folder.files, beat=1e6) as lease:
            folder.guard = lease.check
            for name in ("u0", "u1"):
                key, objects = folder.write(f"factors/x/{name}", {"a": np.ones(3), "b/c": np.ones(2)}, {"note": 1})
                table, more = folder.put("corpus/table", ".x", b"1")
                before = folder.manifest("s", name).objects if name in folder.committed("s") else {}
                folder.commit("s", name, objects | more, key=key, table=table)
                folder.delete(before)
                recorder.check(Path(folder.files.where(f"ledger/s/{name}.json")), Path(folder.files.place))
            folder.drop(["s"])
            folder.sweep()
    assert len(recorder.manifests) == 4


def test_a_write_that_fails_anywhere_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    arrays: dict[str, Any] = {"a": np.ones(3), "b": np.ones(2)}
    usual, left = os.fsync, [0]

    def failing(handle: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, "Input/output error")
        usual(handle)

    monkeypatch.setattr(os, "fsync", failing)
    folder.write("scores/u", arrays)
    left[0] = 1000
    folder.write("scores/u", arrays)
    before = {path for path in (tmp_path / "run").rglob("*") if path.is_file()}
    count = 1000 - left[0]
    assert count > 8
    for place in range(1, count + 1):
        left[0] = place
        with pytest.raises(UserError, match="Input/output error"):
            folder.write("scores/u", arrays)
        assert {path for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
