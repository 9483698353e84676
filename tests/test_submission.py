"""Runs as jobs: names, places, demand against supply, attempts, exit codes, and one line for each mistake."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raylux.cli import main
from raylux.config import Config
from raylux.engine import auth
from raylux.engine import dashboard as dashboards
from raylux.engine.capacity import Demand, fit_nodes
from raylux.errors import UserError
from raylux.submission import flow, names, paths
from tests.dashboards import GIB, NODE, Answers, StubServer, dashboard
from tests.small import Inputs, make_inputs

SECRET = "a-token-of-this-test"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("submission"), "gpt2")


@pytest.fixture
def place(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with config.yaml, and an environment without a word of Ray."""
    for name in (auth.MODE, auth.TOKEN, auth.TOKEN_PATH, auth.ADDRESS, "RAY_API_SERVER_ADDRESS", paths._JOB):
        monkeypatch.delenv(name, raising=False)
    sections = inputs.sections(tmp_path / "runs" / "One Run")
    sections["engine"] = {"backend": "ray", "workers": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def url(answers: Answers, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A dashboard that answers; it is the environment's."""
    with dashboard(answers) as address:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
        yield address


@pytest.fixture
def server(url: str, monkeypatch: pytest.MonkeyPatch) -> StubServer:
    """A job server behind the dashboard whose jobs all succeed, unless told otherwise."""
    stub = StubServer(*[("SUCCEEDED", 0)] * 9)
    monkeypatch.setattr(flow, "_server", lambda dashboard: stub)
    return stub


def _refused(capsys: pytest.CaptureFixture[str], *words: str, parts: tuple[str, ...]) -> None:
    """The command ends with 2 and one line that has all parts."""
    assert main(list(words)) == 2
    text = capsys.readouterr().err
    line = text.splitlines()[-1]
    assert line.startswith("raylux: error: ") and text.count("error: ") == 1 and "Traceback" not in text
    assert all(part in line for part in parts), line


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("folder", "slug"),
    [("/shared/runs/mine", "mine"), ("s3://bucket/runs/My Run!", "my-run"), ("/", "run"), ("/x/" + "a" * 99, "a" * 40)],
)
def test_an_id_says_run_and_attempt_and_is_one_that_ray_takes(folder: str, slug: str) -> None:
    name = names.submission_id(folder, 3)
    assert name.startswith(f"raylux-{slug}-") and name.endswith("-3")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and len(name) < 100
    assert names.attempt_of(name, folder) == 3
    assert names.submission_id(folder.rstrip("/") + "/", 3) == name


def test_ids_of_other_runs_and_other_people_are_no_attempts() -> None:
    mine = "/shared/runs/mine"
    others = [
        names.submission_id("/elsewhere/runs/mine", 7),
        "raysubmit_abc",
        names.run_name(mine),
        f"{names.run_name(mine)}-0",
        f"{names.run_name(mine)}-1x",
    ]
    assert names.next_attempt(others, mine) == 1
    assert names.next_attempt([*others, names.submission_id(mine, 2), names.submission_id(mine, 10)], mine) == 11


# ----------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("run.folder=runs/x", ("run.folder = runs/x", "absolute", "URL")),
        ("run.folder=~/runs/x", ("run.folder = ~/runs/x", "absolute")),
        ("model.path=weights", ("model.path = weights", "carries no data", "absolute")),
        ("corpus.path=corpus.jsonl", ("corpus.path = corpus.jsonl", "carries no data")),
        ("queries.path=no-such.yaml", ("queries.path = no-such.yaml", "sent with the job")),
        ("prefilter.topp=1", ("prefilter.topp", "did you mean")),
    ],
)
def test_places_that_a_job_could_not_use_are_refused_before_anybody_is_asked(
    place: Path, answers: Answers, url: str, capsys: pytest.CaptureFixture[str], override: str, parts: tuple[str, ...]
) -> None:
    (place / "weights").mkdir()
    (place / "corpus.jsonl").touch()
    _refused(capsys, "submit", "config.yaml", override, parts=parts)
    assert answers.asked == []


def test_a_hub_name_is_no_relative_path(place: Path) -> None:
    config = Config.load("config.yaml", ["model.path=openai-community/gpt2", "corpus.path=hf-owner/corpus"])
    paths.check(config, place)


def test_the_config_travels_with_the_working_directory(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "inner").mkdir()
    words = ("submit", str(place / "config.yaml"), "--working-dir")
    _refused(capsys, *words, "inner", parts=("config.yaml", "inner", "--working-dir"))
    _refused(capsys, *words, "nowhere", parts=("nowhere", "no such folder"))


def test_in_a_job_a_relative_run_folder_is_refused_whoever_submitted_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(paths._JOB, "{}")
    _refused(capsys, "run", "config.yaml", "run.folder=runs/x", parts=("run.folder = runs/x", "absolute"))
    assert not (place / "runs").exists()


# ------------------------------------------------------------------------------------- address and token


def test_nobody_at_the_address(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    for words in (("submit", "config.yaml"), ("status",), ("stop", "x")):
        _refused(capsys, *words, "--address", address, parts=(address, "no Ray dashboard", "8265", "refused"))


def test_somebody_who_never_answers_is_given_up(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dashboards, "_PATIENCE", (0.2, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        _refused(capsys, "status", "--address", address, parts=(address, "no answer"))


@pytest.mark.parametrize(
    "address", ["ray://head:10001", "auto", "http://", "http://user@host:8265", "http://host:port"]
)
def test_an_address_that_is_none_of_a_dashboard(place: Path, capsys: pytest.CaptureFixture[str], address: str) -> None:
    _refused(capsys, "status", "--address", address, parts=(address.partition("user@")[0], "http://HOST:8265"))


@pytest.mark.parametrize(
    "raw", [{"/api/version": (200, b"<html>")}, {"/api/version": (404, b"")}, {"/api/version": (200, b"[]")}]
)
def test_another_server_at_the_address(
    answers: Answers, url: str, capsys: pytest.CaptureFixture[str], raw: dict[str, tuple[int, bytes]]
) -> None:
    answers.raw = raw
    _refused(capsys, "status", parts=(url, "Ray dashboard"))


def test_a_missing_and_a_wrong_token_name_the_variables_and_not_the_token(
    answers: Answers, url: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers.token = SECRET
    variables = ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN")
    _refused(capsys, "submit", "config.yaml", parts=("asks for a token", *variables))
    monkeypatch.setenv(auth.TOKEN, "quite-another-token")
    _refused(capsys, "submit", "config.yaml", parts=("refuses the token of RAY_AUTH_TOKEN", *variables))
    monkeypatch.delenv(auth.TOKEN)
    monkeypatch.setenv(auth.TOKEN_PATH, str(place / "no-such-file"))
    _refused(capsys, "submit", "config.yaml", parts=("no token can be read", "no-such-file", *variables))
    (place / "token").write_text("two words\n", encoding="ascii")
    monkeypatch.setenv(auth.TOKEN_PATH, str(place / "token"))
    _refused(capsys, "submit", "config.yaml", parts=("no token", *variables))


def test_the_token_of_the_home_folder_is_not_handed_to_whoever_answers(
    answers: Answers, url: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It belongs to clusters started here; in mode token the environment has said that it is this cluster's too."""
    monkeypatch.setenv("HOME", str(place))
    (place / ".ray").mkdir()
    (place / ".ray" / "auth_token").write_text(SECRET, encoding="ascii")
    dashboards.reach(url)
    assert answers.asked[-1][1] == ""
    monkeypatch.setenv(auth.MODE, "token")
    dashboards.reach(url)
    assert answers.asked[-1][1] == f"Bearer {SECRET}"


def test_another_version_of_ray(answers: Answers, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    answers.ray = "2.9.3"
    _refused(capsys, "submit", "config.yaml", parts=("Ray 2.9.3", "must be the same", "ray[default]==2.9.3"))


# ------------------------------------------------------------------------------------ demand and supply


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("model.device=cuda",), ("not enough GPUs", "needs 1", "it has 0", "model.device")),
        (("engine.workers=64",), ("not enough CPUs", "need 64", "it has 2", "engine.workers to 2")),
        (("engine.threads=3",), ("not enough CPUs", "needs 3", "it has 2", "engine.threads")),
        (
            ("model.device=cuda", "model.device_map=balanced", "engine.gpus_per_worker=4"),
            ("a worker needs 4 GPUs of one node", "no node has more than 0", "engine.gpus_per_worker"),
        ),
    ],
)
def test_too_few_cpus_or_gpus_are_refused_with_demand_and_supply(
    server: StubServer, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    _refused(capsys, "submit", "config.yaml", *overrides, parts=parts)
    assert server.sent == []


def test_too_little_memory_is_refused_with_demand_and_supply(
    answers: Answers, server: StubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    answers.nodes = [{"CPU": 2.0, "memory": 0.05 * GIB}]
    _refused(capsys, "submit", "config.yaml", parts=("not enough memory", "GiB in 4 layer passes, it has 0.1 GiB"))
    assert server.sent == []


@pytest.mark.parametrize("model", ["s3://bucket/model", "openai-community/gpt2", "package://no_such_module/model.gguf"])
def test_a_model_that_is_not_here_is_said_not_to_be_checked(
    server: StubServer, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert main(["submit", "config.yaml", f"model.path={model}", "--no-wait"]) == 0
    assert "memory is not" in capsys.readouterr().err


def test_a_cluster_that_grows_is_not_held_to_what_it_has(answers: Answers, server: StubServer) -> None:
    assert main(["submit", "config.yaml", "engine.workers=64", "--grow", "--no-wait"]) == 0
    assert server.sent[0]["env"]["RAYLUX_GROW"] == "1"
    assert [path for path, _ in answers.asked] == ["/api/version"]


def test_a_run_in_process_asks_for_no_workers(server: StubServer) -> None:
    assert main(["submit", "config.yaml", "engine.backend=local", "engine.workers=64", "--no-wait"]) == 0


def test_supply_counts_living_nodes_together(answers: Answers, url: str) -> None:
    answers.nodes = [NODE, NODE, {"CPU": 4.0, "GPU": 2.0, "memory": 1.0 * GIB}]
    nodes = dashboards.reach(url).nodes()
    assert [node.resources["CPU"] for node in nodes] == [2.0, 2.0, 4.0]
    assert fit_nodes(Demand("auto", "auto", 1, True, GIB, GIB), nodes) == (2, 2)
    with pytest.raises(UserError, match=r"3 workers need 3, it has 2; set engine\.workers to 2"):
        fit_nodes(Demand(3, "auto", 1, True, GIB, GIB), nodes)


# ------------------------------------------------------------------------------------------- attempts


def test_the_same_command_makes_the_next_attempt_after_one_that_failed(
    server: StubServer, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.endings = [("FAILED", 3), ("FAILED", None), ("STOPPED", None), ("FAILED", -9), ("SUCCEEDED", 0)]
    codes = [main(["submit", "config.yaml", "fit.seed=1"]) for _ in range(5)]
    assert codes == [3, 1, 130, 137, 0]
    first = names.submission_id(str(place / "runs" / "One Run"), 1)
    assert [job["name"] for job in server.sent] == [f"{first[:-1]}{attempt}" for attempt in range(1, 6)]
    assert server.sent[0]["entrypoint"] == "python -m raylux.cli run config.yaml fit.seed=1"
    assert server.sent[0]["working_dir"] == str(place)
    said = capsys.readouterr()
    assert "attempt 1 failed with exit code 3; attempt 2 goes on where it stopped" in said.err
    assert "attempt 3 was stopped; attempt 4 goes on" in said.err
    assert "no node took it" in said.err
    assert r"\x1b[31m" in said.out and "\x1b" not in said.out


def test_a_batch_goes_on_by_the_same_command_and_ends_with_its_own_code(
    server: StubServer, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job reads the fitted run's own config: of this one it takes the run folder alone."""
    server.endings = [("FAILED", -9), ("FAILED", 4), ("SUCCEEDED", 0)]
    run, inbox = place / "elsewhere" / "fitted", f"{place}/in box"
    words = ["submit", "config.yaml", f"run.folder={run}", "engine.workers=1", "--command", "batch"]
    codes = [main([*words, "--queries", inbox, "--watch", "--idle", "60"]) for _ in range(3)]
    assert codes == [137, 4, 0]
    entrypoint = f"python -m raylux.cli batch {run} --queries '{inbox}' --watch --idle 60 engine.workers=1"
    assert [job["entrypoint"] for job in server.sent] == [entrypoint] * 3
    assert [job["name"] for job in server.sent] == [names.submission_id(str(run), number) for number in (1, 2, 3)]
    assert "attempt 2 failed with exit code 4; attempt 3 goes on where it stopped" in capsys.readouterr().err
    _refused(capsys, *words, parts=("--command batch needs --queries FOLDER",))
    _refused(capsys, *words, "--queries", "inbox", parts=("--queries inbox: a job needs an absolute path", str(place)))
    _refused(capsys, "submit", "config.yaml", "--queries", inbox, parts=("are those of --command batch",))
    assert len(server.sent) == 3


def test_an_attempt_that_is_under_way_is_followed_and_another_command_is_refused(
    server: StubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "config.yaml", "--no-wait"]) == 0
    _refused(capsys, "submit", "config.yaml", "--command", "fit", parts=("works on this run folder", "raylux stop"))
    assert main(["submit", "config.yaml"]) == 0
    assert len(server.sent) == 1
    assert "is running already; following it" in capsys.readouterr().err


def test_an_id_of_the_users_own_that_is_in_use(server: StubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "config.yaml", "--submission-id", "mine", "--no-wait"]) == 0
    _refused(capsys, "submit", "config.yaml", "--submission-id", "mine", parts=("mine is in use", "another"))


def test_two_who_submit_the_same_run_at_once(
    server: StubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both have seen no attempt, both ask for the first: the server takes one."""
    monkeypatch.setattr(flow, "latest", lambda *_: None)
    assert main(["submit", "config.yaml", "--no-wait"]) == 0
    _refused(capsys, "submit", "config.yaml", parts=("is in use", "the same command again"))


def test_a_secret_in_an_override_does_not_go_to_the_dashboard(
    server: StubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    override = "corpus.path=https://user:hidden-password@host/corpus.jsonl"
    _refused(capsys, "submit", "config.yaml", override, parts=("secret", "dashboard"))
    assert server.sent == []


def test_ctrl_c_ends_the_following_and_not_the_job(
    server: StubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "follow", interrupted)
    assert main(["submit", "config.yaml"]) == 130
    assert "goes on without you; raylux stop" in capsys.readouterr().err
    assert not next(iter(server.known.values())).over


def test_status_and_stop_know_a_run_by_its_config(server: StubServer, capsys: pytest.CaptureFixture[str]) -> None:
    _refused(capsys, "stop", "config.yaml", parts=("no job", "One Run"))
    assert main(["status"]) == 0
    assert "no job of raylux" in capsys.readouterr().err
    main(["submit", "config.yaml", "--no-wait"])
    assert main(["status"]) == 0 and "RUNNING" in capsys.readouterr().out
    assert main(["stop", "config.yaml"]) == 0 and "was stopped" in capsys.readouterr().err
    assert main(["stop", "config.yaml"]) == 0 and "had ended already" in capsys.readouterr().err
    assert main(["status", "config.yaml", "--json"]) == 0
    record = yaml.safe_load(capsys.readouterr().out)[0]
    assert (record["status"], record["command"], record["exit_code"]) == ("STOPPED", "run", None)
