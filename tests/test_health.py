"""What became of a run: units that were given up, unlike machines, damaged objects."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import raylux
from raylux.cli import main
from raylux.engine.quarantine import Pairs, give_up
from raylux.engine.work import Failure
from raylux.health import Quarantined
from raylux.ledger import COVARIANCE, QUARANTINE, SCORE, TOKENS
from raylux.results import Run
from raylux.store import RunFolder, token_rows
from tests.small import Inputs, make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("health") / "inputs", "gpt2")


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("health") / "run"
    inputs.run(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of a finished run that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def _states(run: Run) -> dict[str, tuple[bool, str]]:
    return {stage.name: (stage.done, stage.detail) for stage in run.status()}


def _give_up(folder: Path, stage: str, sequences: list[str], unit: str = "u000002") -> None:
    RunFolder(str(folder)).commit(
        "quarantine", f"{stage} {unit}", stage=stage, unit=unit, sequences=sequences, deaths=3, reason="SIGKILL"
    )


def test_a_run_without_mishap_has_nothing_to_tell(whole: Path) -> None:
    run = raylux.open_run(whole)
    assert (run.quarantined, run.mixed_numerics(), run.problems()) == ([], {}, [])


def test_a_unit_that_was_given_up_is_missing_and_done_with(folder: Path) -> None:
    manifest = sorted((folder / "ledger" / SCORE).iterdir())[2]
    store = RunFolder(str(folder))
    (unit,) = [name for name in store.committed(SCORE) if name in manifest.name]
    ids = raylux.open_run(folder).sequences["sequence"]
    lost = [ids[row] for row in store.manifest(SCORE, unit).meta["rows"]]
    manifest.unlink()
    assert not _states(raylux.open_run(folder))["score"][0]
    _give_up(folder, SCORE, lost, unit)
    run = raylux.open_run(folder)
    assert run.quarantined == [Quarantined(SCORE, unit, tuple(lost), 3, "SIGKILL")]
    done, detail = _states(run)["score"]
    assert done and f"{len(lost)} quarantined" in detail
    assert not set(lost) & set(run.top("a", k=1000)["sequence"])
    assert len(run.top("a", k=1000)) == len(ids) - len(lost)


def test_what_was_given_up_is_not_tried_again_in_another_unit(inputs: Inputs, whole: Path, folder: Path) -> None:
    """The unit's name is of a cluster whose workers kept other sequences: its pairs are what counts."""
    store, rows = RunFolder(str(folder)), (3, 17)
    ids = [str(raylux.open_run(whole).sequences["sequence"][row]) for row in rows]
    store.drop([SCORE, TOKENS])
    for stage, query in ((SCORE, "a"), (TOKENS, "b")):
        give_up(store, stage, "of another cluster", ids, Failure(4, "SIGKILL"), Pairs((query,), rows))
    inputs.run(folder)
    assert len(store.committed(QUARANTINE)) == 2, "nothing was given up again"
    known, found = raylux.open_run(whole), raylux.open_run(folder)
    for query in known.queries:
        one, other = (run.top(query, k=1000).set_index("sequence")["influence"] for run in (known, found))
        assert set(one.index) - set(other.index) == (set(ids) if query == "a" else set())
        assert (one[other.index] == other).all()
    assert not set(rows) & set(token_rows(store, "b"))


def test_one_that_was_given_up_elsewhere_leaves_the_scores_missing(folder: Path) -> None:
    sorted((folder / "ledger" / SCORE).iterdir())[2].unlink()
    _give_up(folder, COVARIANCE, ["s0"])
    run = raylux.open_run(folder)
    assert not _states(run)["score"][0]
    assert len(run.quarantined) == 1


@pytest.mark.parametrize(
    ("tags", "mixed"),
    [
        ({"torch": "1", "device": "a", "threads": 1}, {}),
        ([{"torch": "1", "device": "a", "threads": 1}], {}),
        ([{"torch": "1", "device": "a", "threads": 1}, {"torch": "1", "device": "b", "threads": 1}], {"device": 2}),
        ({"torch": "2", "device": "a", "threads": 4}, {"torch": 2, "threads": 2}),
        (None, {}),
    ],
)
def test_unlike_machines_are_told_by_what_differs(
    tmp_path: Path, whole: Path, tags: Any, mixed: dict[str, int]
) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.write_settings(RunFolder(str(whole)).settings())
    folder.commit("fit.moments", "layer", numerics={"torch": "1", "device": "a", "threads": 1})
    folder.commit("query", "b0", numerics=tags)
    found = raylux.open_run(tmp_path / "run").mixed_numerics()
    assert {name: len(values) for name, values in found.items()} == mixed


def test_damage_is_listed_object_by_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factors = RunFolder(str(folder)).units(COVARIANCE).values()
    # The largest object of each: its numbers.
    flipped, lost, cut = [folder / max(one.objects, key=lambda key: one.objects[key][0]) for one in factors][:3]
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    problems = raylux.open_run(folder).problems()
    assert len(problems) == 3
    for path, said in ((flipped, "checksum differs"), (lost, "missing"), (cut, "bytes instead of")):
        assert [said in line for line in problems if str(path.relative_to(folder)) in line] == [True]
    assert len(raylux.open_run(folder).problems(checksums=False)) == 2
    assert main(["inspect", str(folder), "--verify"]) == 2
    assert capsys.readouterr().out.count("damaged: ") == 3


def test_a_manifest_that_cannot_be_read_is_damage_too(folder: Path) -> None:
    path = sorted((folder / "ledger" / SCORE).iterdir())[0]
    path.write_bytes(path.read_bytes()[:-3])
    (problem,) = raylux.open_run(folder).problems()
    assert path.name in problem
