"""What a run writes and says itself: no secret in its folder, no steering character on the terminal, Ray's token on."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from raylux.engine.progress import Reporter
from raylux.report.html import write_html
from raylux.store import RunFolder
from tests.small import Inputs, make_inputs
from tests.test_security import HOSTILE

PASSWORD = "wJalrXUtnFEMI-bPxRfiCYEXAMPLE"


class _Vault(MemoryFileSystem):
    """Files behind USER:PASSWORD@."""

    protocol = "vault"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("vault://").rpartition("@")[2])  # type: ignore[no-any-return]


fsspec.register_implementation("vault", _Vault, clobber=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("secrets"), "gpt2")


def test_no_secret_lands_in_a_run_folder(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    with fsspec.open(f"vault://user:{PASSWORD}@host/corpus.jsonl", "wb") as file:
        file.write(inputs.corpus.read_bytes())
    place = f"corpus.path=vault://user:{PASSWORD}@host/corpus.jsonl"
    folder = tmp_path / "run"
    run = inputs.run(folder, place)
    write_html(run, str(folder / "report" / "index.html"))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"run.yaml", "progress.jsonl", "index.html"} <= {path.name for path in files}
    for path in files:
        data = path.read_bytes()
        assert PASSWORD.encode() not in data and b"hf_0123456789" not in data, path
    said = capsys.readouterr()
    assert PASSWORD not in said.out + said.err + repr(run)
    # The same place is the same run, with another password too.
    inputs.run(folder, place)
    inputs.run(folder, place.replace(PASSWORD, "another-password"))


def test_a_progress_line_steers_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(RunFolder(str(tmp_path / "run")))
    reporter.say(f"{HOSTILE} s3://KEY:{PASSWORD}@bucket")
    said = capsys.readouterr().err
    assert [c for c in said if not c.isprintable() and c != "\n"] == []
    assert PASSWORD not in said and ":boom:" in said


_START = """
import os, pathlib
from raylux.engine import session
started = session.connect()
import ray
print("started", started, os.environ.get("RAY_AUTH_MODE"), ray.get_runtime_context().gcs_address, flush=True)
input()
ray.shutdown()
"""
_JOIN = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('joined')"


@pytest.mark.cluster
def test_what_connect_starts_turns_away_who_has_no_token() -> None:
    """A home of its own and no word of Ray in the environment: connect() makes a private token and asks for it."""
    with tempfile.TemporaryDirectory() as home:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        clean |= {"HOME": home, "RAY_USAGE_STATS_ENABLED": "0"}
        first = subprocess.Popen(
            [sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean
        )
        assert first.stdin is not None and first.stdout is not None
        try:
            started, mode, address = next(line for line in first.stdout if line.startswith("started")).split()[1:]
            assert (started, mode) == ("True", "token")
            token = Path(home) / ".ray" / "auth_token"
            assert token.stat().st_mode & 0o777 == 0o600
            asked = clean | {"RAY_AUTH_MODE": "token"}
            for environment, joined in ((asked | {"RAY_AUTH_TOKEN": "0" * 64}, False), (clean, False), (asked, True)):
                done = subprocess.run(
                    [sys.executable, "-c", _JOIN, address], env=environment, capture_output=True, text=True, timeout=120
                )
                assert (done.stdout.strip().endswith("joined")) is joined, done.stderr[-500:]
        finally:
            first.stdin.write("\n")
            first.stdin.close()
            first.wait(timeout=60)
