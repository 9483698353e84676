"""Where input comes from: local paths, fsspec URLs and files inside installed packages.

Everything that opens a user's file goes through here, so that a missing file, an unknown protocol or a
broken archive ends in the same kind of line.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.compression import register_compression
from fsspec.spec import AbstractBufferedFile

from raylux.errors import UserError
from raylux.markup import odd_character

PACKAGE = "package://"
_COMPRESSION = (".gz", ".bz2", ".xz", ".lzma", ".zst")
_LINE_LIMIT = 1 << 28  # bytes

# fsspec unpacks by ISA-L where that is installed, whose errors are its own and say less of a file that is not packed.
_GZIP = "raylux-gzip"
register_compression(_GZIP, lambda file, mode="rb", **_: gzip.GzipFile(fileobj=file, mode=mode), (), force=True)


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus: ``path`` opens it, ``name`` is its path relative to what the user named."""

    path: str
    name: str

    @property
    def hidden(self) -> bool:
        """Whether the file or a folder of its name begins with a dot."""
        return any(part.startswith(".") for part in self.name.split("/"))


def is_url(path: str) -> bool:
    """Whether ``path`` is an fsspec URL (``s3://…``), not a local path or ``package://``."""
    return "://" in path and not path.startswith(PACKAGE)


def resolve(path: str) -> str:
    """Turn ``package://MODULE/FILE`` into a local path; leave every other path, URL or hub name alone.

    The module is looked up without being imported: a data package may need libraries that are not there.

    Raises:
        UserError: a control character; the module is not installed, FILE is not in it or leaves the package's folder.
    """
    odd = odd_character(path)
    if odd is not None:
        raise UserError(f"{path}: a path must not hold the character {odd}")
    if not path.startswith(PACKAGE):
        return path
    module, _, name = path.removeprefix(PACKAGE).partition("/")
    if not module.isidentifier() or not name:
        raise UserError(f"{path}: write package://MODULE/FILE, with the module's top-level name")
    folders = _package_folders(module)
    if not folders:
        raise UserError(f"{path}: the Python package '{module}' is not installed; pip install what provides it")
    for folder in folders:
        try:
            target = (folder / name).resolve()
            inside, there = target.is_relative_to(folder.resolve()), target.exists()
        except (OSError, RuntimeError) as error:  # too long a name, a link to itself
            raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
        if not inside:
            raise UserError(f"{path}: '{name}' leaves the folder of the package '{module}'")
        if there:
            return str(target)
    raise UserError(f"{path}: the package '{module}' is installed, but has no file '{name}'")


def _package_folders(module: str) -> list[Path]:
    """Folders of an installed top-level package, without importing it; none for a builtin or plain module."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return []
    if spec is None or spec.submodule_search_locations is None:
        return []
    return [Path(folder) for folder in spec.submodule_search_locations]


def data_suffix(path: str) -> str:
    """The lower-case suffix that tells a file's format, a compression suffix apart: ``a.jsonl.gz`` → ``.jsonl``."""
    name = path.rsplit("/", 1)[-1].lower()
    for suffix in _COMPRESSION:
        name = name.removesuffix(suffix)
    return Path(name).suffix


@contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """Open a local path or URL for reading bytes; ``.gz`` and its like are unpacked on the way.

    Raises:
        UserError: the file is missing or cannot be read, also later while it is read.
    """
    try:
        _check_kind(path)
        with ExitStack() as stack:
            yield _opened(path, stack)
    except (FileNotFoundError, IsADirectoryError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else "is a folder, a file is needed"
        raise UserError(f"{path}: {what}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None


def _opened(path: str, stack: ExitStack) -> Any:
    try:
        source = fsspec.open(path, "rb", compression=_GZIP if path.lower().endswith(".gz") else "infer")
        packed = source.compression is None and path.endswith(_COMPRESSION)
        file = None if packed else stack.enter_context(source)
    except OSError:
        raise
    except Exception as error:  # every remote file system has its own exceptions
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
    if file is None:
        raise UserError(f"{path}: this compression needs a package that is not installed; unpack the file, or use .gz")
    # Files of a store have no readline of a bounded length.
    return io.BufferedReader(file) if isinstance(file, AbstractBufferedFile) else file


def _check_kind(path: str) -> None:
    """Refuse a local pipe or device: it may keep a reader waiting for ever, or never end."""
    if is_url(path):
        return
    mode = os.stat(os.path.expanduser(path)).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path}: is a pipe or a device, a file is needed")


def read_lines(file: IO[bytes], where: str) -> Iterator[tuple[int, bytes]]:
    """Lines of an open file with their numbers from 1.

    Raises:
        UserError: a line is longer than 256 MiB (a packed file may hold terabytes of one byte).
    """
    number = 1
    while line := file.readline(_LINE_LIMIT + 1):
        if len(line) > _LINE_LIMIT:
            raise UserError(f"{where} line {number}: longer than {_LINE_LIMIT:,} bytes")
        yield number, line
        number += 1


def read_text(path: str) -> str:
    """The whole file as text, a byte order mark dropped.

    Raises:
        UserError: the file is missing, cannot be read, or is not UTF-8 (says the byte).
    """
    with open_bytes(path) as file:
        data = file.read()
    return decode_utf8(data, path)


def decode_utf8(data: bytes, where: str) -> str:
    """``data`` as text; the error names ``where`` and the byte that is no text (counted from 0)."""
    nul = data.find(0)
    if nul >= 0:
        raise UserError(f"{where}: holds a NUL (byte {nul}), so no text; UTF-16 or a binary file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}); convert it, or correct that byte") from None


def find_files(path: str) -> list[SourceFile]:
    """The files that a path, folder, glob or URL names, sorted by name, hidden ones left out.

    Returns an empty list where a plain path does not exist, so that the caller may try it as a hub name.

    Raises:
        UserError: a glob matches nothing, a folder holds no file, or the file system cannot be reached.
    """
    try:
        system, root = fsspec.core.url_to_fs(path)
        files = _listed(system, root, path)
        for file in files if not _remote(system) else ():
            _check_kind(file.path)
    except UserError:
        raise
    except Exception as error:  # every remote file system has its own exceptions
        raise UserError(f"{path}: cannot be listed ({one_line(error)})") from None
    if files:
        return files
    if is_url(path):
        raise UserError(f"{path}: no such file or folder")
    if os.path.lexists(os.path.expanduser(path)):
        raise UserError(f"{path}: is neither a file nor a folder (a pipe, a device, a broken link)")
    return []


def _listed(system: Any, root: str, path: str) -> list[SourceFile]:
    if system.isfile(root):
        return [_source(system, root, root.rsplit("/", 1)[0])]
    if system.isdir(root):
        return _folder(system, root, path)
    return _glob(system, root, path) if any(mark in path for mark in "*?[") else []


def _folder(system: Any, root: str, path: str) -> list[SourceFile]:
    visible = [
        file for file in (_source(system, found, root) for found in sorted(system.find(root))) if not file.hidden
    ]
    if not visible:
        raise UserError(f"{path}: the folder holds no file")
    return visible


def _glob(system: Any, root: str, path: str) -> list[SourceFile]:
    fixed = root[: min(root.find(mark) for mark in "*?[" if mark in root)].rsplit("/", 1)[0]
    found = [_source(system, match, fixed) for match in sorted(system.glob(root)) if system.isfile(match)]
    if "/." not in root.removeprefix(fixed):  # hidden files only where the pattern asks for them, as in a shell
        found = [file for file in found if not file.hidden]
    if not found:
        raise UserError(f"{path}: the pattern matches no file")
    return found


def _source(system: Any, found: str, base: str) -> SourceFile:
    name = found.removeprefix(base).lstrip("/")
    return SourceFile(path=str(system.unstrip_protocol(found)) if _remote(system) else found, name=name)


def _remote(system: Any) -> bool:
    protocols = system.protocol if isinstance(system.protocol, (tuple, list)) else (system.protocol,)
    return "file" not in protocols


def one_line(error: BaseException) -> str:
    """An exception as one short line: its type, and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__
