"""A run that is killed in every stage: the short form of jobs/chaos.py, and what its judge is worth."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jobs.chaos import chaos, page
from jobs.faults.inputs import SHORT
from jobs.faults.killer import KINDS
from jobs.faults.progress import STAGES
from jobs.faults.verdict import count, differing, problems
from raylux.ledger import COVARIANCE, QUERY, SCORE
from raylux.store import RunFolder
from tests.small import make_inputs


@pytest.mark.cluster
@pytest.mark.timeout(900)  # killed eight times, each time with a start of Ray or of workers
def test_killed_in_every_stage_a_run_ends_with_the_bits_of_one_left_alone(tmp_path: Path) -> None:
    outcome = chaos(seed=0, kills=8, work=SHORT, base=tmp_path)
    assert (outcome.differing, outcome.problems, outcome.wasteful) == ([], [], [])
    assert outcome.arrays > 300
    assert len(outcome.kills) == 8
    assert {kill.stage for kill in outcome.kills} == set(STAGES)
    assert {kill.kind for kill in outcome.kills} == set(KINDS)
    drivers = sum(kill.kind == "driver" for kill in outcome.kills)
    assert outcome.starts == 1 + drivers
    assert all(outcome.computed[stage] >= outcome.needed[stage] > 0 for stage in STAGES)
    assert f"| all |{''.join(f' {sum(k.kind == kind for k in outcome.kills)} |' for kind in KINDS)} 8 |" in page(
        outcome, SHORT, "command"
    )


# The judge


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("finished")
    make_inputs(base / "inputs").run(base / "run")
    return base / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def again(run: Path, stage: str, name: str | None = None, **meta: object) -> None:
    """Commit a stage's first unit once more, with other facts or under another name."""
    folder = RunFolder(str(run))
    unit, manifest = next(iter(folder.units(stage).items()))
    folder.commit(stage, name or unit, manifest.objects, **{**manifest.meta, **meta})


def test_a_run_left_alone_has_no_problems_and_equals_itself(run: Path, finished: Path) -> None:
    assert problems(run) == []
    assert count(run) > 50
    assert differing(run, finished) == []


def test_a_score_block_that_stands_twice_or_not_at_all_is_found(run: Path) -> None:
    again(run, SCORE, "again")
    assert any("stand in several blocks" in line and " 0 pairs are missing" in line for line in problems(run))
    folder = RunFolder(str(run))
    folder.forget(SCORE, "again")
    folder.forget(SCORE, next(iter(folder.units(SCORE))))
    assert any("pairs are missing" in line and ", 0 stand" in line for line in problems(run))


def test_sums_that_count_a_unit_twice_are_found(run: Path) -> None:
    meta = next(iter(RunFolder(str(run)).units(COVARIANCE).values())).meta
    again(run, COVARIANCE, rows=meta["rows"] + 1)
    assert any("tokens instead of" in line for line in problems(run))
    again(run, COVARIANCE, rows=meta["rows"], sequences=meta["sequences"] - 1)
    assert any("sequences instead of" in line for line in problems(run))


def test_a_query_in_two_blocks_is_found(run: Path) -> None:
    again(run, QUERY, "again")
    assert any(line.startswith("query:") and "in 2 blocks" in line for line in problems(run))


def test_a_quarantined_unit_and_a_snapshot_left_behind_are_found(run: Path) -> None:
    folder = RunFolder(str(run))
    folder.commit("quarantine", "fit.covariance f000001", stage="fit.covariance", unit="f000001")
    folder.commit("fit.snapshot", "fit.covariance", cursor=3)
    assert [line.partition(",")[0].partition(" of")[0] for line in problems(run)] == ["quarantined", "snapshots"]


def test_one_flipped_bit_and_one_missing_object_are_found(run: Path, finished: Path) -> None:
    folder = RunFolder(str(run))
    unit, manifest = next(iter(folder.units(COVARIANCE).items()))
    matrix = folder.group(manifest.meta["key"]).read("matrix")
    matrix.view("uint32")[0, 0] ^= 1
    key, objects = folder.write("factors/changed", {"matrix": matrix})
    folder.commit(COVARIANCE, unit, objects, key=key, **{k: v for k, v in manifest.meta.items() if k != "key"})
    assert differing(run, finished) == [f"{COVARIANCE} {unit}  matrix"]
    (run / next(iter(objects))).unlink()
    assert any("missing" in line for line in problems(run))
