"""Query files that keep arriving: each is answered once, with the bits of a run of its own."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import raylux
from jobs.faults.cluster import cluster
from raylux.api import run_stages
from raylux.batch import Options, Outcome, answer_files, driver
from raylux.cli import main
from raylux.engine import choices
from raylux.engine.context import Context
from raylux.engine.worker import GradientWorker
from raylux.errors import MissingStageError, UserError
from raylux.ledger import ANSWER, CANDIDATES, QUERY, SCORE, TAKEN, TOKENS
from raylux.report.profile import parsed
from raylux.results import Run
from raylux.store import CorpusReader, Lease, RunFolder
from tests.arriving import ASKED, NAMES, put
from tests.interrupts import Interrupt
from tests.small import Inputs, make_inputs, objects, texts, write_lines

IDF = ("prefilter.kind=idf", "prefilter.top=9")
HELD = (QUERY, SCORE, TOKENS, CANDIDATES)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("batch") / "inputs")


def fitted(inputs: Inputs, *overrides: str) -> Path:
    """A fitted run folder, made once for these overrides."""
    folder = inputs.base / f"fitted-{hashlib.sha1(repr(overrides).encode()).hexdigest()[:8]}"
    if not folder.exists():
        run_stages(inputs.config(folder, *overrides), ("corpus", "fit"), quiet=True)
    return folder


@pytest.fixture
def folder(inputs: Inputs, tmp_path: Path) -> Path:
    """A copy of the run fitted with a prefilter, whose queries differ in their candidates."""
    shutil.copytree(fitted(inputs, *IDF), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


def answer(folder: Path | str, inbox: Path | str, *overrides: str, **options: Any) -> tuple[Run, Outcome]:
    return answer_files(str(folder), str(inbox), overrides, Options(**options), quiet=True)


def facts(run: Run, prefix: str = "") -> dict[str, Any]:
    """Everything that a run says of its scored queries with a prefix, by the id without it."""
    found: dict[str, Any] = {}
    scores, scored = run.scores(), set(run.best()["query"])
    for query in run.queries:
        if query not in scored or not query.startswith(prefix):
            continue
        name = query.removeprefix(prefix)
        own = scores.sel(query=query).dropna("sequence").sortby("sequence")
        found[f"{name} sequences"] = own["sequence"].to_numpy()
        found[f"{name} total"] = own.to_numpy()
        layers = run.layer_scores(query)
        found[f"{name} layers"] = layers.dropna("sequence").sortby("sequence").to_numpy()
        top = run.top(query, 1000)
        found[f"{name} top"] = top
        found[f"{name} measured"] = run.measurements.loc[query].to_numpy()
        for sequence in top["sequence"][: run.config.score.token_top]:
            found[f"{name} tokens {sequence}"] = run.token_scores(query, sequence)["influence"].to_numpy()
    return found


def same(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names whose bits differ."""
    return [
        name
        for name in {**found, **wanted}
        if name not in found
        or name not in wanted
        or not (
            found[name].equals(wanted[name])
            if isinstance(found[name], pd.DataFrame)
            else found[name].tobytes() == wanted[name].tobytes()
            if found[name].dtype != object
            else list(found[name]) == list(wanted[name])
        )
    ]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return parsed((folder / "progress.jsonl").read_bytes())


class Own:
    """What a run of its own says of a query file's contents; it shares the fit, and nothing that rests on queries."""

    def __init__(self, inputs: Inputs, *overrides: str) -> None:
        self.inputs, self.overrides = inputs, overrides
        self.known: dict[bytes, dict[str, Any]] = {}

    def of(self, asked: Path) -> dict[str, Any]:
        key = asked.read_bytes()
        if key not in self.known:
            base = fitted(self.inputs, *self.overrides)
            folder = base.with_name(f"{base.name}-own-{len(self.known)}")
            shutil.copytree(base, folder)
            self.known[key] = facts(self.inputs.run(folder, f"queries.path={asked}", *self.overrides))
            shutil.rmtree(folder)
        return self.known[key]


@pytest.fixture(scope="module")
def own(inputs: Inputs) -> Own:
    return Own(inputs, *IDF)


# ----------------------------------------------------------------------------------------- equal bits


@pytest.mark.parametrize(
    "overrides",
    [
        ("query.basis=eigen", "engine.contraction_dtype=bfloat16"),
        (*IDF, "query.low_rank=always", "query.max_error=0.3"),
    ],
    ids=["eigenbases in bf16, all sequences", "low rank, candidates"],
)
def test_files_answered_together_have_the_bits_of_runs_of_their_own(
    inputs: Inputs, inbox: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    shutil.copytree(fitted(inputs, *overrides), tmp_path / "run")
    put(inbox, "tuesday.jsonl", "bc")
    # Long enough that it alone is rotated in another way than the short ones.
    long = {"id": "a", "prompt": " ".join(texts(40)[7].split()[:20] * 3), "completion": "anna bought"}
    write_lines(inbox / "monday.jsonl", [long])
    run, outcome = answer(tmp_path / "run", inbox)
    assert outcome.answered == ["monday.jsonl", "tuesday.jsonl"] and outcome.passes == 1 and not outcome.aside
    scored = [event for event in log_of(tmp_path / "run") if event["event"] == "unit" and event["task"] == "score"]
    assert sum(event["tokens"] for event in scored) == CorpusReader(run.store).lengths[run.rows].sum(), (
        "one pass for all"
    )
    wanted = Own(inputs, *overrides).of(inbox / "tuesday.jsonl")
    assert len(wanted) > 10
    assert same(facts(run, "tuesday.jsonl/"), wanted) == []


def test_a_file_has_the_plan_of_a_run_of_its_own(
    inputs: Inputs, folder: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many queries stand in larger tiles, which changes bits: such a file does not go with small ones."""
    monkeypatch.setattr(choices, "_TILES", (2, 4, 256))
    put(inbox, "many.jsonl", "abcd")
    put(inbox, "few.jsonl", "ab")
    run, outcome = answer(folder, inbox)
    assert outcome.passes == 2
    assert {found.unit: found.meta["plan"]["tile"] for found in run.answers} == {"many.jsonl": 4, "few.jsonl": 2}
    assert same(facts(run, "many.jsonl/"), Own(inputs, *IDF).of(inbox / "many.jsonl")) == []


# ------------------------------------------------------------------------------------------------ once


def _commits(patch: pytest.MonkeyPatch, stage: str) -> None:
    """Interrupts after the first commit of a stage."""
    usual = RunFolder.commit

    def commit(folder: RunFolder, name: str, unit: str, *args: Any, **meta: Any) -> Any:
        result = usual(folder, name, unit, *args, **meta)
        if name == stage:
            raise KeyboardInterrupt
        return result

    patch.setattr(RunFolder, "commit", commit)


STEPS = [
    *(partial(_commits, stage=stage) for stage in (QUERY, SCORE, ANSWER)),
    lambda patch: Interrupt(patch, GradientWorker, "token_unit", 2, after=False),
    lambda patch: Interrupt(patch, RunFolder, "forget", 3, after=True),
]


def test_interrupted_again_and_again_while_files_arrive(own: Own, folder: Path, inbox: Path) -> None:
    """Each file is answered once, with the bits of its own run, and nothing else stays."""
    given: dict[str, float] = {}
    names = iter(zip(NAMES, ASKED, strict=True))
    put(inbox, *next(names))
    for step in STEPS:
        put(inbox, *next(names))
        with pytest.MonkeyPatch.context() as patch:
            step(patch)
            with pytest.raises(KeyboardInterrupt):
                answer(folder, inbox)
        now = {found.unit: found.meta["time"] for found in raylux.open_run(folder).answers}
        assert {name: now[name] for name in given} == given
        given = now
    for name, ids in names:
        put(inbox, name, ids)
    run, outcome = answer(folder, inbox)
    assert sorted([*outcome.answered, *given]) == sorted(NAMES) and len(given) > 2
    assert_all_answered(run, own, inbox)


def assert_all_answered(run: Run, own: Own, inbox: Path) -> None:
    store = RunFolder(run.folder)
    assert not any(store.committed(stage) for stage in HELD)
    assert store.committed(ANSWER) == store.committed(TAKEN) == set(NAMES)
    assert {path.name for path in (Path(run.folder) / "answers").iterdir()} == {f"{name}.parquet" for name in NAMES}
    assert run.problems() == []
    with Lease.take(store.files) as lease:
        store.guard = lease.check
        assert store.sweep() == (0, 0)
    status = {stage.name: stage for stage in run.status()}
    assert status["batch"].done and "10 of 10 query files answered, 16 queries" in status["batch"].detail
    for name in NAMES:
        assert same(facts(run, f"{name}/"), own.of(inbox / name)) == [], name


@pytest.fixture(params=["in process", pytest.param("over a cluster", marks=pytest.mark.cluster)])
def place(request: pytest.FixtureRequest) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Where a batch computes: overrides, and the environment of its drivers."""
    if request.param == "in process":
        yield [], dict(os.environ)
        return
    with cluster() as there:
        yield ["engine.backend=ray", "engine.workers=2", "engine.shards=2"], there.env


def test_ten_files_arrive_and_the_driver_is_killed_twice(
    own: Own, folder: Path, inbox: Path, place: tuple[list[str], dict[str, str]]
) -> None:
    """The real command, SIGKILL, and files that arrive all the while."""
    overrides, env = place
    command = [sys.executable, "-m", "tests.arriving", str(folder), str(inbox), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed: ") == 2
    run = raylux.open_run(folder)
    assert_all_answered(run, own, inbox)
    told = [event["file"] for event in log_of(folder) if event["event"] == "batch" and event["state"] == "answered"]
    assert len(told) == len(set(told)) >= 8  # a kill may come between an answer and its line in the log


def test_what_is_answered_is_not_touched_again(inputs: Inputs, folder: Path, inbox: Path) -> None:
    """Nor are the run's own queries, which a batch leaves as they are and which leave it alone."""
    mine = facts(inputs.run(folder, *IDF))
    settings = RunFolder(str(folder)).settings()
    put(inbox, "one.jsonl", "ab")
    first, _ = answer(folder, inbox)
    before, wanted = objects(folder), facts(first, "one.jsonl/")
    put(inbox, "two.jsonl", "c")
    run, outcome = answer(folder, inbox)
    assert outcome.answered == ["two.jsonl"] and outcome.passes == 1
    now = objects(folder)
    kept = {path: when for path, when in before.items() if not path.startswith("report/")}
    assert {path: now.get(path) for path in kept} == kept
    assert same(facts(run, "one.jsonl/"), wanted) == []
    assert answer(folder, inbox)[1].answered == []
    assert run.queries == ["a", "b", "c", "d", "one.jsonl/a", "one.jsonl/b", "two.jsonl/c"]
    assert same({name: value for name, value in facts(run).items() if ".jsonl/" not in name}, mine) == []
    assert RunFolder(str(folder)).settings() == settings
    inputs.run(folder, *IDF)
    assert objects(folder) == now


# ----------------------------------------------------------------------------------------- what is wrong


def test_what_cannot_be_answered_is_put_aside_and_the_others_go_on(
    folder: Path, inbox: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(inbox, "good.jsonl", "a")
    put(inbox, "broken.jsonl", "b")
    (inbox / "broken.jsonl").write_text('{"id": "x", "prompt": "anna", "completion": ""}\n', encoding="utf-8")
    command = ["batch", str(folder), "--queries", str(inbox)]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert "answered now: 1 files in 1 passes" in out
    said = [line for line in err.splitlines() if line.startswith("raylux: ")]
    assert said == ["raylux: put aside: broken.jsonl: broken.jsonl query 0 ('x'): 'completion' is empty"]
    assert main(["inspect", str(folder)]) == 0
    assert "1 of 1 query files answered, 1 queries; put aside: broken.jsonl" in capsys.readouterr().out
    # An answered file that changes is refused; one that is corrected is answered.
    put(inbox, "good.jsonl", "ab")
    put(inbox, "broken.jsonl", "b")
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert "in all 2 files, 2 queries" in out and "put aside: good.jsonl: changed after it was taken" in err
    put(inbox, "good.jsonl", "a")
    assert main(command) == 0
    assert main(["top", str(folder), "--query", "good.jsonl/a", "-k", "3"]) == 0
    assert raylux.open_run(folder).queries[-2:] == ["good.jsonl/a", "broken.jsonl/b"]


def test_a_watch_answers_what_comes_and_ends_when_nothing_does(folder: Path, inbox: Path) -> None:
    put(inbox, "one.jsonl", "a")
    later = threading.Timer(0.5, put, (inbox, "two.jsonl", "bc"))
    later.start()
    _, outcome = answer(folder, inbox, "score.token_top=0", watch=True, every=0.1, idle=3.0)
    later.join()
    assert sorted(outcome.answered) == ["one.jsonl", "two.jsonl"]


def test_a_file_that_does_not_come_to_rest_or_does_not_fit_is_left_to_another_command(
    folder: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(inbox, "one.jsonl", "a")
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_PATIENCE", 0.0)
        _, outcome = answer(folder, inbox)
    assert not outcome.answered and "still being written" in outcome.aside["one.jsonl"]
    put(inbox, "two.jsonl", "bc")
    with monkeypatch.context() as patch:
        patch.setattr(Context, "fitting", lambda ctx, queries: int(queries < 2))
        _, outcome = answer(folder, inbox, "score.token_top=0")
    assert outcome.answered == ["one.jsonl"] and "its 2 queries need more memory" in outcome.aside["two.jsonl"]
    assert answer(folder, inbox, "score.token_top=0")[1] == Outcome(["two.jsonl"], {}, 1)


def test_what_a_batch_needs_is_said_before_anything_is_written(
    inputs: Inputs, folder: Path, inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        answer(tmp_path / "nothing", inbox)
    run_stages(inputs.config(tmp_path / "unfitted", *IDF), ("corpus",), quiet=True)
    with pytest.raises(MissingStageError, match=r"the fit lacks .* run `raylux fit CONFIG`"):
        answer(tmp_path / "unfitted", inbox)
    before = objects(folder)
    with pytest.raises(UserError, match="no such folder"):
        answer(folder, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"query\.max_error|fit\.seed"):
        answer(folder, inbox, "fit.seed=7")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(["batch", str(folder), "--queries", "inbox"]) == 2
    assert main(["batch", "run", "--queries", str(inbox)]) == 2
    assert objects(folder) == before


def test_a_restart_answers_again_with_what_is_there(inputs: Inputs, folder: Path, inbox: Path) -> None:
    put(inbox, "one.jsonl", "a")
    wanted = facts(answer(folder, inbox)[0], "one.jsonl/")
    with pytest.raises(UserError, match=r"curvature\.damping .* --restart query"):
        inputs.run(folder, *IDF, "curvature.damping=0.5")
    inputs.run(folder, *IDF, "curvature.damping=0.5", restart="query")
    run, outcome = answer(folder, inbox)
    assert outcome.answered == ["one.jsonl"]
    found = facts(run, "one.jsonl/")
    assert (found["a total"] != wanted["a total"]).all()


def test_a_job_has_the_same_code() -> None:
    script = Path(__file__).parent.parent / "jobs" / "query_batch.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "raylux batch" in done.stdout and "--queries" in done.stdout
