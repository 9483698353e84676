"""The commands of cluster/README.md on a real head with dashboard and token, and what becomes of jobs there."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests

import raylux
from raylux.api import run_stages
from raylux.batch import answer_files
from raylux.cli import main
from raylux.engine import auth
from raylux.submission import flow, names
from tests.arriving import put
from tests.heads import ROOT, Head, like_a_clone
from tests.small import Inputs, contents, differing, make_inputs

pytestmark = pytest.mark.cluster


def _readme() -> list[str]:
    """The commands from a clone to a finished job."""
    text = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)[0].splitlines()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "gpt2")


@pytest.fixture(scope="module")
def usual(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """In process."""
    return contents(inputs.run(tmp_path_factory.mktemp("usual") / "run").folder)


@pytest.fixture(scope="module")
def head(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """The README's commands but the first (which installs) and the last, which is run when the tests are done.

    In a folder that looks like a clone to them, with a smaller model than theirs.
    """
    work = tmp_path_factory.mktemp("clone")
    like_a_clone(work, inputs)
    install, activate, start, submit, stop = _readme()
    assert install == "make smollm2-data" and stop == "cluster/local.sh stop"
    found = Head(tmp_path_factory.mktemp("head"), work)
    with found.ended_by(activate, stop):
        done = found.sh(activate, start, submit.replace("configs/quickstart.yaml", "config.yaml"))
        found.said, found.code = done.stdout + done.stderr, done.returncode
        yield found


@pytest.fixture
def joined(head: Head, monkeypatch: pytest.MonkeyPatch) -> Head:
    """The environment of a shell that has sourced local.sh, in the working directory."""
    monkeypatch.setenv(auth.MODE, "token")
    monkeypatch.setenv(auth.TOKEN_PATH, str(head.folder / "token"))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.url)
    # It is not for these commands: Ray's own client would prefer it to the address that it is given.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.chdir(head.work)
    return head


def _until(what: Any, seconds: float = 200.0) -> Any:
    """The first true answer of ``what()``."""
    deadline = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return answer


def test_five_commands_lead_from_a_clone_to_a_finished_job(head: Head, usual: dict[str, np.ndarray]) -> None:
    assert len(_readme()) == 5
    assert head.code == 0, head.said
    folder = head.work / "runs" / "quickstart"
    assert f"submitted {names.submission_id(str(folder), 1)}" in head.said
    assert "covariance: 5 units in" in head.said and "score: 60 sequences in" in head.said  # the job's own log
    assert differing(contents(folder), usual) == []
    assert (head.folder / "token").stat().st_mode & 0o077 == 0


def test_the_token_is_asked_for_and_is_in_no_jobs_settings(
    joined: Head, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = (joined.folder / "token").read_text()
    from raylux.engine.dashboard import reach
    from raylux.engine.jobs import JobServer

    details = JobServer(reach(joined.url))._client.list_jobs()
    assert details and token not in str(details)
    monkeypatch.setenv(auth.TOKEN, "not-" + token)
    assert main(["submit", "config.yaml", f"run.folder={joined.work}/x"]) == 2
    said = capsys.readouterr().err
    assert "refuses the token of RAY_AUTH_TOKEN" in said and token not in said
    monkeypatch.delenv(auth.TOKEN)
    monkeypatch.delenv(auth.TOKEN_PATH)
    monkeypatch.delenv(auth.MODE)
    assert main(["status"]) == 2
    assert "asks for a token" in capsys.readouterr().err


def test_this_head_exports_what_the_dashboard_draws(joined: Head) -> None:
    """All of Ray's but those of GPUs, which this machine has not, and of the autoscaler, whose port may be taken."""
    drawn = json.loads((ROOT / "cluster" / "monitoring" / "grafana.json").read_text(encoding="utf-8"))
    text = " ".join(target["expr"] for panel in drawn["panels"] for target in panel["targets"])
    used = {name for name in re.findall(r"\bray_(?!raylux_)[a-z_]+(?=\{)", text) if not re.search("gpu|gram", name)}
    # The counters of the job that ran here.
    used |= {f"ray_raylux_{name}_total" for name in ("units", "tokens", "reduced_bytes")}
    token = (joined.folder / "token").read_text()
    version = requests.get(f"{joined.url}/api/version", headers={"Authorization": f"Bearer {token}"}, timeout=20).json()
    found = Path("/tmp/ray", version["session_name"], "prom_metrics_service_discovery.json")

    def exported() -> bool:
        names = set()
        for target in (target for entry in json.loads(found.read_text()) for target in entry["targets"]):
            with contextlib.suppress(requests.RequestException):
                names |= set(
                    re.findall(r"^([a-z_]+)\{", requests.get(f"http://{target}/metrics", timeout=5).text, re.M)
                )
        return used <= names

    assert len(used) > 8
    _until(exported, 60.0)


def test_what_cannot_work_there_is_refused_in_a_line(joined: Head, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"run.folder={joined.work}/x"
    used = names.submission_id(str(joined.work / "runs" / "quickstart"), 1)
    for words, part in (
        ((where, "model.device=cuda"), "1 worker needs 1, it has 0"),
        ((where, "engine.workers=64"), "64 workers need 64, it has 2"),
        ((where, "--submission-id", used), f"{used} is in use"),
    ):
        assert main(["submit", "config.yaml", *words]) == 2
        assert part in capsys.readouterr().err
    assert main(["stop", "no-such-job"]) == 2
    assert "no job no-such-job" in capsys.readouterr().err


def test_a_job_ends_with_its_own_exit_code(joined: Head, capsys: pytest.CaptureFixture[str]) -> None:
    """The corpus is missed by the job, not before: a path that only the cluster's machines might have."""
    words = ["config.yaml", f"run.folder={joined.work}/x", f"corpus.path={joined.work}/gone.jsonl"]
    assert main(["submit", *words]) == 2
    said = capsys.readouterr()
    assert "gone.jsonl" in said.out and "failed with exit code 2" in said.err
    assert main(["status", *words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)[0]
    assert (record["status"], record["exit_code"]) == ("FAILED", 2)


def test_an_attempt_that_was_killed_and_one_that_was_stopped_go_on_to_the_same_bits(
    joined: Head, usual: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = joined.work / "runs" / "killed"
    words = ["config.yaml", f"run.folder={folder}"]
    server = flow.connect(joined.url)

    def working() -> bool:
        log = folder / "progress.jsonl"
        return log.exists() and '"covariance"' in log.read_text(encoding="utf-8")

    def driver() -> psutil.Process | None:
        for process in joined.processes():
            if process.name().startswith("python") and process.cmdline()[1:4] == ["-m", "raylux.cli", "run"]:
                return process
        return None

    assert main(["submit", *words, "--no-wait"]) == 0
    _until(working)
    _until(driver).kill()
    first = names.submission_id(str(folder), 1)
    assert flow.exit_code(server.wait(first, 100.0)) == 137

    assert main(["submit", *words, "--no-wait"]) == 0
    assert "attempt 1 failed with exit code 137; attempt 2 goes on" in capsys.readouterr().err
    _until(driver)
    assert main(["stop", *words]) == 0
    assert "was stopped" in capsys.readouterr().err

    assert main(["submit", *words]) == 0
    assert "attempt 2 was stopped; attempt 3 goes on" in capsys.readouterr().err
    assert differing(contents(folder), usual) == []
    assert main(["status"]) == 0
    shown = capsys.readouterr().out
    assert all(names.submission_id(str(folder), attempt) in shown for attempt in (1, 2, 3))
    assert all(word in shown for word in ("FAILED", "STOPPED", "SUCCEEDED"))


def test_a_batch_that_is_submitted_answers_files_as_one_in_process_does(
    joined: Head, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fit is a job, the answers are another; both against the same in this process."""
    inbox, there, here = joined.work / "inbox", joined.work / "runs" / "asked", tmp_path / "asked"
    inbox.mkdir()
    for name, ids in (("one.jsonl", "a"), ("two.jsonl", "bc")):
        put(inbox, name, ids)
    words = ["config.yaml", f"run.folder={there}"]
    assert main(["submit", *words, "--command", "fit"]) == 0
    assert main(["submit", *words, "--command", "batch", "--queries", str(inbox)]) == 0
    assert "works on this run folder" not in capsys.readouterr().err

    run_stages(inputs.config(here), ("corpus", "fit"), quiet=True)
    wanted, outcome = answer_files(str(here), str(inbox), quiet=True)
    assert outcome.answered == ["one.jsonl", "two.jsonl"]
    found = raylux.open_run(there)
    assert found.queries == wanted.queries
    assert {"one.jsonl/a", "two.jsonl/b", "two.jsonl/c"} <= set(found.queries)
    assert found.scores().sortby("sequence").equals(wanted.scores().sortby("sequence"))
    assert found.best().equals(wanted.best())
