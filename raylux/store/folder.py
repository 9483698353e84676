"""The run folder: run.yaml, the ledger of committed units, and groups of arrays."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from raylux.errors import UserError
from raylux.profiling import of
from raylux.store import upkeep
from raylux.store.arrays import Group, write_group
from raylux.store.damage import UNSEALED, DamagedError, broken_seal, damaged, read_whole, seal, seal_json
from raylux.store.files import Files, Objects, fresh, in_turn

FORMAT_VERSION = 2
_SETTINGS = "run.yaml"
# Of libyaml, where PyYAML was built with it: eight times as quick, which tells of a file that names every tensor.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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
    objects: Objects
    meta: dict[str, Any]


class RunFolder:
    """A run folder at a local path or an fsspec URL. Opening it creates nothing.

    Attributes:
        guard: called before anything that changes what the run is; raises where this process may not
            (``Lease.check``).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.files = Files(path)
        self.guard: Callable[[], object] | None = None

    def _guarded(self) -> None:
        if self.guard is not None:
            self.guard()

    # run.yaml

    @property
    def exists(self) -> bool:
        self.files.greet()
        return self.files.exists(_SETTINGS)

    def settings(self) -> dict[str, Any]:
        """What run.yaml says.

        Raises:
            UserError: there is no run here, or one of another format.
            DamagedError: it is not what was written.
        """
        self.files.greet()
        try:
            raw = self.files.get(_SETTINGS)
        except FileNotFoundError:
            raise UserError(f"{self.path}: not a run folder (no run.yaml in it)") from None
        problem = broken_seal(_SETTINGS, raw)
        if problem:
            found = _format_of_unsealed(raw)
            if found is not None:
                raise UserError(f"{self.path}: run folder of format {found}, this version reads {FORMAT_VERSION}")
            raise DamagedError(
                f"{self.path}/{_SETTINGS}: {problem}: it was changed after raylux wrote it; "
                "put back a copy of it, or choose a new run.folder"
            )
        data: dict[str, Any] = yaml.load(raw, Loader=_LOADER)
        if data["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{self.path}: run folder of format {data['format_version']}, this version reads {FORMAT_VERSION}"
            )
        del data["checksum"]
        return data

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Replace run.yaml. Raises UserError where the folder holds something else than a run."""
        if not self.exists and not self.files.empty():
            raise UserError(f"{self.path}: the folder is not empty and holds no run; choose another run.folder")
        self._guarded()
        data = {"checksum": UNSEALED, "format_version": FORMAT_VERSION, **settings}
        self.files.put(_SETTINGS, seal(_SETTINGS, yaml.safe_dump(data, sort_keys=False, allow_unicode=True)))

    # the ledger

    def commit(self, stage: str, unit: str, objects: Objects | None = None, /, **meta: Any) -> Manifest:
        """Write the manifest that makes ``objects`` (as ``write`` returned them) part of the run.

        A manifest of the same stage and unit is replaced in one step; ``delete`` then removes what only the
        former one named.
        """
        manifest = Manifest(stage, unit, dict(objects or {}), meta)
        data = {"objects": {key: list(value) for key, value in manifest.objects.items()}, "meta": meta}
        key = _ledger_key(stage, unit)
        sealed = seal_json(key, data)
        self._guarded()
        with of("commit"):
            self.files.put(key, sealed)
        return manifest

    def units(self, stage: str) -> dict[str, Manifest]:
        """All committed units of a stage by name, in the names' order."""
        units = self._units(stage)
        found = in_turn(lambda unit: self.manifest(stage, unit), units, self.files.remote)
        return dict(zip(units, found, strict=True))

    def committed(self, stage: str) -> set[str]:
        """The names of a stage's committed units."""
        return set(self._units(stage))

    def _units(self, stage: str) -> list[str]:
        names = self.files.names(f"ledger/{stage}", ".json")
        return [urllib.parse.unquote(name.removesuffix(".json")) for name in names]

    def manifest(self, stage: str, unit: str) -> Manifest:
        """One commit. Raises DamagedError where it is missing or is not what was written."""
        key = _ledger_key(stage, unit)
        try:
            raw = self.files.get(key)
        except FileNotFoundError:
            raise damaged(self.files, key, "missing") from None
        problem = broken_seal(key, raw)
        if problem:
            raise damaged(self.files, key, problem)
        data = json.loads(raw)
        objects = {name: (int(size), str(crc)) for name, (size, crc) in data["objects"].items()}
        return Manifest(stage, unit, objects, data["meta"])

    def unused(self, stage: str, prefix: str) -> str:
        """A name for the next unit of a stage whose units are numbered: one more than the highest."""
        numbers = [int(tail) for unit in self._units(stage) if (tail := unit.removeprefix(prefix)).isdigit()]
        return f"{prefix}{max(numbers, default=-1) + 1:05d}"

    def stages(self) -> list[str]:
        """The ledger's stages that may have units."""
        return self.files.names("ledger")

    def forget(self, stage: str, unit: str) -> None:
        """Remove one entry of the ledger; its objects stay until ``delete`` or ``sweep``."""
        self._guarded()
        self.files.delete(_ledger_key(stage, unit))

    def drop(self, stages: Sequence[str]) -> None:
        """Remove every entry of these ledger stages, one stage after the other.

        Name the stages that read others first: a kill in between then leaves no unit whose inputs are gone.
        """
        for stage in stages:
            for unit in self._units(stage):
                self.forget(stage, unit)

    # objects

    def write(
        self, prefix: str, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any] | None = None
    ) -> tuple[str, Objects]:
        """Write a group of arrays under a fresh key.

        Returns:
            The key, and the objects written with size and checksum, for ``commit``.
        """
        key = fresh(prefix)
        with of("write"):
            return key, write_group(self.files, key, arrays, attrs or {})

    def put(self, prefix: str, suffix: str, data: bytes) -> tuple[str, Objects]:
        """Write one plain object under a fresh key; returns as ``write`` does."""
        key = fresh(prefix) + suffix
        with self.files.batch() as batch:
            batch.put(key, data)
        return key, batch.objects

    def group(self, key: str, keep: bool = False) -> Group:
        """A written group (``keep``: see ``Group``). Raises DamagedError where it is missing or not as written."""
        with of("read"):
            return Group(self.files, key, keep)

    def read(self, manifest: Manifest, key: str) -> bytes:
        """A plain object that a manifest names, checked against it. Raises DamagedError."""
        if key not in manifest.objects:
            raise damaged(self.files, key, "not among the objects of its manifest")
        return read_whole(self.files, key, *manifest.objects[key])

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects that no manifest names any more, as those of a manifest that was replaced or forgotten."""
        self._guarded()
        self.files.clear(keys)

    # upkeep

    def verify(self, manifest: Manifest, checksums: bool = True) -> list[str]:
        """What is wrong with the objects of a manifest, one line each; empty if all is well."""
        sizes = dict(zip(manifest.objects, in_turn(self.files.size, manifest.objects, self.files.remote), strict=True))
        found = (
            upkeep.problem(self.files, key, facts, sizes[key], checksums) for key, facts in manifest.objects.items()
        )
        return [line for line in found if line]

    def check(self, checksums: bool = False) -> list[str]:
        """What is wrong with the run, one line each with what to do: run.yaml, every manifest, every object.

        Args:
            checksums: read every object, not only its size.
        """
        return upkeep.check(self, checksums)

    def sweep(self) -> tuple[int, int]:
        """Remove what no manifest names: leftovers of killed processes and former snapshots.

        For a driver that holds the lease (``guard`` is set) while no worker of its own is writing.

        Returns:
            Objects removed, and their bytes.

        Raises:
            DamagedError: a manifest cannot be read, so what it names is not known.
        """
        if self.guard is None:
            raise RuntimeError("sweep without a lease: another driver may be writing")
        self._guarded()
        return upkeep.sweep(self)


def _ledger_key(stage: str, unit: str) -> str:
    return f"ledger/{stage}/{urllib.parse.quote(unit, safe='')}.json"


def _format_of_unsealed(raw: bytes) -> object:
    """The format of a run.yaml that has no checksum and says that it is of another version; else None."""
    try:
        data = yaml.safe_load(raw)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError):
        return None
    if not isinstance(data, dict) or "checksum" in data or "config" not in data:
        return None
    found = data.get("format_version")
    return found if isinstance(found, int) and found != FORMAT_VERSION else None
