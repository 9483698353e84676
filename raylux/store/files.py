"""Whole objects by key under one root, on a local disk or any fsspec file system."""

from __future__ import annotations

import contextlib
import os
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import fsspec

from raylux.errors import UserError

_BLOCK = 1 << 20
_PART = ".part"


class Files:
    """Objects under ``root``. A ``put`` is seen whole or not at all."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self.remote = "://" in root and not root.startswith("file://")
        if self.remote:
            self._fs, self._base = fsspec.core.url_to_fs(self.root)
        else:
            self._base = str(Path(self.root.removeprefix("file://")).expanduser().absolute())
            self._fs = fsspec.filesystem("file")

    @property
    def place(self) -> str:
        """The root as any process may open it: a URL, or an absolute local path."""
        return self.root if self.remote else self._base

    def where(self, key: str) -> str:
        """What to open to get at ``key``: a URL, or a local path."""
        return f"{self.place}/{key}"

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}"

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        if self.remote:
            self._fs.pipe_file(path, data)
            return
        part = f"{path}.{uuid.uuid4().hex[:8]}{_PART}"
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        finally:
            # Full disk, Ctrl-C: what is not whole does not stay.
            with contextlib.suppress(OSError):
                os.unlink(part)

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is none to remove."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError."""
        data = self._fs.cat_file(self._path(key))
        return bytes(data)

    def exists(self, key: str) -> bool:
        return bool(self._fs.exists(self._path(key)))

    def names(self, prefix: str, suffix: str = "") -> list[str]:
        """Names of the objects right under ``prefix``, sorted."""
        try:
            found = self._fs.ls(self._path(prefix), detail=False)
        except FileNotFoundError:
            return []
        names = (str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)
        return sorted(name for name in names if name.endswith(suffix))

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, size) of each object under ``prefix``, sorted by key."""
        base = self._path(prefix)
        found = self._fs.find(base, detail=True)
        for path, info in sorted(found.items()):
            tail = str(path)[len(base.lstrip("/") if self.remote and not str(path).startswith(base) else base) :]
            yield f"{prefix}{tail}", int(info["size"])

    def checksum(self, key: str) -> str:
        """CRC-32 of the object, in hexadecimal."""
        value = 0
        with self._fs.open(self._path(key), "rb") as file:
            while block := file.read(_BLOCK):
                value = zlib.crc32(block, value)
        return f"{value:08x}"

    def empty(self) -> bool:
        """True if there is nothing at the root but what a killed process had not finished, or no root."""
        return all(name.endswith(_PART) for name in self.names(""))


def fresh(prefix: str) -> str:
    """A key that was never used: ``prefix`` and a random tail."""
    return f"{prefix}.{uuid.uuid4().hex[:12]}"
