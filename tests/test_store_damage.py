"""Any object of a real run damaged in any way: every reader gives the right numbers or says what is damaged."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import raylux
from raylux.errors import UserError
from raylux.ledger import COVARIANCE, EIGEN, LABELS, MOMENTS, QUERY
from raylux.store import CorpusReader, DamagedError, RunFolder
from tests.small import make_inputs

Reader = Callable[[Path], Any]
FRESH = re.compile(r"\.[0-9a-f]{12}$")  # the tail of a group's name
UNREAD = ("progress.jsonl", "report/")  # told to people, never read for a number


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("damage")
    make_inputs(base).run(base / "run", "prefilter.kind=tfidf", "prefilter.top=12", "score.unit_size=30")
    return base / "run"


def _groups(path: Path, stage: str, names: tuple[str, ...]) -> dict[str, Any]:
    store = RunFolder(str(path))
    found: dict[str, Any] = {}
    for unit, manifest in store.units(stage).items():
        keys = manifest.meta.get("layers") or {unit: manifest.meta["key"]}
        for name, key in keys.items():
            group = store.group(key)
            found |= {f"{unit} {name} {array}": group.read(array) for array in names if array in group}
    return found


def _corpus(path: Path) -> dict[str, Any]:
    reader = CorpusReader(RunFolder(str(path)))
    rows = reader.rows(np.arange(len(reader)))
    return {str(row.key): np.concatenate([row.tokens, row.labels]) for row in rows}


def _by_query(path: Path, look: Callable[[raylux.Run, str], Any]) -> dict[str, Any]:
    run = raylux.open_run(path)
    return {query: look(run, query) for query in run.queries}


def _layers(run: raylux.Run, query: str) -> dict[str, Any]:
    found = run.layer_scores(query)
    return {str(name): found.sel(sequence=name).to_numpy() for name in found["sequence"].to_numpy()}


def _tokens(run: raylux.Run, query: str) -> dict[str, Any]:
    return {name: run.token_scores(query, name).to_numpy().tolist() for name in run.top(query, 2)["sequence"]}


def _scores(run: raylux.Run, query: str) -> dict[str, Any]:
    table = run.top(query, 100)
    return {
        row.sequence: {"influence": row.influence, "text": row.text, "shelf": row.shelf}
        # NaN where no candidates are committed
        | ({} if np.isnan(row.prefilter) else {"prefilter": row.prefilter})
        for row in table.itertuples()
    }


READERS: dict[str, Reader] = {
    "status": lambda path: {line.name: line for line in raylux.open_run(path).status()},
    "top": lambda path: _by_query(path, _scores),
    "layers": lambda path: _by_query(path, _layers),
    "tokens": lambda path: _by_query(path, _tokens),
    "corpus": _corpus,
    "covariance": lambda path: _groups(path, COVARIANCE, ("matrix",)),
    "eigen": lambda path: _groups(path, EIGEN, ("values", "vectors")),
    "moments": lambda path: _groups(path, MOMENTS, ("matrix",)),
    "labels": lambda path: _groups(path, LABELS, ("labels",)),
    "s_test": lambda path: _groups(path, QUERY, ("rank", "place", "dense", "left", "right")),
}


def _same(found: Any, wanted: Any) -> bool:
    """Equal bits; of what is told by name some may be missing: units that are not committed."""
    if isinstance(wanted, dict):
        return set(found) <= set(wanted) and all(_same(value, wanted[name]) for name, value in found.items())
    if isinstance(wanted, np.ndarray):
        return found.dtype == wanted.dtype and bool(np.array_equal(found, wanted, equal_nan=wanted.dtype.kind == "f"))
    return repr(found) == repr(wanted)


@pytest.fixture(scope="module")
def right(healthy: Path) -> dict[str, Any]:
    return {name: read(healthy) for name, read in READERS.items()}


def _objects(folder: Path) -> list[str]:
    paths = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in paths if not path.startswith(UNREAD)]


def _kind(name: str) -> str:
    """What an object is, for counting: its folder or ledger stage, and its part in a group."""
    first, *rest = name.split("/")
    if first == "ledger":
        return f"manifest of {rest[0]}"
    if name.endswith("zarr.json"):
        return f"{first} {'group' if FRESH.search(rest[-2]) else 'array'} zarr.json"
    return f"{first} {'chunk' if rest and rest[-1].startswith('c.') else 'object'}"


def _damage(folder: Path, name: str, how: str, place: float, other: str) -> bool:
    """Damage an object; False if that leaves it as it was."""
    path = folder / name
    data = path.read_bytes()
    at = min(int(place * len(data)), len(data) - 1)
    if how == "flip":
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << int(place * 8000) % 8)]) + data[at + 1 :])
    elif how == "truncate":
        path.write_bytes(data[:at])
    elif how == "grow":
        path.write_bytes(data + data[at:])
    elif how == "zeros":
        path.write_bytes(bytes(len(data)))
    elif how == "delete":
        path.unlink()
    else:
        path.write_bytes((folder / other).read_bytes())
        (folder / other).write_bytes(data)
    return not path.exists() or path.read_bytes() != data


HOWS = ("flip", "truncate", "grow", "zeros", "delete", "swap")
SEEN: set[tuple[str, str]] = set()


def _look(folder: Path, right: dict[str, Any], name: str, lost: bool) -> int:
    """How many readers refused; every other gave the right numbers."""
    lines: list[str] = []
    damaged: list[bool] = []
    for reader, read in READERS.items():
        try:
            found = read(folder)
        except UserError as error:
            lines.append(str(error))
            damaged.append(isinstance(error, DamagedError))
        else:
            # A manifest that is gone is a unit that was never committed: less is told, and status says so.
            assert (lost and reader == "status") or _same(found, right[reader]), (name, reader)
    assert not any("\n" in line for line in lines)
    assert all("--restart" in line or "run.yaml" in line for line, is_so in zip(lines, damaged, strict=True) if is_so)
    return len(lines)


def _try(folder: Path, right: dict[str, Any], name: str, how: str, place: float, other: str) -> None:
    """Damage an object, look with every reader, and put it back."""
    before = {key: (folder / key).read_bytes() for key in (name, other)}
    try:
        if _damage(folder, name, how, place, other):
            _look_all(folder, right, name, how)
    finally:
        for key, data in before.items():
            (folder / key).write_bytes(data)


def _look_all(folder: Path, right: dict[str, Any], name: str, how: str) -> None:
    SEEN.add((_kind(name), how))
    lost = how == "delete" and name.startswith("ledger/")
    refused = _look(folder, right, name, lost)
    if name.startswith("lease/"):  # no number rests on it
        assert bool(refused) == (how == "swap")
    elif not lost:
        problems = RunFolder(str(folder)).check(checksums=True)
        assert any(name in line or name.partition("/")[2] in line for line in problems), (name, how, problems)
        assert refused


@pytest.mark.parametrize("how", HOWS)
def test_every_kind_of_object_damaged_in_every_way(healthy: Path, right: dict[str, Any], how: str) -> None:
    kinds: dict[str, list[str]] = {}
    for name in _objects(healthy):
        kinds.setdefault(_kind(name), []).append(name)
    for names in kinds.values():
        others = [*names[1:], *_objects(healthy)]
        other = next(name for name in others if _differ(healthy, names[0], name))
        _try(healthy, right, names[0], how, 0.4, other)
    assert len([kind for kind, way in SEEN if way == how]) >= len(kinds) >= 25


def _differ(folder: Path, one: str, other: str) -> bool:
    return (folder / one).read_bytes() != (folder / other).read_bytes()


def test_any_object_damaged_anywhere(healthy: Path, right: dict[str, Any]) -> None:
    names = _objects(healthy)

    @settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(names), st.sampled_from(HOWS), st.floats(0, 1, exclude_max=True), st.sampled_from(names))
    def damaged(name: str, how: str, place: float, other: str) -> None:
        _try(healthy, right, name, how, place, other)

    damaged()


def test_bytes_all_over_what_is_parsed(healthy: Path, tmp_path: Path) -> None:
    """run.yaml, a manifest and the head of a group: a flipped bit may still parse, and is found all the same."""
    folder = RunFolder(str(tmp_path / "copy"))
    shutil.copytree(healthy, folder.path)
    ((unit, manifest), *_) = folder.units(MOMENTS).items()
    reads: dict[str, Callable[[], object]] = {
        "run.yaml": folder.settings,
        f"ledger/{MOMENTS}/{unit}.json": lambda: folder.manifest(MOMENTS, unit),
        f"{manifest.meta['key']}/zarr.json": lambda: folder.group(manifest.meta["key"]),
        f"{manifest.meta['key']}/matrix/zarr.json": lambda: folder.group(manifest.meta["key"]).read("matrix"),
    }
    for name, read in reads.items():
        read()
        path = Path(folder.files.where(name))
        data = path.read_bytes()
        for at in range(0, len(data), 11):
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
            with pytest.raises(DamagedError, match=name.rpartition("/")[2]):
                read()
        path.write_bytes(data)
        read()


def test_a_whole_group_under_the_name_of_another_is_found(healthy: Path, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "copy"))
    shutil.copytree(healthy, folder.path)
    one, other = [Path(folder.files.where(unit.meta["key"])) for unit in folder.units(MOMENTS).values()][:2]
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    for manifest in list(folder.units(MOMENTS).values())[:2]:
        with pytest.raises(DamagedError, match="checksum differs; `raylux run CONFIG --restart fit`"):
            folder.group(manifest.meta["key"])


@pytest.mark.parametrize(
    ("key", "stage"),
    [
        ("corpus/tokens.1/zarr.json", "corpus"),
        ("factors/x/lambda.1/matrix/c.0.0", "fit"),
        ("candidates/block.1/zarr.json", "prefilter"),
        ("queries/x/b0.1/zarr.json", "query"),
        ("scores/tokens/u.1/zarr.json", "score"),
        ("snapshots/fit.covariance/x.1/zarr.json", "fit"),
        ("ledger/corpus/corpus.json", "corpus"),
        ("ledger/fit.snapshot/x.json", "fit"),
        ("ledger/prefilter/x.json", "prefilter"),
        ("ledger/queries/x.json", "query"),
        ("ledger/query/x.json", "query"),
        ("ledger/score/x.json", "score"),
        ("ledger/tokens/x.json", "score"),
        ("ledger/quarantine/x.json", "fit"),
    ],
)
def test_what_computes_a_damaged_object_again_is_named(tmp_path: Path, key: str, stage: str) -> None:
    folder = RunFolder(str(tmp_path))
    folder.files.put(key, b"{}")
    read = (
        (lambda: folder.units(key.split("/")[1]))
        if key.startswith("ledger")
        else (lambda: folder.read(folder.commit("stage", "unit", {key: (3, "0")}), key))
    )
    with pytest.raises(DamagedError, match=rf"{key}: .*; `raylux run CONFIG --restart {stage}` computes it"):
        read()
