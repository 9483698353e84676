"""raylux doctor and Ray: the token, a cluster that does not answer, a demand that does not fit."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

from raylux.doctor import FAIL, OK, WARN, cluster
from raylux.doctor.finding import guarded
from raylux.engine import auth
from raylux.engine.probe import Answer, ask
from tests.small import Inputs, make_inputs
from tests.test_doctor import case_of


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("doctor"), "gpt2")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No word of Ray in the environment, and a home of this test's own, which others can reach."""
    for name in (auth.MODE, auth.TOKEN, auth.TOKEN_PATH, auth.ADDRESS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def _token_file(path: Path, mode: int = 0o600, text: str = "secret") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("mode", "address", "token", "state", "said"),
    [
        (None, None, None, OK, "will be made"),
        (None, None, "private", OK, "private"),
        ("token", None, "private", OK, "private"),
        ("token", None, "variable", OK, "RAY_AUTH_TOKEN"),
        ("token", "10.0.0.1:6379", None, FAIL, "holds no token"),
        ("token", "10.0.0.1:6379", "empty", FAIL, "holds no token"),
        ("token", "10.0.0.1:6379", "private", OK, "private"),
        (None, "10.0.0.1:6379", None, WARN, "RAY_AUTH_MODE is not"),
        (None, "10.0.0.1:6379", "private", WARN, "RAY_AUTH_MODE is not"),
        ("disabled", None, None, FAIL, "run code"),
        ("disabled", "10.0.0.1:6379", None, WARN, "run code"),
    ],
)
def test_auth_says_what_the_environment_says(
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
    mode: str | None,
    address: str | None,
    token: str | None,
    state: str,
    said: str,
) -> None:
    for name, value in ((auth.MODE, mode), (auth.ADDRESS, address)):
        if value is not None:
            environment.setenv(name, value)
    if token == "variable":
        environment.setenv(auth.TOKEN, "very-secret")
    elif token is not None:
        environment.setenv(auth.TOKEN_PATH, str(_token_file(tmp_path / "token", text="" if token == "empty" else "x")))
    found = cluster.auth()
    assert (found.state, said in found.detail) == (state, True), found
    assert (state == OK) == (found.advice == "")
    assert "very-secret" not in found.detail


def test_a_token_that_others_can_read_is_a_failure(environment: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path: pytest keeps its folders to itself
        file = _token_file(Path(folder) / "token", 0o644)
        environment.setenv(auth.TOKEN_PATH, str(file))
        Path(folder).chmod(0o755)
        found = cluster.auth()
        assert found.state == FAIL and found.advice == f"chmod 600 {file}"
        Path(folder).chmod(0o700)
        assert cluster.auth().state == OK


def test_what_is_started_here_asks_for_a_token_that_is_private(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv(auth.MODE, "")  # so that what switch_on sets is undone after the test
    auth.switch_on()
    file = tmp_path / ".ray" / "auth_token"
    assert os.environ[auth.MODE] == "token"
    assert file.stat().st_mode & 0o777 == 0o600
    token = file.read_text(encoding="ascii")
    assert len(token) >= 32
    environment.setenv(auth.MODE, "")
    auth.switch_on()
    assert file.read_text(encoding="ascii") == token


@pytest.mark.parametrize(("name", "value"), [(auth.ADDRESS, "10.0.0.1:6379"), (auth.MODE, "disabled")])
def test_what_the_user_decided_is_left_alone(
    environment: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    environment.setenv(name, value)
    auth.switch_on()
    assert os.environ.get(auth.MODE) == (value if name == auth.MODE else None)
    assert not (tmp_path / ".ray").exists()


def test_a_cluster_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that accepts and says nothing: joining would wait for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        assert ask(timeout=3) == Answer("no answer in 3 s")


def test_without_an_answer_resources_are_not_checked(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(cluster, "ask", lambda demand=None: Answer("no cluster there " + "at all " * 99))
    case = case_of(inputs, tmp_path / "run", "engine.backend=ray")
    found = cluster.address(case)
    assert found.state == FAIL and "127.0.0.1:1" in found.detail and len(found.detail) < 400
    (resources,) = guarded("resources", lambda: cluster.resources(case))
    assert resources.state == WARN and "needs the ray" in resources.detail


@pytest.mark.cluster
def test_a_demand_is_held_against_a_cluster_of_its_own(inputs: Inputs, tmp_path: Path) -> None:
    found = cluster.resources(case_of(inputs, tmp_path / "run", "engine.backend=ray", "engine.workers=1"))
    assert found.state == OK and found.detail.startswith("1 workers of 1 thread")
    found = cluster.resources(case_of(inputs, tmp_path / "run", "engine.backend=ray", "engine.workers=4000"))
    assert found.state == FAIL and "4000 workers need 4000" in found.detail
    labels = "engine.worker_labels={tier: none}"
    found = cluster.resources(case_of(inputs, tmp_path / "run", "engine.backend=ray", "engine.workers=1", labels))
    assert found.state == FAIL and "no node has the labels tier=none" in found.detail


def test_memory_of_a_run_in_process(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(inputs, tmp_path / "run")
    assert cluster.resources(case).state == OK
    free = type("Memory", (), {"available": 1 << 20})
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    (found,) = guarded("resources", lambda: cluster.resources(case))
    assert found.state == FAIL and "not enough memory" in found.detail
