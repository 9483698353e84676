"""The run folder: run.yaml, the ledger of committed units, and groups of Zarr arrays."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from raylux.errors import RayluxError, UserError
from raylux.store.files import Files, fresh

FORMAT_VERSION = 1
_CHUNK_BYTES = 1 << 26


class DamagedError(RayluxError):
    """An object that a manifest names is missing or is not what was written."""


@dataclass(frozen=True)
class Manifest:
    """One commit of the ledger.

    Attributes:
        stage: as "fit.eigen".
        unit: the unit's name within the stage.
        objects: every object it vouches for: key -> (bytes, CRC-32).
        meta: what the stage says about it, JSON.
    """

    stage: str
    unit: str
    objects: dict[str, tuple[int, str]]
    meta: dict[str, Any]


class RunFolder:
    """A run folder at a local path or an fsspec URL. Opening it creates nothing."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.files = Files(path)

    # run.yaml

    @property
    def exists(self) -> bool:
        return self.files.exists("run.yaml")

    def settings(self) -> dict[str, Any]:
        """What run.yaml says.

        Raises:
            UserError: there is no run here, or one of another format.
        """
        try:
            data = yaml.safe_load(self.files.get("run.yaml"))
        except FileNotFoundError:
            raise UserError(f"{self.path}: not a run folder (no run.yaml in it)") from None
        except yaml.YAMLError:
            raise UserError(f"{self.path}/run.yaml: damaged, it is not valid YAML") from None
        if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
            found = data.get("format_version") if isinstance(data, dict) else None
            raise UserError(f"{self.path}: run folder of format {found}, this version reads {FORMAT_VERSION}")
        return data

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Replace run.yaml. Raises UserError where the folder holds something else than a run."""
        if not self.exists and not self.files.empty():
            raise UserError(f"{self.path}: the folder is not empty and holds no run; choose another run.folder")
        data = {"format_version": FORMAT_VERSION, **settings}
        self.files.put("run.yaml", yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode())

    # the ledger

    def commit(
        self, stage: str, unit: str, objects: Mapping[str, tuple[int, str]] | None = None, /, **meta: Any
    ) -> Manifest:
        """Write the manifest that makes ``objects`` (as ``write`` returned them) part of the run."""
        manifest = Manifest(stage, unit, dict(objects or {}), meta)
        data = {"objects": {key: list(value) for key, value in manifest.objects.items()}, "meta": meta}
        self.files.put(_ledger_key(stage, unit), json.dumps(data, ensure_ascii=False).encode())
        return manifest

    def units(self, stage: str) -> dict[str, Manifest]:
        """All committed units of a stage by name, in the names' order."""
        names = self.files.names(f"ledger/{stage}", ".json")
        units = [urllib.parse.unquote(name.removesuffix(".json")) for name in names]
        return {unit: self.manifest(stage, unit) for unit in units}

    def committed(self, stage: str) -> set[str]:
        """The names of a stage's committed units."""
        names = self.files.names(f"ledger/{stage}", ".json")
        return {urllib.parse.unquote(name.removesuffix(".json")) for name in names}

    def manifest(self, stage: str, unit: str) -> Manifest:
        key = _ledger_key(stage, unit)
        try:
            data = json.loads(self.files.get(key))
            objects = {name: (int(size), str(crc)) for name, (size, crc) in data["objects"].items()}
            return Manifest(stage, unit, objects, data["meta"])
        except FileNotFoundError:
            raise DamagedError(f"{self.path}: {key} is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedError(f"{self.path}: {key} is damaged") from None

    def forget(self, stage: str, unit: str) -> None:
        """Take a unit out of the ledger."""
        self.files.delete(_ledger_key(stage, unit))

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects that no manifest names any more."""
        for key in keys:
            self.files.delete(key)

    # arrays

    def write(
        self, prefix: str, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, tuple[int, str]]]:
        """Write a group of arrays under a fresh key.

        Returns:
            The key, and the objects written with size and checksum, for ``commit``.
        """
        key = fresh(prefix)
        try:
            group = zarr.open_group(_store(self.files.where(key)), mode="w-")
            group.attrs.update(dict(attrs or {}))
            for name, array in arrays.items():
                _write_array(group, name, np.ascontiguousarray(array))
        except OSError as error:
            raise UserError(f"{self.files.where(key)}: cannot be written ({error.strerror or error})") from None
        objects = {name: (size, self.files.checksum(name)) for name, size in self.files.walk(key)}
        return key, objects

    def put(self, prefix: str, suffix: str, data: bytes) -> tuple[str, dict[str, tuple[int, str]]]:
        """Write one plain object under a fresh key; returns as ``write`` does."""
        key = fresh(prefix) + suffix
        self.files.put(key, data)
        return key, {key: (len(data), self.files.checksum(key))}

    def group(self, key: str) -> Group:
        return Group(self, key)

    def verify(self, manifest: Manifest, checksums: bool = True) -> list[str]:
        """What is wrong with the objects of a manifest, one line each; empty if all is well."""
        problems = []
        for key, (size, checksum) in manifest.objects.items():
            found = dict(self.files.walk(key)) if self.files.exists(key) else {}
            if key not in found:
                problems.append(f"{key}: missing")
            elif found[key] != size:
                problems.append(f"{key}: {found[key]} bytes instead of {size}")
            elif checksums and self.files.checksum(key) != checksum:
                problems.append(f"{key}: checksum differs")
        return problems


def _store(where: str, read_only: bool = False) -> Store:
    return (
        FsspecStore.from_url(where, read_only=read_only) if "://" in where else LocalStore(where, read_only=read_only)
    )


class _Whole(WrapperStore[Any]):
    """A store in which every chunk that is asked for must be there: Zarr reads a lost one as its fill value."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        found = await super().get(key, prototype, byte_range)
        if found is None and "/c/" in key:
            raise FileNotFoundError(f"chunk {key} is missing")
        return found


class Group:
    """A written group of arrays; each chunk must be there, and its checksum is verified as it is read."""

    def __init__(self, folder: RunFolder, key: str) -> None:
        self._where = f"{folder.path}/{key}"
        try:
            self._group = zarr.open_group(_Whole(_store(folder.files.where(key), read_only=True)), mode="r")
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise DamagedError(f"{self._where}: missing or damaged ({type(error).__name__})") from None

    @property
    def attrs(self) -> dict[str, Any]:
        return dict(self._group.attrs)

    def __contains__(self, name: str) -> bool:
        return name in self._group

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._array(name).shape)

    def read(self, name: str, where: Any = ...) -> np.ndarray:
        """An array or a part of it.

        Raises:
            DamagedError: it is missing or a chunk's checksum is wrong.
        """
        try:
            return np.asarray(self._array(name)[where])
        except DamagedError:
            raise
        except Exception as error:
            raise DamagedError(f"{self._where}/{name}: cannot be read ({error})") from None

    def _array(self, name: str) -> zarr.Array:
        try:
            array = self._group[name]
        except KeyError:
            raise DamagedError(f"{self._where}/{name}: missing") from None
        assert isinstance(array, zarr.Array)
        return array


def _ledger_key(stage: str, unit: str) -> str:
    return f"ledger/{stage}/{urllib.parse.quote(unit, safe='')}.json"


def _write_array(group: zarr.Group, name: str, array: np.ndarray) -> None:
    rows = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes)) if array.ndim else 1
    chunks = (max(1, min(rows, array.shape[0])), *(max(1, size) for size in array.shape[1:])) if array.ndim else ()
    created = group.create_array(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunks or "auto",
        compressors=[Crc32cCodec()],
        # Zarr reads a lost chunk as its fill value: one that no array holds gives the loss away.
        fill_value=np.nan if array.dtype.kind == "f" else -1 if array.dtype.kind == "i" else None,
        config={"write_empty_chunks": True},
    )
    if array.size:
        created[...] = array
