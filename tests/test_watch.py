"""raylux watch: what progress.jsonl says of a run, beside it and afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylux import api
from raylux.cli import main
from raylux.report.tables import clock, watch_line, watch_table
from raylux.report.watching import seen
from raylux.store import Lease, RunFolder, present_holder
from tests.small import Inputs, make_inputs
from tests.test_report import printed


def task(time: float, state: str, done: int, stage: str = "score", total: int = 100) -> dict[str, Any]:
    counts = {"done": done, "total": total, "what": "sequences"}
    return {"time": time, "event": "task", "stage": stage, "state": state, **counts}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("watch")
    inputs: Inputs = make_inputs(base / "inputs")
    inputs.run(base / "run")
    return base / "run"


def test_the_pace_is_that_of_the_last_command() -> None:
    """60 of 100 were there when it went on at time 1000; 10 more took 20 s, so the last 30 take 60."""
    found = seen(
        [task(10, "started", 0), task(40, "running", 60), task(1000, "started", 60), task(1020, "running", 70)]
    )
    (stage,) = found.stages
    assert (stage.done, stage.seconds, stage.left) == (70, 20, 60)
    assert found.working is stage and watch_line(found) == "score: 70 of 100 sequences, about 1:00 min left"
    done = seen([task(10, "started", 0), task(40, "done", 100)])
    assert done.working is None and done.stages[0].left is None and watch_line(done) == ""


def test_tokens_per_second_are_those_of_the_last_minute() -> None:
    units = [{"time": float(at), "event": "unit", "tokens": 600} for at in range(0, 130, 10)]
    assert seen(units).rate == pytest.approx(60.0)
    assert seen(units[:3]).rate == pytest.approx(90.0), "three units told within the first 20 s"


def test_workers_come_and_go() -> None:
    events: list[dict[str, Any]] = [
        {"time": 1.0, "event": "worker", "slot": 0, "state": "started"},
        {"time": 2.0, "event": "worker", "slot": 1, "state": "started"},
        {"time": 3.0, "event": "worker", "slot": 0, "state": "died", "reason": "out of \x1b[31mmemory"},
        {"time": 4.0, "event": "shard", "shard": 2, "state": "died", "reason": "node lost"},
    ]
    found = seen(events)
    assert found.workers == {1} and found.deaths == 2 and found.trouble == "shard 2: node lost"
    assert "\x1b" not in printed(watch_table(seen(events[:3]), None, 5.0))


_VALUES = st.sampled_from(
    [None, True, -1, 3, 2.5, float("nan"), float("inf"), 10**400, "", "x", [], {}, "task", "unit", "worker", "died"]
)
_KEYS = ("time", "event", "stage", "state", "done", "total", "what", "slot", "tokens", "reason")


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(_KEYS, _VALUES)), max_size=6))
def test_whatever_stands_there_is_summed_up(events: list[dict[str, Any]]) -> None:
    found = seen(events)
    assert found.rate >= 0 and found.last >= 0
    printed(watch_table(found, None, 0.0))
    watch_line(found)


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (59.6, "1:00 min"), (185, "3:05 min"), (7630, "2:07 h")])
def test_seconds_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert clock(seconds) == words


def test_a_run_that_has_ended(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(finished)]) == 0
    said = capsys.readouterr().out
    assert "no driver works on it" in said and "next: raylux report" in said
    for stage in ("covariance", "eigenbases", "lambda", "query", "score"):
        assert stage in said


def test_it_goes_on_while_a_driver_holds_the_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A driver at work: its word is passed on, and its end ends the watching."""
    folder = RunFolder(str(finished))
    log = finished / "progress.jsonl"

    def tell(state: str, done: int) -> None:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(task(time.time(), state, done)) + "\n")

    before = log.read_bytes()
    try:
        with Lease.take(folder.files):
            assert present_holder(folder.files) is not None
            tell("started", 0)
            watching = threading.Thread(target=main, args=(["watch", str(finished), "--every", "0.1"],))
            watching.start()
            for done in (10, 35):
                time.sleep(0.5)
                tell("running", done)
            time.sleep(0.5)
            assert watching.is_alive()
        watching.join(30)
        assert not watching.is_alive()
    finally:
        log.write_bytes(before)
    said = capsys.readouterr().out
    assert "driver: process" in said and "score: 10 of 100 sequences" in said and "score: 35 of 100 sequences" in said
    assert present_holder(folder.files) is None


def test_a_run_without_a_log_is_shown_by_what_is_committed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = finished / "progress.jsonl"
    kept = log.read_bytes()
    log.unlink()
    try:
        assert api.open_run(finished).watched() is None
        assert main(["watch", str(finished)]) == 0
        assert "next: raylux report" in capsys.readouterr().out
        assert main(["watch", str(finished / "nothing")]) == 2
    finally:
        log.write_bytes(kept)


@pytest.mark.parametrize("command", ["top RUN", "top RUN RUN", "inspect RUN --verify --profile", "watch RUN --once"])
def test_whoever_looks_at_a_run_does_not_wait_for_torch(finished: Path, command: str) -> None:
    """It takes seconds to import, and transformers as long again; looking takes less."""
    arguments = [str(finished) if word == "RUN" else word for word in command.split()]
    code = (
        f"import sys, raylux.cli; code = raylux.cli.main({arguments})\n"
        "sys.exit(code or ', '.join({'torch', 'transformers', 'ray'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
