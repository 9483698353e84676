"""The run folder: what was committed comes back or is missed aloud; nothing is ever written over."""

from __future__ import annotations

import itertools
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from raylux.batches import IGNORED
from raylux.errors import UserError
from raylux.store import CorpusReader, RunFolder, read_table, score_blocks, write_corpus
from raylux.store.folder import DamagedError, Group
from raylux.store.lazy import lazy_scores

ARRAYS = {
    "matrix": np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32),
    "wide": np.array([[np.nan, np.inf], [-0.0, 1e-300]]),
    "rows": np.array([-1, 0, 2**40]),
    "small": np.array([-100, 3], np.int32),
    "flags": np.array([True, False, True]),
    "nothing": np.zeros((0, 4), np.float32),
}


@pytest.fixture(params=["local", "file://", "memory://"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    """A run folder of each kind of place; not made yet."""
    if request.param == "memory://":
        return RunFolder(f"memory://{uuid.uuid4().hex}/run")
    return RunFolder(f"{'' if request.param == 'local' else 'file://'}{tmp_path / 'run'}")


@pytest.fixture
def local(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def _commit(folder: RunFolder, arrays: dict[str, np.ndarray] = ARRAYS, **meta: Any) -> str:
    key, objects = folder.write("factors/layer", arrays)
    folder.commit("stage", "unit", objects, key=key, **meta)
    return key


def _object(folder: RunFolder, key: str) -> Path:
    return Path(folder.files.where(key))


# ------------------------------------------------------------------------------------- round trips


def test_what_is_committed_is_read_back_bit_by_bit(folder: RunFolder) -> None:
    key = _commit(folder, note="ü")
    manifest = RunFolder(folder.path).manifest("stage", "unit")
    assert manifest.meta == {"key": key, "note": "ü"}
    assert folder.verify(manifest) == []
    group = RunFolder(folder.path).group(manifest.meta["key"])
    for name, array in ARRAYS.items():
        found = group.read(name)
        assert found.dtype == array.dtype and found.tobytes() == array.tobytes(), name
        assert group.shape(name) == array.shape
        assert name in group
    assert "other" not in group


def test_parts_of_an_array(folder: RunFolder) -> None:
    group = folder.group(_commit(folder))
    assert np.array_equal(group.read("matrix", 3), ARRAYS["matrix"][3])
    assert np.array_equal(group.read("matrix", (slice(1, 4), 2)), ARRAYS["matrix"][1:4, 2])


def test_arrays_larger_than_a_chunk(local: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylux.store.arrays._CHUNK_BYTES", 64)
    key = _commit(local)
    assert len(list(_object(local, f"{key}/matrix").glob("c.*"))) == 3  # 7 rows of 20 bytes, 3 to a chunk
    assert np.array_equal(local.group(key).read("matrix"), ARRAYS["matrix"])


def test_chunks_are_as_equal_as_can_be(local: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zarr writes the last chunk as large as the others: 16 rows of which 15 fit would be written twice."""
    monkeypatch.setattr("raylux.store.arrays._CHUNK_BYTES", 15 * 8)
    key = local.write("any", {"matrix": np.arange(16.0)})[0]
    assert [path.stat().st_size for path in _object(local, f"{key}/matrix").glob("c.*")] == [64, 64]
    assert np.array_equal(local.group(key).read("matrix"), np.arange(16.0))


def test_the_ledger_keeps_any_name_of_a_unit(folder: RunFolder) -> None:
    names = ["A:model.layers.0.mlp", "Ω/../x", "a b", "%2F", "."]
    for name in names:
        folder.commit("stage", name, said=name)
    assert folder.committed("stage") == set(names)
    assert {unit: manifest.meta["said"] for unit, manifest in folder.units("stage").items()} == {n: n for n in names}
    assert folder.committed("other") == set() and folder.units("other") == {}


def test_keys_are_never_used_twice(folder: RunFolder) -> None:
    keys = {_commit(folder) for _ in range(5)}
    assert len(keys) == 5
    assert folder.put("report/x", ".txt", b"1")[0] != folder.put("report/x", ".txt", b"2")[0]
    for key in keys:  # the older ones are untouched by those that came after
        assert np.array_equal(folder.group(key).read("matrix"), ARRAYS["matrix"])


def test_uncommitted_objects_are_not_part_of_the_run(folder: RunFolder) -> None:
    folder.write("scores/u0", {"total": np.ones((1, 1))})
    assert score_blocks(folder) == [] and folder.committed("score") == set()


# ------------------------------------------------------------------------------------------ damage


def _chunks(folder: RunFolder, key: str) -> list[str]:
    return [name for name, _ in folder.files.walk(key) if "/c" in name]


def test_every_flipped_byte_of_a_chunk_is_found_on_read(local: RunFolder) -> None:
    key = _commit(local, {"matrix": ARRAYS["matrix"]})
    (chunk,) = _chunks(local, key)
    whole = _object(local, chunk).read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        _object(local, chunk).write_bytes(damaged)
        with pytest.raises(DamagedError, match=f"{key}/matrix"):
            local.group(key).read("matrix")
    assert local.verify(local.manifest("stage", "unit")) == [f"{chunk}: checksum differs"]
    assert local.verify(local.manifest("stage", "unit"), checksums=False) == []
    _object(local, chunk).write_bytes(whole)
    assert local.verify(local.manifest("stage", "unit")) == []


def test_a_cut_chunk_is_found_on_read(local: RunFolder) -> None:
    key = _commit(local)
    chunk = f"{key}/rows/c.0"
    whole = _object(local, chunk).read_bytes()
    _object(local, chunk).write_bytes(whole[:-3])
    with pytest.raises(DamagedError, match=f"{key}/rows"):
        local.group(key).read("rows")
    assert local.verify(local.manifest("stage", "unit"), checksums=False) == [
        f"{chunk}: {len(whole) - 3} bytes instead of {len(whole)}"
    ]


@pytest.mark.parametrize("name", [name for name, array in ARRAYS.items() if array.size])
def test_a_lost_chunk_is_an_error_and_not_fill_values(folder: RunFolder, name: str) -> None:
    key = _commit(folder)
    (chunk,) = _chunks(folder, f"{key}/{name}")
    folder.files.delete(chunk)
    assert folder.verify(folder.manifest("stage", "unit")) == [f"{chunk}: missing"]
    for where in (..., 0, slice(0, 1)):
        with pytest.raises(DamagedError, match=rf"{chunk}: missing"):
            folder.group(key).read(name, where)


def test_lost_arrays_and_groups(folder: RunFolder) -> None:
    key = _commit(folder)
    with pytest.raises(DamagedError, match=f"{key}/other: missing"):
        folder.group(key).read("other")
    with pytest.raises(DamagedError, match="factors/gone"):
        folder.group("factors/gone.123")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"meta": {}}', '{"objects": {"k": [1]}, "meta": {}}', "\xff"])
def test_a_damaged_manifest_is_an_error(local: RunFolder, text: str) -> None:
    _commit(local)
    path = _object(local, "ledger/stage/unit.json")
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedError, match=r"ledger/stage/unit\.json: damaged, its checksum is not there"):
        local.units("stage")
    path.unlink()
    assert local.committed("stage") == set()
    with pytest.raises(DamagedError, match=r"unit\.json: missing"):
        local.manifest("stage", "unit")


# ---------------------------------------------------------------------------------------- run.yaml


def test_settings(folder: RunFolder) -> None:
    assert not folder.exists and folder.files.empty()
    with pytest.raises(UserError, match="not a run folder"):
        folder.settings()
    folder.write_settings({"config": {"a": "ü"}})
    folder.write_settings({"config": {"a": "ö"}})
    assert RunFolder(folder.path).settings()["config"] == {"a": "ö"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "damaged"),
        ("- 1", "damaged"),
        ("format_version: 99\nconfig: {}", "format 99"),
        ("format_version: 99", "damaged"),
        ("\0", "damaged"),
        ("", "damaged"),
    ],
)
def test_settings_of_another_kind(local: RunFolder, text: str, says: str) -> None:
    local.files.put("run.yaml", text.encode())
    with pytest.raises(UserError, match=says):
        local.settings()


def test_a_folder_of_somebody_else_is_left_alone(local: RunFolder) -> None:
    local.files.put("thesis.tex", b"x")
    with pytest.raises(UserError, match="not empty and holds no run"):
        local.write_settings({})
    assert local.files.names("") == ["thesis.tex"]


def test_local_places_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that open the folder need not share a working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert RunFolder("runs/a/").files.place == f"{tmp_path}/runs/a"
    assert RunFolder("~/a").files.place == f"{tmp_path}/home/a"
    assert RunFolder("memory://x/a").files.place == "memory://x/a"


def test_a_put_is_seen_whole_or_not_at_all(local: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            local.write_settings({"a": 1})
    assert local.files.empty() and local.files.names("") == []
    # A killed process cannot tidy up: what it had not finished does not make the folder somebody else's.
    local.files.put("run.yaml.0123abcd.part", b"form")
    assert local.files.empty() and not local.exists
    local.write_settings({"a": 1})
    assert local.settings()["a"] == 1


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    folder = RunFolder(str(tmp_path / "file" / "run"))
    for write in (lambda: folder.files.put("run.yaml", b"x"), lambda: folder.write("x", {"a": np.zeros(1)})):
        with pytest.raises(UserError, match="cannot be written"):
            write()


# ------------------------------------------------------------------------------------------ corpus


@pytest.mark.parametrize("labelled", [False, True])
def test_corpus_rows(folder: RunFolder, labelled: bool) -> None:
    lengths = np.array([3, 1, 5, 2])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(11, dtype=np.int32) + 40
    labels = np.where(np.arange(11) % 2, tokens, IGNORED).astype(np.int32) if labelled else None
    keys = np.array([5, -6, 7, -8])
    table = pd.DataFrame({"sequence": list("abcd"), "document": list("aabb"), "text": ["é", "", "x\ny", "z"]})
    write_corpus(folder, tokens, offsets, labels, keys, table, dropped={"x": 1})
    reader = CorpusReader(folder)
    assert len(reader) == 4 and reader.lengths.tolist() == lengths.tolist()
    assert read_table(folder).equals(table)
    for asked in ([2], [3, 0], [1, 2, 3], []):
        rows = reader.rows(np.array(asked))
        for row, place in zip(rows, asked, strict=True):
            span = slice(offsets[place], offsets[place + 1])
            assert row.tokens.tolist() == tokens[span].tolist() and row.key == keys[place]
            wanted = (tokens if labels is None else labels)[span].copy()
            wanted[0] = IGNORED  # nothing comes before the first token to predict it from
            assert row.labels.tolist() == wanted.tolist()


# ------------------------------------------------------------------------------------------ scores

QUERIES, ROWS = ["q0", "q1", "q2"], np.array([2, 3, 5, 7, 11, 13])


@pytest.fixture
def scored(local: RunFolder) -> Iterator[tuple[xr.DataArray, np.ndarray, list[str]]]:
    """Scores of three queries in overlapping blocks, as an array and lazily; and the log of what is read."""
    whole = np.full((3, 6), np.nan)
    blocks = (([1, 0], [0, 2, 3]), ([2], [0, 1, 2]), ([0, 1], [5, 4]))
    for number, (queries, places) in enumerate(blocks):
        values = np.random.default_rng(number).standard_normal((len(queries), len(places)))
        whole[np.ix_(queries, places)] = values
        key, objects = local.write(f"scores/u{number}", {"total": values})
        names, rows = [QUERIES[place] for place in queries], ROWS[places].tolist()
        local.commit("score", f"u{number}", objects, key=key, queries=names, rows=rows, layers=False)
    log: list[str] = []
    names = [f"s{row}" for row in ROWS]
    array = lazy_scores(local, QUERIES, ROWS, names, 0.5, {"unit": "raw"}, dtype="float64")
    read = Group.read

    def counted(group: Group, name: str, where: Any = ...) -> np.ndarray:
        log.append(name)
        return read(group, name, where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "read", counted)
        yield array, 0.5 * whole, log


INDEXES = (
    0,
    -1,
    slice(None),
    slice(1, 3),
    slice(None, None, 2),
    slice(None, None, -1),
    slice(0, 0),
    np.array([2, 0]),
    np.array([], int),
    "mask",
)


def test_every_form_of_index(scored: Any) -> None:
    array, whole, _ = scored
    for forms in itertools.product(INDEXES, repeat=2):
        key = [
            np.arange(size) % 2 == 0 if isinstance(part, str) else part
            for part, size in zip(forms, whole.shape, strict=True)
        ]
        lists = [np.atleast_1d(np.arange(size)[part]) for part, size in zip(key, whole.shape, strict=True)]
        dropped = tuple(0 if isinstance(part, int) else slice(None) for part in key)
        wanted = whole[np.ix_(*lists)][dropped]
        found = array[key[0], key[1]]
        assert found.shape == wanted.shape, forms
        assert np.array_equal(found.to_numpy(), wanted, equal_nan=True), forms
        assert found.attrs == {"unit": "raw"}


def test_labels_and_points(scored: Any) -> None:
    array, whole, _ = scored
    assert array.sel(query="q1").sel(sequence="s11").item() == whole[1, 4]
    assert np.array_equal(array.sel(sequence=["s13", "s2"]).to_numpy(), whole[:, [5, 0]], equal_nan=True)
    places = xr.DataArray([0, 2, 0], dims="pair"), xr.DataArray([5, 1, 0], dims="pair")
    assert np.array_equal(array[places[0], places[1]].to_numpy(), whole[[0, 2, 0], [5, 1, 0]])
    repeated = array.isel(query=[1, 1], sequence=[0, 0, 5])
    assert np.array_equal(repeated.to_numpy(), whole[np.ix_([1, 1], [0, 0, 5])])


def test_only_the_blocks_that_are_looked_at_are_read(scored: Any) -> None:
    array, whole, log = scored
    part = array.isel(query=[0, 1])
    assert log == []  # nothing was looked at so far
    assert part.isel(query=0, sequence=5).item() == whole[0, 5] and len(log) == 1
    log.clear()
    assert np.isnan(array.sel(query="q2", sequence="s13").item()) and log == []  # no block holds the pair
    array.sel(query="q2").to_numpy()
    assert len(log) == 1
    log.clear()
    array.to_numpy()
    assert len(log) == 3


def test_cosine_divides_by_both_norms(local: RunFolder) -> None:
    key, objects = local.write("scores/u", {"total": np.array([[6.0, 8.0]]), "norms": np.array([2.0, 4.0])})
    local.commit("score", "u", objects, key=key, queries=["q"], rows=[0, 1], layers=False)
    array = lazy_scores(local, ["q"], np.array([0, 1]), ["a", "b"], 1.0, {}, {"q": 3.0}, "float64")
    assert array.to_numpy().tolist() == [[1.0, 8.0 / 12.0]]


def test_manifests_are_plain_json(local: RunFolder) -> None:
    """Nothing in a run folder is unpickled: a manifest is text that any reader can check."""
    key = _commit(local)
    data = json.loads(_object(local, "ledger/stage/unit.json").read_text(encoding="utf-8"))
    assert set(data) == {"checksum", "objects", "meta"} and data["meta"]["key"] == key
    sizes = {name: path.stat().st_size for name in data["objects"] if (path := _object(local, name)).is_file()}
    assert sizes == {name: size for name, (size, _) in data["objects"].items()}
