"""Objects of any fsspec file system: each call is tried again for about a minute before it counts as failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import fsspec
import tenacity

from raylux.store.faults import GivenUpError, code_of, unaskable

T = TypeVar("T")

# Seconds: how long one call is tried in all, the first pause, the longest one.
RETRY_SECONDS = 60.0
# How long a store is tried from which nothing was heard yet: a wrong address should not take a minute to tell.
GREETING_SECONDS = 5.0
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 10.0
_BLOCK = 1 << 23
HANDS = 16
# s3fs asks for an object's size before it fetches it, unless it may not fetch parts of it side by side.
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 1}, "s3a": {"max_concurrency": 1}}
# Answers, not faults: asking again would not change them.
_SETTLED = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,  # a file system without exclusive create, which is asked for it once
    TypeError,
)


class Bucket:
    """Objects under a URL. Raises OSError; ``GivenUpError`` where the store failed to the end."""

    faults: tuple[type[Exception], ...] = (Exception,)

    def __init__(self, url: str) -> None:
        self.fs, self.base = fsspec.core.url_to_fs(url, **_OPTIONS.get(url.partition("://")[0], {}))

    def path(self, key: str) -> str:
        return f"{self.base}/{key}" if key else self.base

    def greet(self) -> None:
        """Ask for anything at all; a store that cannot be reached is an error in seconds."""
        with contextlib.suppress(FileNotFoundError):
            _insist(lambda: self.fs.exists(self.base), GREETING_SECONDS)

    # writing

    def put(self, key: str, data: Any) -> None:
        whole = bytes(data)
        _insist(lambda: self.fs.pipe_file(self.path(key), whole))

    put_fresh = put

    def create(self, key: str, data: Any) -> bool:
        """Write unless it exists; True if this call made it.

        Where the store has a conditional write (S3, GCS, Azure) only one of several callers wins. Elsewhere fsspec
        looks before it writes, and two callers within that moment may both write: the later one stays, and what
        is there afterwards decides who won.
        """
        whole, path = bytes(data), self.path(key)
        self.fs.invalidate_cache()
        if _insist(lambda: self.fs.exists(path)):
            return False
        with contextlib.suppress(FileExistsError):  # perhaps a try of ours whose answer was lost
            _insist(lambda: self._create(path, whole))
        try:
            return self.get(key) == whole
        except FileNotFoundError:
            return False

    def _create(self, path: str, whole: bytes) -> None:
        try:
            self.fs.pipe_file(path, whole, mode="create")
        except OSError as error:
            if code_of(error) == "PreconditionFailed":  # s3fs knows it only in the words that AWS uses
                raise FileExistsError(path) from error
            raise

    def settle(self, keys: Iterable[str]) -> None:
        """Nothing to do: an object that was accepted is there to stay."""

    # deleting

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            _insist(lambda: self.fs.rm_file(self.path(key)))

    def clear(self, keys: Iterable[str]) -> None:
        with ThreadPoolExecutor(HANDS) as pool:
            list(pool.map(self.delete, keys))

    # reading

    def get(self, key: str) -> bytes:
        return bytes(_insist(lambda: self.fs.cat_file(self.path(key))))

    def blocks(self, key: str) -> Iterator[bytes]:
        size = self.size(key)
        if size is None:
            raise FileNotFoundError(self.path(key))
        for start in range(0, size, _BLOCK):
            yield bytes(_insist(partial(self.fs.cat_file, self.path(key), start=start, end=min(size, start + _BLOCK))))

    def size(self, key: str) -> int | None:
        self.fs.invalidate_cache()
        try:
            return int(_insist(lambda: self.fs.info(self.path(key)))["size"])
        except FileNotFoundError:
            return None

    def exists(self, key: str) -> bool:
        self.fs.invalidate_cache()
        return bool(_insist(lambda: self.fs.exists(self.path(key))))

    def names(self, prefix: str) -> list[str]:
        self.fs.invalidate_cache()
        path = self.path(prefix)
        try:
            found = _insist(lambda: self.fs.ls(path, detail=False))
        except FileNotFoundError:
            return []
        plain = path.strip("/")
        return [str(name).rstrip("/").rsplit("/", 1)[-1] for name in found if str(name).strip("/") != plain]

    def stamps(self, prefix: str) -> dict[str, str]:
        """Name of each object right under ``prefix`` -> what the store says of it (size, time, ETag)."""
        self.fs.invalidate_cache()
        path = self.path(prefix)
        try:
            found = _insist(lambda: self.fs.ls(path, detail=True))
        except FileNotFoundError:
            return {}
        files = [info for info in found if info["type"] == "file" and info["name"].strip("/") != path.strip("/")]
        return {info["name"].rsplit("/", 1)[-1]: repr(sorted(info.items(), key=str)) for info in files}

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        self.fs.invalidate_cache()
        path = self.path(prefix)
        try:
            found = _insist(lambda: self.fs.find(path, detail=True))
        except FileNotFoundError:
            return
        cut = len(path.lstrip("/"))
        for name, info in found.items():
            yield f"{prefix}{str(name).lstrip('/')[cut:]}", int(info["size"])


def _passing(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, _SETTLED) and not unaskable(error)


def _insist(call: Callable[[], T], seconds: float | None = None) -> T:
    """The call's answer; a fault is met by trying again with growing, random pauses, ``RETRY_SECONDS`` at most."""
    started, tries = time.monotonic(), 0

    def counted() -> T:
        nonlocal tries
        tries += 1
        return call()

    retrying = tenacity.Retrying(
        stop=tenacity.stop_before_delay(min(RETRY_SECONDS, seconds or RETRY_SECONDS)),
        wait=tenacity.wait_exponential_jitter(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE, jitter=FIRST_PAUSE),
        retry=tenacity.retry_if_exception(_passing),
        reraise=True,
    )
    try:
        return retrying(counted)
    except Exception as error:
        if not _passing(error):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise GivenUpError(f"{what} ({tries} tries in {time.monotonic() - started:.0f} s)") from error
