"""Storage that fails: a full disk, a folder that cannot be written, an object store that fails now and then."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import sys
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
            UserError, match=rf"^flaky://.*: cannot be .*{type(answer).__name__}.*\(\d+ tries in \d+ s\): see to"
        ):
            use()
    assert FlakyFileSystem.failed > 20


@pytest.mark.parametrize("answer", [PermissionError("403"), FileNotFoundError("no such bucket")])
def test_an_answer_is_not_asked_for_again(flaky: RunFolder, monkeypatch: pytest.MonkeyPatch, answer: Exception) -> None:
    assert not flaky.exists  # the store is greeted
    monkeypatch.setattr(FlakyFileSystem, "rate", 1.0)
    monkeypatch.setattr(FlakyFileSystem, "answer", answer)
    for count, use in enumerate((lambda: flaky.files.put("run.yaml", b"x"), flaky.settings), 1):
        with pytest.raises(UserError):
            use()
        assert FlakyFileSystem.failed == count


def _of_a_server(code: str, kind: type[OSError] = OSError) -> OSError:
    """An exception as s3fs raises it: botocore's own, with the server's answer, is its cause."""
    cause = Exception(code)
    cause.response = {"Error": {"Code": code}}  # type: ignore[attr-defined]
    error = kind(22, "None") if kind is OSError else kind("None")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("url", "told"), [("nosuch://a/run", "Protocol not known: nosuch"), ("gs://a/run", "install gcsfs")]
)
def test_a_store_that_nothing_here_can_speak_to(url: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=rf"^{url}: cannot be reached \(.*{told}"):
        RunFolder(url)


class NoCredentialsError(Exception):
    """Under botocore's name for it."""


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (_of_a_server("AccessDenied", PermissionError), r"no permission \(AccessDenied\): check the credentials"),
        (_of_a_server("NoSuchBucket", FileNotFoundError), r"there is no such bucket \(NoSuchBucket\): make it"),
        (_of_a_server("InvalidBucketName"), "InvalidBucketName: see to the storage"),
        (NoCredentialsError("Unable to locate credentials"), "Unable to locate credentials: see to the storage"),
    ],
)
def test_what_a_server_refuses_is_asked_once_and_told_by_the_servers_word(
    flaky: RunFolder, monkeypatch: pytest.MonkeyPatch, answer: Exception, told: str
) -> None:
    monkeypatch.setattr(FlakyFileSystem, "rate", 1.0)
    monkeypatch.setattr(FlakyFileSystem, "answer", answer)
    with pytest.raises(UserError, match=rf"^flaky://.*/run.yaml: cannot be written, {told}"):
        flaky.files.put("run.yaml", b"x")
    assert FlakyFileSystem.failed == 1


def test_an_exclusive_create_that_a_server_refuses_is_somebody_elses(
    flaky: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ceph does not say which condition failed, so that s3fs makes no FileExistsError of it."""
    usual = FlakyFileSystem.pipe_file

    def pipe_file(self: FlakyFileSystem, path: str, value: bytes, mode: str = "overwrite", **keys: Any) -> None:
        if mode == "create":
            usual(self, path, b"of another")  # in the moment after the look
            raise _of_a_server("PreconditionFailed")
        usual(self, path, value, mode=mode, **keys)

    monkeypatch.setattr(FlakyFileSystem, "pipe_file", pipe_file)
    assert flaky.files.create("lease/000001.json", b"mine") is False


def test_a_store_that_gives_no_answer_is_told_long_before_a_known_one_is_given_up(
    flaky: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlakyFileSystem, "rate", 1.0)
    monkeypatch.setattr(FlakyFileSystem, "answer", ConnectionError("refused"))
    monkeypatch.setattr(bucket, "RETRY_SECONDS", 1e6)
    monkeypatch.setattr(bucket, "GREETING_SECONDS", 0.05)
    for use in (flaky.settings, lambda: flaky.exists):
        with pytest.raises(UserError, match=r"cannot be read, ConnectionError: refused \(\d+ tries in \d+ s\)"):
            use()
    monkeypatch.setattr(FlakyFileSystem, "rate", 0.0)
    assert not flaky.exists


def test_one_who_reads_many_parts_fetches_a_chunk_once(flaky: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = flaky.write("corpus/tokens", {"a": np.arange(100), "b": np.arange(9.0)})
    fetched: list[str] = []
    usual = FlakyFileSystem.cat_file

    def cat_file(self: FlakyFileSystem, path: str, *args: Any, **keys: Any) -> Any:
        fetched.append(path.partition("corpus/")[2].partition("/")[2])
        return usual(self, path, *args, **keys)

    monkeypatch.setattr(FlakyFileSystem, "cat_file", cat_file)
    group = flaky.group(key, keep=True)
    for start in (3, 50, 7):
        assert group.read("a", slice(start, start + 2)).tolist() == [start, start + 1]
        assert group.read("b", slice(2, 4)).tolist() == [2.0, 3.0]
    assert sorted(fetched) == ["a/c.0", "a/zarr.json", "b/c.0", "b/zarr.json", "zarr.json"]


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
