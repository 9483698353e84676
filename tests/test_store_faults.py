"""Storage that fails: a full disk, a folder that cannot be written, an object store that fails now and then."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from raylux.errors import UserError
from raylux.store import Lease, RunFolder, bucket
from raylux.store.faults import told
from raylux.store.files import Files

# ------------------------------------------------------------------------------------ local disks


@contextmanager
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    """A place of some hundred KB: a file system of its own where this user may mount one, else a limit per file."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(place)], capture_output=True).returncode
        == 0
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        yield place
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _writes(folder: RunFolder, size: int) -> list[Any]:
    big = np.random.default_rng(0).bytes(size)
    return [
        lambda: folder.write("scores/u", {"a": np.zeros(10), "big": np.frombuffer(big, np.uint8)}),
        lambda: folder.put("corpus/table", ".x", big),
        lambda: folder.commit("stage", "unit", text="x" * size),
        lambda: folder.write_settings({"text": "x" * size}),
        lambda: folder.files.create("lease/000001.json", big),
    ]


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    with _small_disk(tmp_path) as disk:
        folder = RunFolder(str(disk / "run"))
        folder.write_settings({"value": 1})
        key, objects = folder.write("scores/good", {"a": np.arange(5.0)})
        folder.commit("stage", "unit", objects, key=key)
        before = sorted(path for path in disk.rglob("*") if path.is_file())
        for write in _writes(folder, 400_000):
            with pytest.raises(UserError, match=r"cannot be written, .*: .* and run the same command again") as error:
                write()
            assert "\n" not in str(error.value) and str(disk) in str(error.value) and error.value.exit_code == 2
            assert sorted(path for path in disk.rglob("*") if path.is_file()) == before
        # What was there is as it was, and what fits can still be written.
        assert folder.settings()["value"] == 1 and folder.check(checksums=True) == []
        assert folder.group(folder.manifest("stage", "unit").meta["key"]).read("a").tolist() == [0, 1, 2, 3, 4]
        folder.commit("stage", "unit", objects, key=key, again=True)


def test_a_file_larger_than_the_limit(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = RunFolder(str(tmp_path / "run"))
    folder.write_settings({})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for write in _writes(folder, 200_000):
            with pytest.raises(UserError, match="`ulimit -f` allows: raise the limit and run the same"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == ["run.yaml"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """/proc refuses even root, as a read-only mount would."""
    for root in ("/proc/raylux-run", "/proc/self/raylux-run"):
        for write in _writes(RunFolder(root), 10):
            with pytest.raises(UserError, match=rf"{root}.*cannot be written, "):
                write()
    (tmp_path / "file").write_bytes(b"in the way")
    for write in _writes(RunFolder(str(tmp_path / "file" / "run")), 10):
        with pytest.raises(UserError, match=r"cannot be written, (a file|something else) is in the way: move it away"):
            write()
    with pytest.raises(UserError, match="cannot be written"):
        Lease.take(Files(str(tmp_path / "file" / "run")))


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "the disk is full: free some space and run the same command again"),
        (errno.EDQUOT, "the disk quota is used up: free some space and run the same command again"),
        (errno.EROFS, "the file system is read-only: mount it writable"),
        (errno.EACCES, "no permission: allow it"),
        (errno.EIO, "Input/output error: see to the storage and run the same command again"),
    ],
)
def test_what_the_system_says_is_told_in_plain_words(code: int, says: str) -> None:
    line = str(told("place", "written", OSError(code, os.strerror(code))))
    assert line.startswith(f"place: cannot be written, {says}")


def test_no_key_leads_out_of_the_folder(tmp_path: Path) -> None:
    """The objects that a manifest names may come from anywhere, with their checksums."""
    (tmp_path / "precious").write_bytes(b"x")
    folder = RunFolder(str(tmp_path / "run"))
    for key in ("../precious", "scores/../../precious", str(tmp_path / "precious")):
        for use in (
            lambda key=key: folder.files.get(key),
            lambda key=key: folder.delete([key]),
            lambda key=key: folder.files.put(key, b"y"),
            lambda key=key: folder.group(key),
            lambda key=key: folder.verify(folder.commit("stage", "unit", {key: (1, "8cdc1683")})),
        ):
            with pytest.raises(UserError, match="leads out of the run folder"):
                use()
    assert (tmp_path / "precious").read_bytes() == b"x"


# ---------------------------------------------------------------------------------- object stores


class FlakyFileSystem(MemoryFileSystem):
    """An object store in memory whose calls fail now and then, a write before or after it was done."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    draw = random.Random(0)
    rate = 0.0
    failed = 0
    answer: Exception | None = None

    @classmethod
    def _call(cls, name: str, *args: Any, **keys: Any) -> Any:
        fails = cls.draw.random() < cls.rate
        late = fails and name in ("pipe_file", "rm_file") and cls.draw.random() < 0.5
        if late:  # it is done, but the answer is lost
            getattr(MemoryFileSystem, name)(*args, **keys)
        if fails:
            cls.failed += 1
            raise cls.answer or cls.draw.choice([OSError("503 slow down"), ConnectionError("reset"), TimeoutError()])
        return getattr(MemoryFileSystem, name)(*args, **keys)

    def pipe_file(self, *args: Any, **keys: Any) -> Any:
        return self._call("pipe_file", self, *args, **keys)

    def cat_file(self, *args: Any, **keys: Any) -> Any:
        return self._call("cat_file", self, *args, **keys)

    def exists(self, *args: Any, **keys: Any) -> Any:
        return self._call("exists", self, *args, **keys)

    def ls(self, *args: Any, **keys: Any) -> Any:
        return self._call("ls", self, *args, **keys)

    def find(self, *args: Any, **keys: Any) -> Any:
        return self._call("find", self, *args, **keys)

    def rm_file(self, *args: Any, **keys: Any) -> Any:
        return self._call("rm_file", self, *args, **keys)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(bucket, "FIRST_PAUSE", 1e-4)
    monkeypatch.setattr(bucket, "LONGEST_PAUSE", 1e-3)
    monkeypatch.setattr(FlakyFileSystem, "draw", random.Random(7))
    monkeypatch.setattr(FlakyFileSystem, "failed", 0)
    return RunFolder(f"flaky://{uuid.uuid4().hex}/run")


def test_an_object_store_that_fails_now_and_then_is_asked_again(
    flaky: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlakyFileSystem, "rate", 0.3)
    with Lease.take(flaky.files, beat=1e-3) as lease:
        assert lease.number == 1  # a create whose answer was lost is still ours
        flaky.guard = lease.check
        flaky.write_settings({"value": 1})
        for unit in range(20):
            key, objects = flaky.write(f"scores/u{unit}", {"a": np.arange(unit), "b": np.ones((2, 3))})
            flaky.commit("score", f"u{unit}", objects, key=key)
        assert {name: flaky.group(unit.meta["key"]).read("a").sum() for name, unit in flaky.units("score").items()} == {
            f"u{unit}": unit * (unit - 1) // 2 for unit in range(20)
        }
        before = flaky.manifest("score", "u3").objects
        flaky.forget("score", "u3")
        assert flaky.sweep() == (len(before), sum(size for size, _ in before.values()))
        assert flaky.check(checksums=True) == [] and len(flaky.committed("score")) == 19
    assert FlakyFileSystem.failed > 50


@pytest.mark.parametrize("answer", [ConnectionError("reset by peer"), TimeoutError(), RuntimeError("of the client")])
def test_an_object_store_that_is_gone_is_one_line(
    flaky: RunFolder, monkeypatch: pytest.MonkeyPatch, answer: Exception
) -> None:
    monkeypatch.setattr(FlakyFileSystem, "rate", 1.0)
    monkeypatch.setattr(FlakyFileSystem, "answer", answer)
    monkeypatch.setattr(bucket, "RETRY_SECONDS", 0.05)
    key = "scores/u.0123"
    for use in (*_writes(flaky, 10), flaky.settings, lambda: flaky.units("score"), lambda: flaky.group(key)):
        with pytest.raises(
            UserError, match=rf"^flaky://.*: cannot be .*{type(answer).__name__}.*\(\d+ tries in 0 s\): see to"
        ):
            use()
    assert FlakyFileSystem.failed > 20


@pytest.mark.parametrize("answer", [PermissionError("403"), FileNotFoundError("no such bucket")])
def test_an_answer_is_not_asked_for_again(flaky: RunFolder, monkeypatch: pytest.MonkeyPatch, answer: Exception) -> None:
    monkeypatch.setattr(FlakyFileSystem, "rate", 1.0)
    monkeypatch.setattr(FlakyFileSystem, "answer", answer)
    for count, use in enumerate((lambda: flaky.files.put("run.yaml", b"x"), flaky.settings), 1):
        with pytest.raises(UserError):
            use()
        assert FlakyFileSystem.failed == count


def test_an_answer_that_was_cut_is_not_damage(flaky: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = flaky.write("scores/u", {"a": np.arange(4)})
    group, usual, cut = flaky.group(key), FlakyFileSystem.cat_file, [True, False, True, False]
    monkeypatch.setattr(FlakyFileSystem, "cat_file", lambda *a, **k: usual(*a, **k)[: -3 if cut.pop(0) else None])
    assert group.read("a").tolist() == [0, 1, 2, 3] and cut == []


def test_of_several_creates_one_wins(flaky: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlakyFileSystem, "rate", 0.3)
    for number in range(30):
        won = [flaky.files.create(f"lease/{number}", b"%d" % caller) for caller in range(3)]
        assert won == [True, False, False]
        assert flaky.files.get(f"lease/{number}") == b"0"
