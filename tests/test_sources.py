"""Paths, package files, folders, globs and the lines that say what is wrong with them."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest

from raylux.errors import UserError
from raylux.sources import data_suffix, find_files, is_url, one_line, open_bytes, read_lines, read_text, resolve


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that cannot be imported: resolving must not try."""
    folder = tmp_path / "site" / "toydata"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data" / "a.txt").write_text("hello")
    (tmp_path / "site" / "secret.txt").write_text("secret")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_package_file_is_found_without_importing_the_package(package: Path) -> None:
    assert Path(resolve("package://toydata/data/a.txt")) == (package / "data" / "a.txt").resolve()
    assert Path(resolve("package://toydata/data")) == (package / "data").resolve()
    assert "toydata" not in sys.modules


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("package://toydata/nothing.txt", "has no file 'nothing.txt'"),
        ("package://toydata/../secret.txt", "leaves the folder"),
        ("package://toydata//etc/hostname", "leaves the folder"),
        ("package://nosuchpackage_x/a.txt", "'nosuchpackage_x' is not installed"),
        ("package://toydata", "write package://MODULE/FILE"),
        ("package://a.b/c", "write package://MODULE/FILE"),
        ("package://sys/c", "is not installed"),
    ],
)
def test_package_errors_are_one_line(package: Path, path: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["a/b.jsonl", "/tmp/x", "s3://bucket/key", "owner/name", "memory://a"])
def test_other_paths_stay_as_they_are(path: str) -> None:
    assert resolve(path) == path
    assert is_url(path) == ("://" in path)


def test_package_path_is_no_url() -> None:
    assert not is_url("package://a/b")


def test_suffix_ignores_compression_and_case() -> None:
    assert data_suffix("x/A.JSONL.gz") == ".jsonl"
    assert data_suffix("x.d/name") == ""


def test_files_of_a_folder_are_sorted_named_from_it_and_not_hidden(tmp_path: Path) -> None:
    for name in ("b.txt", "sub/a.txt", ".hidden", ".git/x.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [file.name for file in find_files(str(tmp_path))] == ["a.txt", "b.txt", "sub/a.txt"]
    assert [file.name for file in find_files(str(tmp_path / "**" / "*.txt"))] == ["a.txt", "b.txt", "sub/a.txt"]
    assert [file.name for file in find_files(str(tmp_path / "sub" / "*.txt"))] == ["a.txt"]
    assert [file.name for file in find_files(str(tmp_path / "a.txt"))] == ["a.txt"]
    assert all(Path(file.path).is_file() for file in find_files(str(tmp_path)))


def test_a_name_with_glob_characters_is_a_file_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert [file.name for file in find_files(str(tmp_path / "a[1].txt"))] == ["a[1].txt"]


def test_url_folder_keeps_its_protocol() -> None:
    with fsspec.open("memory://corpus_sources/sub/a.txt", "wb") as file:
        file.write(b"hello")
    (found,) = find_files("memory://corpus_sources")
    assert found.name == "sub/a.txt"
    assert read_text(found.path) == "hello"


def test_what_is_not_there(tmp_path: Path) -> None:
    assert find_files(str(tmp_path / "nothing")) == []  # may still be a hub name: the caller decides
    (tmp_path / "empty").mkdir()
    for path, said in [
        (str(tmp_path / "*.jsonl"), "the pattern matches no file"),
        (str(tmp_path / "empty"), "the folder holds no file"),
        ("memory://nothing_here/a", "no such file or folder"),
        ("nosuchprotocol://a", "cannot be listed"),
    ]:
        with pytest.raises(UserError, match=said):
            find_files(path)


def test_reading(tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_text(str(tmp_path / "bom.txt")) == "hello"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("é".encode()))
    assert read_text(str(tmp_path / "a.txt.gz")) == "é"


def test_reading_errors(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"hello" * 100)[:-10])
    (tmp_path / "plain.txt.gz").write_bytes(b"not gzip")
    for name, said in [
        ("latin.txt", r"latin.txt: not UTF-8 text \(byte 3\)"),
        ("cut.txt.gz", "cannot be read"),
        ("plain.txt.gz", "cannot be read"),
        ("nothing.txt", "nothing.txt: no such file"),
        ("", "is a folder"),
    ]:
        with pytest.raises(UserError, match=said):
            read_text(str(tmp_path / name))


def test_user_errors_pass_through_an_open_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="row 3"), open_bytes(str(tmp_path / "a.txt")):
        raise UserError("row 3 is wrong")


def test_one_line_of_an_exception() -> None:
    assert one_line(ValueError("a\nb")) == "ValueError: a"
    assert one_line(ValueError()) == "ValueError"


class _Served(fsspec.spec.AbstractBufferedFile):
    """As the files of s3fs and gcsfs: fetched in ranges."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return _Remote.files[self.path][start:end]


class _Remote(fsspec.AbstractFileSystem):
    protocol = "served"
    files: ClassVar[dict[str, bytes]] = {}

    def info(self, path: str, **keys: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path not in self.files:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(self.files[path]), "type": "file"}

    def _open(self, path: str, mode: str = "rb", **keys: Any) -> _Served:
        return _Served(self, self._strip_protocol(path), mode, block_size=7)


def test_a_file_of_a_store_is_read_by_lines_of_a_bounded_length(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("served", _Remote, clobber=True)
    lines = [b"%d %s\n" % (number, b"x" * number) for number in range(30)]
    _Remote.files = {"a.txt": b"".join(lines), "b.txt.gz": gzip.compress(b"".join(lines))}
    for name in _Remote.files:
        with open_bytes(f"served://{name}") as file:
            assert list(read_lines(file, name)) == list(enumerate(lines, 1))
    monkeypatch.setattr("raylux.sources._LINE_LIMIT", 20)
    with open_bytes("served://a.txt") as file, pytest.raises(UserError, match=r"^a\.txt line 18: longer than 20 bytes"):
        list(read_lines(file, "a.txt"))
