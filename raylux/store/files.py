"""Whole objects by key under one root, on a local disk or any fsspec file system: the one way to the storage."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from isal.isal_zlib import crc32

from raylux.errors import UserError
from raylux.store.bucket import HANDS, Bucket
from raylux.store.disk import PART, Disk
from raylux.store.faults import told

T = TypeVar("T")
V = TypeVar("V")

Objects = dict[str, tuple[int, str]]
"""Key -> (bytes, CRC-32 in hexadecimal)."""
LEASE = "lease"


class Files:
    """Objects under ``root``.

    Every write is whole or not at all, and durable when the call returns. What the storage refuses in the end is
    a UserError of one line; FileNotFoundError is for the caller.

    Raises:
        UserError: no such protocol, or the package that speaks it is not installed.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self.remote = "://" in root and not root.startswith("file://")
        self._store: Disk | Bucket
        self._greeted = False
        if self.remote:
            self._store = _bucket(self.root)
        else:
            self._store = Disk(str(Path(self.root.removeprefix("file://")).expanduser().absolute()))

    @property
    def place(self) -> str:
        """The root as any process may open it: a URL, or an absolute local path."""
        return self.root if self.remote else self._store.base

    def where(self, key: str) -> str:
        """What to open to get at ``key``: a URL, or a local path."""
        return f"{self.place}/{key}".rstrip("/")

    def greet(self) -> None:
        """Before the first read of a command: an object store that gives no answer is an error in seconds.

        Later calls, and those of workers, are patient with it.
        """
        if isinstance(self._store, Bucket) and not self._greeted:
            with self._telling("", "read"):
                self._store.greet()
            self._greeted = True

    # writing

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object."""
        with self._telling(key, "written"):
            self._store.put(_inside(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object that must not exist yet; False if it does. Of several callers one gets True.

        Locally by a hard link; on an object store by its conditional write, if it has one (``Bucket.create``).
        """
        with self._telling(key, "written"):
            return self._store.create(_inside(key), data)

    @contextmanager
    def batch(self) -> Iterator[Batch]:
        """Write several objects under fresh keys: all of them last when the block ends, none stays if it fails."""
        batch = Batch(self)
        try:
            yield batch
            with self._telling(next(iter(batch.objects), ""), "written"):
                self._store.settle(batch.objects)
        except BaseException:
            self._store.clear(batch.begun)
            raise

    def delete(self, key: str) -> None:
        """Remove an object for good; fine if it is not there."""
        with self._telling(key, "deleted"):
            self._store.delete(_inside(key))

    def clear(self, keys: Iterable[str]) -> None:
        """Remove objects that no manifest names any more; a power loss may bring some back."""
        found = [_inside(key) for key in keys]
        with self._telling(found[0] if found else "", "deleted"):
            self._store.clear(found)

    def vanish(self) -> None:
        """Remove the root itself where it is an empty local folder; object stores have none."""
        if isinstance(self._store, Disk):
            self._store.vanish()

    # reading

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError."""
        with self._telling(key, "read", FileNotFoundError):
            return self._store.get(_inside(key))

    def array(self, key: str, into: np.ndarray | None = None) -> np.ndarray:
        """The object's bytes [n], in ``into`` if that has as many. Raises FileNotFoundError."""
        with self._telling(key, "read", FileNotFoundError):
            if isinstance(self._store, Disk):
                return self._store.array(_inside(key), into)
            found = np.frombuffer(self._store.get(_inside(key)), np.uint8)
        if into is None or len(into) != len(found):
            return found
        into[:] = found
        return into

    def size(self, key: str) -> int | None:
        """Bytes of the object; None if there is none."""
        with self._telling(key, "read"):
            return self._store.size(_inside(key))

    def exists(self, key: str) -> bool:
        with self._telling(key, "read"):
            return self._store.exists(_inside(key))

    def names(self, prefix: str, suffix: str = "") -> list[str]:
        """Names of the objects right under ``prefix``, sorted."""
        with self._telling(prefix, "listed"):
            return sorted(name for name in self._store.names(_inside(prefix)) if name.endswith(suffix))

    def stamps(self, prefix: str) -> dict[str, str]:
        """Name of each object right under ``prefix`` -> a text that is another one when the object has changed."""
        with self._telling(prefix, "listed"):
            return self._store.stamps(_inside(prefix))

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, size) of each object under ``prefix``, sorted by key."""
        with self._telling(prefix, "listed"):
            yield from sorted(self._store.walk(_inside(prefix)))

    def checksum(self, key: str) -> str:
        """CRC-32 of the object, in hexadecimal. Raises FileNotFoundError."""
        value = 0
        with self._telling(key, "read", FileNotFoundError):
            for block in self._store.blocks(_inside(key)):
                value = crc32(block, value)
        return f"{value:08x}"

    def empty(self) -> bool:
        """True if there is nothing at the root but a lease and what a killed process had not finished, or no root."""
        return all(name.endswith(PART) or (name == LEASE and self._leases()) for name in self.names(""))

    def _leases(self) -> bool:
        return all(name.split(".")[0].isdigit() for name in self.names(LEASE))

    @contextmanager
    def _telling(self, key: str, verb: str, *passed: type[Exception]) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, (UserError, *passed)) or not isinstance(error, self._store.faults):
                raise
            raise told(self.where(key), verb, error) from None


class Batch:
    """Objects written together; ``objects`` has their sizes and checksums, taken on the way."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self.remote = files.remote
        self.begun: list[str] = []
        self.objects: Objects = {}

    def put(self, key: str, data: Any) -> None:
        """Write bytes, or anything with a flat buffer of bytes, under a key that was never used."""
        with self._files._telling(key, "written"):
            self.begun.append(key)
            self._files._store.put_fresh(_inside(key), data)
        self.objects[key] = len(data), crc(data)

    def put_all(self, objects: Mapping[str, bytes]) -> None:
        """Write small objects; on an object store side by side, for each takes a while to answer."""
        in_turn(lambda item: self.put(*item), objects.items(), self.remote)


def _bucket(url: str) -> Bucket:
    try:
        return Bucket(url)
    except (ImportError, ValueError) as error:  # fsspec's own words: what to install, or that it knows no such thing
        raise UserError(f"{url}: cannot be reached ({error})") from None


def in_turn(call: Callable[[T], V], items: Iterable[T], together: bool) -> list[V]:
    """``call`` of each item, in the items' order; ``together``: several at a time, from threads."""
    if not together:
        return [call(item) for item in items]
    with ThreadPoolExecutor(HANDS) as pool:
        return list(pool.map(call, items))


def crc(data: Any, start: int = 0) -> str:
    """CRC-32 in hexadecimal."""
    return f"{crc32(data, start):08x}"


def fresh(prefix: str) -> str:
    """A key that was never used: ``prefix`` and a random tail."""
    return f"{prefix}.{uuid.uuid4().hex[:12]}"


def _inside(key: str) -> str:
    """The key, unless it leads out of the root: a manifest may come from anywhere."""
    if key.startswith("/") or ".." in key.split("/"):
        raise UserError(f"'{key}': leads out of the run folder; the manifest that names it is not to be trusted")
    return key
