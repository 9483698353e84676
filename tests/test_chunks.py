"""Chunks that are written and read straight from memory: those that Zarr would write, and what Zarr would read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from raylux.store import RunFolder, arrays
from raylux.store.folder import DamagedError
from tests.test_store import ARRAYS, folder

__all__ = ["folder"]  # the fixture

CHUNK = 64  # bytes
NEVER = 1 << 40


def _written(folder: RunFolder, name: str, monkeypatch: pytest.MonkeyPatch, small: int) -> str:
    """Arrays under ``name``; those of fewer bytes than ``small`` by Zarr."""
    monkeypatch.setattr(arrays, "_CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(arrays, "_SMALL", small)
    return folder.write(name, ARRAYS)[0]


def _memory(given: list[np.ndarray]) -> Callable[[int], np.ndarray]:
    def memory(size: int) -> np.ndarray:
        given.append(np.zeros(size + 8, np.uint8)[:size])
        return given[-1]

    return memory


def test_the_objects_are_those_that_zarr_writes(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {small: _written(folder, f"factors/x{small}", monkeypatch, small) for small in (0, NEVER)}
    found = [
        {key.removeprefix(f"{prefix}/"): folder.files.get(key) for key, _ in folder.files.walk(prefix)}
        for prefix in keys.values()
    ]
    index = "zarr.json"  # its seal names the group
    assert found[0].keys() == found[1].keys() and len(found[0]) > 12
    assert {key: data for key, data in found[0].items() if key != index} == {
        key: data for key, data in found[1].items() if key != index
    }


@pytest.mark.parametrize("small", [0, NEVER])
def test_a_whole_array_is_read_into_memory_that_is_given(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    group = folder.group(_written(folder, "factors/x", monkeypatch, small))
    for name, array in ARRAYS.items():
        given: list[np.ndarray] = []
        found = group.read_into(name, _memory(given))
        assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes(), name
        assert not array.size or np.shares_memory(found, given[0])


def test_zarr_alone_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    key = _written(folder, "factors/x", monkeypatch, 0)
    group: Any = zarr.open_group(folder.files.where(key), mode="r")
    assert all(
        np.array_equal(group[name][...], array, equal_nan=array.dtype.kind == "f") for name, array in ARRAYS.items()
    )


def test_chunks_of_older_runs_are_read_by_zarr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have a checksum of Zarr's own behind them."""
    create = zarr.create_array
    older = {"compressors": [zarr.codecs.Crc32cCodec()]}
    monkeypatch.setattr(arrays.zarr, "create_array", lambda *args, **options: create(*args, **(options | older)))
    folder = RunFolder(str(tmp_path / "run"))
    group = folder.group(_written(folder, "factors/x", monkeypatch, NEVER))
    given: list[np.ndarray] = []
    assert np.array_equal(group.read_into("matrix", _memory(given)), ARRAYS["matrix"]) and not given


def test_damage_is_found_as_an_array_is_read_into_memory(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    key = _written(folder, "factors/x", monkeypatch, 0)
    chunk = f"{key}/matrix/c.1.0"
    whole = folder.files.get(chunk)
    for data, what in ((b"?" + whole[1:], "checksum differs"), (whole[:-1], f"{len(whole) - 1} bytes instead of")):
        folder.files.put(chunk, data)
        with pytest.raises(DamagedError, match=rf"{chunk}: {what}"):
            folder.group(key).read_into("matrix", _memory([]))
    folder.files.delete(chunk)
    with pytest.raises(DamagedError, match=rf"{chunk}: missing"):
        folder.group(key).read_into("matrix", _memory([]))
