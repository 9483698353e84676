"""Groups of arrays as Zarr 3, each object of which is checked against one index as it is read.

A group is a folder: ``NAME/zarr.json`` and ``NAME/c.*`` of each array, and, written last, ``zarr.json``, whose
attribute ``raylux`` holds the index (every other object's size and CRC-32) under a checksum of its own. Any
Zarr library reads it; only this one notices a lost or a damaged object for certain.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from raylux.errors import RayluxError
from raylux.profiling import of
from raylux.store.damage import UNSEALED, broken_seal, damaged, read_array, read_whole, seal
from raylux.store.files import Batch, Files, Objects, in_turn

_CHUNK_BYTES = 1 << 26
_META = "zarr.json"
# Below this, handing a file to another thread costs more than writing it.
_SMALL = 1 << 20


def write_group(files: Files, key: str, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> Objects:
    """Write arrays as the group ``key``, which was never used; returns its objects.

    Raises:
        UserError: the storage refuses; nothing stays.
    """
    with files.batch() as batch:
        store = _Writing(batch, key)
        for name, array in arrays.items():
            _write_array(store, name, np.ascontiguousarray(array))
        store.meta.pop(_META, None)  # Zarr's own word about the group: ours has the index
        batch.put_all({f"{key}/{name}": data for name, data in store.meta.items()})
        index = {name.removeprefix(f"{key}/"): list(facts) for name, facts in sorted(batch.objects.items())}
        head = {
            "attributes": {"raylux": {"checksum": UNSEALED, "objects": index}, **attrs},
            "zarr_format": 3,
            "node_type": "group",
        }
        batch.put(f"{key}/{_META}", seal(f"{key}/{_META}", json.dumps(head, ensure_ascii=False)))
    return batch.objects


def _write_array(store: _Writing, name: str, array: np.ndarray) -> None:
    chunks = _chunks(array)
    # Zarr reads a lost chunk as its fill value: one that no array holds gives the loss away.
    fill = np.nan if array.dtype.kind == "f" else -1 if array.dtype.kind == "i" else None
    created = zarr.create_array(
        store,
        name=name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunks or "auto",
        compressors=None,  # the group's index has a checksum of each chunk; one of Zarr's own would cost a copy
        # One folder per array instead of one per dimension: each costs an fsync.
        chunk_key_encoding={"name": "default", "separator": "."},
        fill_value=fill,
        config={"write_empty_chunks": True},
    )
    if array.nbytes < _SMALL:
        if array.size:
            created[...] = array
        return
    # As Zarr would, but straight from the array's memory: Zarr copies each chunk first.
    runs = enumerate(range(0, len(array), chunks[0]))
    store.put_chunks(
        (_chunk_key(name, place, array.ndim), _run(array, start, chunks[0], fill)) for place, start in runs
    )


def _run(array: np.ndarray, start: int, count: int, fill: float | None) -> np.ndarray:
    """So many rows of an array; those beyond its end have the fill value."""
    rows = array[start : start + count]
    if len(rows) == count:
        return rows
    return np.concatenate([rows, np.full((count - len(rows), *array.shape[1:]), fill or 0, array.dtype)])


def _chunk_key(name: str, place: int, dimensions: int) -> str:
    """Of a run of whole rows of an array."""
    return f"{name}/c.{place}" + ".0" * (dimensions - 1)


def _chunks(array: np.ndarray) -> tuple[int, ...]:
    """Shape of an array's chunks: runs of rows, as equal as can be, since Zarr fills the last one up to the others."""
    if not array.ndim:
        return ()
    most = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes))
    rows = len(array)
    return (max(1, -(-rows // max(1, -(-rows // most)))), *(max(1, size) for size in array.shape[1:]))


class Group:
    """A written group of arrays; each object is compared with the group's index as it is read.

    Args:
        files: of the run folder.
        key: of the group.
        keep: keep the last chunk of each array that was fetched from an object store (64 MiB of an array at most), for
            one who reads many small parts.
    """

    def __init__(self, files: Files, key: str, keep: bool = False) -> None:
        self._files, self._key = files, key
        name = f"{key}/{_META}"
        try:
            data = files.get(name)
        except FileNotFoundError:
            raise damaged(files, name, "missing") from None
        problem = broken_seal(name, data)
        if problem:
            raise damaged(files, name, problem)
        self._attrs: dict[str, Any] = json.loads(data)["attributes"]
        objects = {name: (int(size), str(crc)) for name, (size, crc) in self._attrs.pop("raylux")["objects"].items()}
        self._store = _Reading(files, key, objects, keep and files.remote)

    @property
    def attrs(self) -> dict[str, Any]:
        return dict(self._attrs)

    def __contains__(self, name: str) -> bool:
        return f"{name}/{_META}" in self._store.objects

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._array(name).shape)

    def read(self, name: str, where: Any = ...) -> np.ndarray:
        """An array or a part of it.

        Raises:
            DamagedError: an object of it is missing or is not what was written.
        """
        with of("read"):
            array = self._array(name)
            try:
                return np.asarray(array[where])
            except (RayluxError, MemoryError):
                raise
            except Exception as error:
                raise damaged(self._files, f"{self._key}/{name}", f"cannot be read ({error})") from None

    def read_into(self, name: str, memory: Callable[[int], np.ndarray]) -> np.ndarray:
        """A whole array, its chunks straight in memory of the caller's: Zarr would read each and copy it.

        Args:
            name: of the array.
            memory: gives so many bytes, as uint8 [n].

        Raises:
            DamagedError: as ``read``.
        """
        with of("read"):
            array = self._array(name)
            if not array.ndim:
                return self.read(name)
            rows, count = array.shape[0], -(-array.shape[0] // array.chunks[0])
            keys = [_chunk_key(name, place, array.ndim) for place in range(count)]
            chunk = math.prod(array.chunks) * array.dtype.itemsize
            # Chunks are runs of whole rows; those of older runs have a checksum of Zarr's own behind them.
            if not keys or any(self._store.objects.get(key, (0, ""))[0] != chunk for key in keys):
                return self.read(name)
            found = memory(chunk * len(keys))
            for key, part in zip(keys, np.split(found, len(keys)), strict=True):
                read_array(self._files, f"{self._key}/{key}", *self._store.objects[key], part)
            whole: np.ndarray = found.view(array.dtype).reshape(-1, *array.shape[1:])[:rows]
            return whole

    def _array(self, name: str) -> zarr.Array:
        if name not in self:
            raise damaged(self._files, f"{self._key}/{name}", "missing")
        return zarr.open_array(self._store, path=name, mode="r", zarr_format=3)


class _Objects(Store):
    """What the two stores below share: no listing, no partial values, no deletes."""

    supports_writes = True
    supports_deletes = False
    supports_listing = False

    def __eq__(self, value: object) -> bool:
        return self is value

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, wanted) for key, wanted in key_ranges]

    async def delete(self, key: str) -> None:
        raise _refused(f"delete {key}")

    def list(self) -> AsyncIterator[str]:
        raise _refused("list")

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise _refused(f"list {prefix}")

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise _refused(f"list {prefix}")


def _refused(what: str) -> io.UnsupportedOperation:
    """Zarr wants these methods of every store, and asks a store of one group for none of them."""
    return io.UnsupportedOperation(f"{what}: a written group is read as a whole, and never changes")


class _Writing(_Objects):
    """Chunks go out at once; the small metadata waits in ``meta``, where Zarr reads and rewrites it."""

    def __init__(self, batch: Batch, key: str) -> None:
        super().__init__()
        self._batch, self._key = batch, key
        self.meta: dict[str, bytes] = {}

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        # The key is fresh and each chunk is written once: there is nothing else to find.
        return prototype.buffer.from_bytes(self.meta[key]) if key in self.meta else None

    async def exists(self, key: str) -> bool:
        return key in self.meta

    async def set(self, key: str, value: Buffer) -> None:
        if key.endswith(_META):
            self.meta[key] = value.to_bytes()
            return
        chunk = value.as_numpy_array()
        if self._batch.remote:
            await asyncio.to_thread(self._put, key, chunk)
        else:
            self._put(key, chunk)

    def put_chunks(self, chunks: Iterable[tuple[str, np.ndarray]]) -> None:
        """Write whole chunks; to an object store several at a time."""
        in_turn(lambda item: self._put(*item), chunks, self._batch.remote)

    def _put(self, key: str, chunk: np.ndarray) -> None:
        self._batch.put(f"{self._key}/{key}", np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)


class _Reading(_Objects):
    """Objects of a written group, each compared with the index."""

    def __init__(self, files: Files, key: str, objects: Objects, keep: bool) -> None:
        super().__init__(read_only=True)
        self._keep, self._last = keep, dict[str, tuple[str, bytes | np.ndarray]]()  # array -> its last chunk
        self._files, self._key, self.objects = files, key, objects
        self._meta: dict[str, bytes] = {}  # small, never changed, and asked for at each read

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        name = f"{self._key}/{key}"
        if key not in self.objects:
            if key.endswith(_META):
                return None
            # Zarr would read it as its fill value.
            raise damaged(self._files, name, "missing from the group's index")
        size, checksum = self.objects[key]
        array = key.rpartition("/")[0]
        data: bytes | np.ndarray
        if key in self._meta:
            data = self._meta[key]
        elif array in self._last and self._last[array][0] == key:
            data = self._last[array][1]
        elif size < _SMALL and not self._files.remote:
            data = read_whole(self._files, name, size, checksum)
        else:
            data = await asyncio.to_thread(read_array, self._files, name, size, checksum)
        if key.endswith(_META):
            self._meta[key] = bytes(data)
        elif self._keep:
            self._last[array] = key, data
        return prototype.buffer.from_bytes(_part(data, byte_range))

    async def exists(self, key: str) -> bool:
        return key in self.objects

    async def set(self, key: str, value: Buffer) -> None:
        raise _refused(f"write {key}")


def _part(data: bytes | np.ndarray, wanted: ByteRequest | None) -> Any:
    if isinstance(wanted, RangeByteRequest):
        return data[wanted.start : wanted.end]
    if isinstance(wanted, OffsetByteRequest):
        return data[wanted.offset :]
    if isinstance(wanted, SuffixByteRequest):
        return data[-wanted.suffix :]
    return data
