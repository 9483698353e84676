"""A run from end to end in process: what it computes again, how it goes on, which stages it has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import raylux
from raylux.cli import main
from raylux.engine.shard import FactorShard
from raylux.engine.worker import GradientWorker
from raylux.errors import MissingStageError
from raylux.ledger import COVARIANCE, EIGEN, MOMENTS, QUERY, SCORE, TOKENS
from raylux.store import RunFolder
from tests.interrupts import Interrupt
from tests.run.conftest import IDF
from tests.small import CUT, Inputs, contents, differing, objects

LEDGER = (COVARIANCE, EIGEN, MOMENTS, "prefilter", QUERY, SCORE, TOKENS)


def _ledger(folder: str) -> dict[str, int]:
    return {stage: len(RunFolder(folder).committed(stage)) for stage in LEDGER}


# ------------------------------------------------------------------------------- only what is missing


def test_a_second_run_computes_nothing(inputs: Inputs, filtered: raylux.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = objects(Path(filtered.folder))
    monkeypatch.setattr(RunFolder, "commit", _refuse)
    monkeypatch.setattr(RunFolder, "write", _refuse)
    monkeypatch.setattr("raylux.models.load_model", _refuse)
    inputs.run(filtered.folder, "query.max_error=0", *IDF)
    assert objects(Path(filtered.folder)) == before


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("there is nothing to compute")


def test_a_query_more_adds_its_own_blocks(inputs: Inputs, tmp_path: Path) -> None:
    inputs.ask("a", "b", "c")
    inputs.run(tmp_path / "run")
    before, units = objects(tmp_path / "run"), _ledger(str(tmp_path / "run"))
    inputs.ask()
    inputs.run(tmp_path / "run")
    after, more = objects(tmp_path / "run"), _ledger(str(tmp_path / "run"))
    assert {name: after[name] for name in before} == before  # nothing was touched
    assert {stage: more[stage] - units[stage] for stage in LEDGER} == {
        **dict.fromkeys(LEDGER, 0),
        QUERY: 1,
        SCORE: units[SCORE],
        TOKENS: 1,
    }
    blocks = [manifest.meta["queries"] for manifest in RunFolder(str(tmp_path / "run")).units(SCORE).values()]
    assert sorted(map(tuple, blocks)) == sorted([("a", "b", "c")] * units[SCORE] + [("d",)] * units[SCORE])
    tops = {name.split("/")[0] for name in set(after) - set(before)}
    assert tops == {"ledger", "queries", "scores"}


def test_a_larger_prefilter_scores_only_what_is_new(inputs: Inputs, tmp_path: Path) -> None:
    few = inputs.run(tmp_path / "run", "prefilter.kind=idf", "prefilter.top=5")
    before, rows = objects(tmp_path / "run"), set(few.rows)
    more = inputs.run(tmp_path / "run", *IDF)
    assert {name: objects(tmp_path / "run")[name] for name in before} == before
    scored = [row for block in RunFolder(more.folder).units(SCORE).values() for row in block.meta["rows"]]
    assert len(scored) == len(set(scored)) and rows < set(scored) == set(more.rows)


def test_layers_asked_for_later_are_added(inputs: Inputs, tmp_path: Path) -> None:
    run = inputs.run(tmp_path / "run", "score.layers=false")
    total = run.scores().load()
    with pytest.raises(MissingStageError, match=r"raylux score CONFIG score\.layers=true"):
        run.layer_scores("a")
    run = inputs.run(tmp_path / "run")
    assert np.array_equal(run.scores().to_numpy(), total.to_numpy())
    assert run.layer_scores("a").shape == (2, 60)


def test_fewer_queries_keep_what_is_there(inputs: Inputs, usual: raylux.Run) -> None:
    before = objects(Path(usual.folder))
    inputs.ask("c")
    run = inputs.run(usual.folder, "query.max_error=0")
    assert objects(Path(usual.folder)) == before and run.queries == ["a", "b", "c", "d"]


# ----------------------------------------------------------------------------------------- interrupts


WORKER_CALLS = [
    ("covariance_unit", 3),
    ("moment_unit", 2),
    ("query_gradients", 2),
    ("score_unit", 3),
    ("token_unit", 2),
]
SHARD_CALLS = [("add", 2), ("decompose", 4), ("solve", 1)]


@pytest.fixture(scope="module")
def undisturbed(filtered: raylux.Run) -> dict[str, np.ndarray]:
    return contents(filtered.folder)


def _goes_on(
    inputs: Inputs, folder: Path, undisturbed: dict[str, np.ndarray], interrupts: Callable[[pytest.MonkeyPatch], Any]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupts(patch)
        with pytest.raises(KeyboardInterrupt):
            inputs.run(folder, "query.max_error=0", *IDF)
    inputs.run(folder, "query.max_error=0", *IDF)
    assert differing(contents(folder), undisturbed) == []


@pytest.mark.parametrize(
    ("owner", "method", "call"),
    [(GradientWorker, *where) for where in WORKER_CALLS] + [(FactorShard, *where) for where in SHARD_CALLS],
)
def test_interrupted_work_goes_on(
    inputs: Inputs, undisturbed: dict[str, np.ndarray], tmp_path: Path, owner: type, method: str, call: int
) -> None:
    _goes_on(inputs, tmp_path / "run", undisturbed, lambda patch: Interrupt(patch, owner, method, call, False))


# How many commits each stage makes here; the ends of a stage are where its order could matter.
COMMITS = {"corpus": 1, "queries": 1, "fit.labels": 1, COVARIANCE: 4, EIGEN: 4, MOMENTS: 2, "prefilter": 1, QUERY: 1}


@pytest.mark.parametrize("stage", [*COMMITS, SCORE, TOKENS])
def test_interrupted_commits_go_on(
    inputs: Inputs, undisturbed: dict[str, np.ndarray], tmp_path: Path, stage: str
) -> None:
    """Before the first and right after the last commit of each stage, and in the middle of it."""

    def run(patch: pytest.MonkeyPatch, call: int, after: bool) -> None:
        left, usual = [call], RunFolder.commit

        def commit(folder: RunFolder, name: str, unit: str, *args: Any, **meta: Any) -> Any:
            left[0] -= name == stage
            if not after and left[0] == 0 and name == stage:
                raise KeyboardInterrupt
            result = usual(folder, name, unit, *args, **meta)
            if left[0] == 0 and name == stage:
                raise KeyboardInterrupt
            return result

        patch.setattr(RunFolder, "commit", commit)

    count = COMMITS.get(stage, 3)
    # One folder through all: each time it gets a little further, as with an impatient user.
    for call, after in ((1, False), (count // 2, True), (1 if stage in (SCORE, TOKENS) else count, True)):
        with pytest.MonkeyPatch.context() as patch:
            run(patch, max(1, call), after)
            try:
                inputs.run(tmp_path / "run", "query.max_error=0", *IDF)
            except KeyboardInterrupt:
                continue
    inputs.run(tmp_path / "run", "query.max_error=0", *IDF)
    assert differing(contents(tmp_path / "run"), undisturbed) == []


def test_interrupted_first_write_goes_on(inputs: Inputs, undisturbed: dict[str, np.ndarray], tmp_path: Path) -> None:
    def interrupts(patch: pytest.MonkeyPatch) -> None:
        def fsync(_: int) -> None:
            raise KeyboardInterrupt

        patch.setattr(os, "fsync", fsync)

    _goes_on(inputs, tmp_path / "run", undisturbed, interrupts)


def test_ctrl_c_in_a_terminal(inputs: Inputs, filtered: raylux.Run, tmp_path: Path) -> None:
    """The real command: SIGINT while it fits, exit code 130; the same command again ends well, with the same bits."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(inputs.sections(tmp_path / "run")), encoding="utf-8")
    words = ["run", str(config), "query.max_error=0", *CUT, *IDF]
    progress = tmp_path / "run" / "progress.jsonl"
    # Whatever started the tests may have SIGINT ignored, as shells do for what runs in the background.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "raylux.cli", *words], **pipes, preexec_fn=heard) as process:
        deadline = time.monotonic() + 120
        while not (progress.exists() and "covariance" in progress.read_text(encoding="utf-8")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said and "run the same command again" in said
    assert not (tmp_path / "run" / "report").exists()
    assert main(words) == 0
    assert differing(contents(tmp_path / "run"), contents(filtered.folder)) == []
    assert (tmp_path / "run" / "report" / "index.html").stat().st_size > 1000


def test_a_folder_at_a_url_holds_the_same_run(inputs: Inputs, filtered: raylux.Run, tmp_path: Path) -> None:
    for folder in (f"memory://{tmp_path.name}/run", f"file://{tmp_path}/run"):
        run = inputs.run(folder, "query.max_error=0", *IDF)
        assert differing(contents(folder), contents(filtered.folder)) == []
        assert run.top("a", 3).equals(filtered.top("a", 3))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ------------------------------------------------------------------------------------ status and stages


def test_stages_one_by_one_and_what_is_missing(inputs: Inputs, filtered: raylux.Run, tmp_path: Path) -> None:
    config = inputs.config(tmp_path / "run", "query.max_error=0", *IDF)
    done = []
    for stages in (("corpus", "fit"), ("prefilter",), ("query",), ("score",), ("report",)):
        run = raylux.api.run_stages(config, stages, "here.yaml", quiet=True)
        done += stages
        status = {stage.name: stage for stage in run.status()}
        assert [name for name in status if status[name].done] == done
        assert all(status[name].command == f"raylux {'fit' if name == 'corpus' else name} here.yaml" for name in status)
    assert differing(contents(tmp_path / "run"), contents(filtered.folder)) == []


@pytest.mark.parametrize("prefilter", [(), IDF], ids=["all", "idf"])
def test_status_of_scores_that_are_not_complete(inputs: Inputs, tmp_path: Path, prefilter: tuple[str, ...]) -> None:
    def scored() -> bool:
        return next(stage.done for stage in raylux.open_run(tmp_path / "run").status() if stage.name == "score")

    with pytest.MonkeyPatch.context() as patch:
        Interrupt(patch, GradientWorker, "score_unit", 3, False)
        with pytest.raises(KeyboardInterrupt):
            inputs.run(tmp_path / "run", *prefilter)
    assert not scored()
    inputs.run(tmp_path / "run", *prefilter)
    assert scored()
    inputs.ask("b")  # a shorter query file takes nothing away
    inputs.run(tmp_path / "run", *prefilter)
    assert scored()
