"""Objects as files of a local disk: seen whole or not at all, and still there after a power loss."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

PART = ".part"
_BLOCK = 1 << 20
# File systems without hard links, or on which a folder cannot be synced, say one of these.
_NOT_HERE = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF, errno.EMLINK)


class Disk:
    """Files under ``base``. Raises OSError as the system says it."""

    faults: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, base: str) -> None:
        self.base = base
        # Folders whose own entry in the folder above is known to be on the disk.
        self._anchored: set[str] = set()

    def path(self, key: str) -> str:
        return f"{self.base}/{key}" if key else self.base

    # writing

    def put(self, key: str, data: Any) -> None:
        """Write or replace: part file, fsync, rename, fsync of the folder."""
        path = self.path(key)
        part = f"{path}.{uuid.uuid4().hex[:8]}{PART}"
        try:
            self._write(part, data)
            os.replace(part, path)
        except BaseException:  # a full disk, Ctrl-C: what is not whole does not stay
            _unlink(part)
            raise
        self.settle([key])

    def create(self, key: str, data: Any) -> bool:
        """Write unless it exists; True if this call made it.

        A finished part file gets the name as a hard link, so the object is whole from its first moment. A file
        system without hard links gets an exclusive open instead: there a kill may leave a cut object.
        """
        path = self.path(key)
        part = f"{path}.{uuid.uuid4().hex[:8]}{PART}"
        try:
            self._write(part, data)
            try:
                os.link(part, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                try:
                    self._write(path, data)
                except FileExistsError:
                    return False
        finally:
            _unlink(part)
        self.settle([key])
        return True

    def put_fresh(self, key: str, data: Any) -> None:
        """Write under a key that nobody reads yet: no rename; ``settle`` makes its name last."""
        self._write(self.path(key), data)

    def settle(self, keys: Iterable[str]) -> None:
        """Make the names of these objects last: fsync of their folders, and of those above that are new."""
        due: dict[str, None] = {}
        anchors = []
        for key in keys:
            folder = os.path.dirname(self.path(key))
            due[folder] = None
            while folder not in self._anchored and len(folder) >= len(self.base):
                anchors.append(folder)
                folder = os.path.dirname(folder)
                due[folder] = None
        for folder in sorted(due, key=len, reverse=True):
            _sync_folder(folder)
        self._anchored.update(anchors)

    def _write(self, path: str, data: Any) -> None:
        self._make(os.path.dirname(path))
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _make(self, folder: str) -> None:
        if not os.path.isdir(folder):
            os.makedirs(folder, exist_ok=True)
            # It was removed and made anew: its entry is not on the disk again.
            while folder in self._anchored:
                self._anchored.discard(folder)
                folder = os.path.dirname(folder)

    # deleting

    def delete(self, key: str) -> None:
        """Remove for good; fine if it is not there."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(self.path(key))
            _sync_folder(os.path.dirname(self.path(key)))

    def clear(self, keys: Iterable[str]) -> None:
        """Remove objects that nobody names, and the folders that they leave empty."""
        folders = set()
        for key in keys:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(self.path(key))
            folders.add(os.path.dirname(self.path(key)))
        for folder in sorted(folders, key=len, reverse=True):
            self._prune(folder)

    def _prune(self, folder: str) -> None:
        with contextlib.suppress(OSError):  # it is not empty, or somebody was faster
            while len(folder) > len(self.base):
                os.rmdir(folder)
                folder = os.path.dirname(folder)

    def vanish(self) -> None:
        """Remove the base, if there is nothing in it."""
        with contextlib.suppress(OSError):
            os.rmdir(self.base)
            self._anchored.clear()

    # reading

    def get(self, key: str) -> bytes:
        with _missing(), open(self.path(key), "rb") as file:
            return file.read()

    def array(self, key: str, into: np.ndarray | None = None) -> np.ndarray:
        """An object in numpy's memory, which lies in huge pages: large ones are read in less time so.

        ``into``: bytes that it fills, if they are as many.
        """
        with _missing(), open(self.path(key), "rb", buffering=0) as file:
            size, done = os.fstat(file.fileno()).st_size, 0
            found = np.empty(size, np.uint8) if into is None or len(into) != size else into
            while done < len(found) and (count := file.readinto(found[done:].data)):
                done += count
            return found[:done]

    def blocks(self, key: str) -> Iterator[bytes]:
        with _missing(), open(self.path(key), "rb") as file:
            while block := file.read(_BLOCK):
                yield block

    def size(self, key: str) -> int | None:
        try:
            return os.stat(self.path(key)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def exists(self, key: str) -> bool:
        return os.path.exists(self.path(key))

    def names(self, prefix: str) -> list[str]:
        try:
            return os.listdir(self.path(prefix))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def stamps(self, prefix: str) -> dict[str, str]:
        """Name of each file right under ``prefix`` -> what changes when the file does."""
        found = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.path(prefix)) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # it went while we looked
                    if entry.is_file():  # no pipe, no device: it may keep a reader waiting for ever
                        facts = entry.stat()
                        found[entry.name] = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"
        return found

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        base = self.path(prefix)
        if os.path.isfile(base):
            yield prefix, os.stat(base).st_size
        for folder, _, names in os.walk(base, onerror=_raise_unless_missing):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):  # it went while we looked
                    yield f"{prefix}{path[len(base) :]}", os.lstat(path).st_size


@contextlib.contextmanager
def _missing() -> Iterator[None]:
    try:
        yield
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, error.filename) from None


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _sync_folder(path: str) -> None:
    """Fsync of a folder, where the file system knows that."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):  # gone with what was in it, or above the run folder and not ours
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    finally:
        os.close(handle)
