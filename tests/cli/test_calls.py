"""The command line: help, exit codes, one line per mishap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import raylux
from raylux.cli import main
from raylux.errors import MissingStageError, NumericsError, UserError
from raylux.health import Quarantined
from raylux.profiling import Spent
from raylux.report.profile import StageTime
from raylux.shown import plain
from tests.cli.stubs import ESCAPES, ROOT, STAGES, StubApi, one_line

COMMANDS = (
    *("run", "fit", "prefilter", "query", "score", "report", "top", "inspect", "models", "demo", "doctor", "plan"),
    *("submit", "status", "stop", "watch", "batch", "calibrate", "verify", "evaluate", "perturb"),
)


# ---------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_a_short_manual(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"raylux {command} " in text.split("Example", 1)[1]
    assert "Reads" in text or "Needs" in text
    for code in ("0 ", "1 ", "2 ", "3 ", "130 "):
        assert f"\n    {code}" in text


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    without_arguments = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == without_arguments
    assert all(f"\n  {command} " in without_arguments for command in COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "ray", "transformers", "pandas", "zarr")
    code = f"import sys, raylux.cli; raylux.cli.main(['--help']); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# ------------------------------------------------------------------------------------- user's errors


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run"], ["CONFIG", "raylux run --help"]),
        (["rum"], ["rum", "run"]),
        (["top", "RUN", "--fromat", "json"], ["--fromat", "--format"]),
        (["top", "RUN", "--format", "xml"], ["xml", "json"]),
        (["top", "RUN", "-k", "0"], ["-k", "greater than or equal to 1"]),
        (["run", "no-such.yaml"], ["no-such.yaml", "no such config file"]),
    ],
)
def test_a_wrong_call_ends_in_one_line_and_2(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    line = one_line(capsys.readouterr().err)
    assert line.startswith("raylux: error: ")
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("prefilter.topp=5", ["prefilter.topp", "did you mean 'top'"]),
        ("prefliter.top=5", ["prefliter", "did you mean 'prefilter'"]),
        ("prefilter.top=0", ["prefilter.top", "0"]),
        ("curvature.kind=ekfak", ["curvature.kind", "ekfak"]),
        ("prefilter", ["section.key=value"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "fit", "models"])
def test_a_bad_override_ends_in_one_line_and_2(
    command: str, override: str, parts: list[str], config: str, api: StubApi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, config, override]) == 2
    line = one_line(capsys.readouterr().err)
    assert all(part in line for part in parts), line
    assert not api.calls


def test_broken_config_files_end_in_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    for content in (b"run: [", b"\xff\xfe", b"- a list", b"", b"run: {}"):
        path.write_bytes(content)
        assert main(["run", str(path)]) == 2
        assert str(path) in one_line(capsys.readouterr().err)


def test_unknown_query_names_the_nearest(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "RUN", "--query", "bout"]) == 2
    assert "did you mean 'boat'?" in one_line(capsys.readouterr().err)
    assert main(["top", "RUN", "--query", "zzz"]) == 2
    assert "known: boat, piano" in one_line(capsys.readouterr().err)


# ---------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("corpus.jsonl row 3: no field 'text'"), 2),
        (MissingStageError("no factors; run: raylux fit config.yaml"), 2),
        (NumericsError("NaN in layer h.0.mlp, unit 3"), 1),
    ],
)
def test_errors_on_purpose_end_in_their_line_and_code(
    error: Exception, code: int, config: str, api: StubApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.error = error
    for arguments in (["run", config], ["top", "RUN"], ["inspect", "RUN"]):
        assert main(arguments) == code
        assert one_line(capsys.readouterr().err) == f"raylux: error: {error}"


def test_an_error_message_cannot_steer_the_terminal(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.error = UserError(f"bad id {ESCAPES}\nsecond line")
    assert main(["inspect", "RUN"]) == 2
    line = one_line(capsys.readouterr().err)
    assert line.isprintable()
    assert "second line" in line


def test_an_internal_error_keeps_its_traceback_in_a_file(
    config: str, api: StubApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    api.error = ZeroDivisionError("nobody foresaw this")
    assert main(["run", config]) == 1
    line = one_line(capsys.readouterr().err)
    assert "ZeroDivisionError: nobody foresaw this" in line
    (log,) = tmp_path.glob("raylux-*.log")
    assert str(log) in line
    assert "Traceback" in log.read_text(encoding="utf-8")


def test_debug_prints_the_traceback(
    config: str, api: StubApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    api.error = ZeroDivisionError("nobody foresaw this")
    monkeypatch.setenv("RAYLUX_DEBUG", "0")  # so that what --debug sets is undone after the test
    assert main(["--debug", "run", config]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", STAGES[1:])
def test_ctrl_c_at_any_stage_says_how_to_continue(
    command: str, config: str, api: StubApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.error = KeyboardInterrupt()
    assert main([command, config]) == 130
    expected = "raylux: interrupted; run the same command again to continue"
    assert one_line(capsys.readouterr().err) == expected


GIVEN_UP = Quarantined("score", "u000003", tuple(f"s{place}{ESCAPES}" for place in range(7)), 3, f"killed {ESCAPES}")


def test_quarantined_units_end_in_3(config: str, api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    for units, said in (([GIVEN_UP], "1 unit is quarantined"), ([GIVEN_UP] * 2, "2 units are quarantined")):
        api.run.quarantined = units
        assert main(["score", config]) == 3
        line = one_line(capsys.readouterr().err)
        assert said in line
        assert "raylux inspect runs/stub" in line


def test_damaged_objects_end_in_2(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "RUN", "--verify"]) == 0
    assert "every object is as it was written" in capsys.readouterr().out
    api.run.damaged = ["factors/a/c/0: missing", f"scores/b{ESCAPES}: checksum differs"]
    assert main(["inspect", "RUN", "--verify"]) == 2
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("damaged: ")] == [
        "damaged: factors/a/c/0: missing",
        f"damaged: {plain(api.run.damaged[1])}",
    ]
    assert "--restart" in text


# -------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("command", "stages"),
    [
        ("run", None),
        ("fit", ("corpus", "fit")),
        ("prefilter", ("corpus", "prefilter")),
        ("query", ("query",)),
        ("score", ("score",)),
        ("report", ("report",)),
    ],
)
def test_a_command_runs_its_stages_with_the_overridden_config(
    command: str, stages: tuple[str, ...] | None, config: str, api: StubApi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, config, "prefilter.top=7", "curvature.kind=kfac"]) == 0
    ((loaded, asked, path, restart),) = api.calls
    assert asked == stages
    assert restart is None
    assert path == config
    assert (loaded.prefilter.top, loaded.curvature.kind) == (7, "kfac")
    assert "raylux top runs/stub --query boat" in capsys.readouterr().out


def test_inspect_names_the_command_that_makes_what_is_missing(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.run.missing = ("query", "score", "report")
    assert main(["inspect", "RUN"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in STAGES)
    assert "next: raylux query stub.yaml" in text
    assert "quarantined" not in text and "not promised" not in text and "verified" not in text


def test_inspect_shows_where_the_time_went(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "RUN", "--profile"]) == 0
    assert "runs/stub: no profile" in capsys.readouterr().out
    api.run.times = [StageTime("score", Spent({"forward": [3.0, 2.5], "dot": [1.0, 1.0]}, 40), Spent({"wait": [5, 1]}))]
    assert main(["inspect", "RUN"]) == 0
    assert "forward" not in capsys.readouterr().out
    assert main(["inspect", "RUN", "--profile"]) == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "score all 4 3.5 100.0% 0 8" in rows and "forward 3 2.5 75.0%" in rows and "driver: wait 5 1" in rows


def test_inspect_lists_what_was_given_up_and_unlike_machines(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.run.quarantined = [GIVEN_UP]
    api.run.mixed = {"threads": ["1", "2"]}
    assert main(["inspect", "RUN"]) == 0
    (lost, mixed) = capsys.readouterr().out.splitlines()[-2:]
    assert lost.startswith("quarantined: score u000003, 7 sequences (s0")
    assert "…): 3 workers died of it; killed red" in lost
    assert lost.isprintable()
    assert "threads: 1, 2" in mixed and "equal bits are not promised" in mixed


@pytest.mark.parametrize("command", ["run", "fit", "prefilter", "query", "score", "report"])
def test_a_stage_is_named_to_be_computed_anew(command: str, config: str, api: StubApi) -> None:
    for stage in ("corpus", "fit", "prefilter", "query", "score"):
        assert main([command, config, "--restart", stage]) == 0
    assert [call[3] for call in api.calls] == ["corpus", "fit", "prefilter", "query", "score"]


def test_a_stage_that_cannot_be_computed_anew_is_refused(
    config: str, api: StubApi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", config, "--restart", "scores"]) == 2
    assert "'score'" in one_line(capsys.readouterr().err)
    assert not api.calls


# ---------------------------------------------------------------------------------------------- demo


@pytest.mark.parametrize("code", [0, 1])
def test_demo_passes_its_check_on_as_exit_code(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    stub = SimpleNamespace(main=lambda folder, backend, console: asked.append((folder, backend)) or code)
    monkeypatch.setitem(sys.modules, "raylux.demo", stub)
    monkeypatch.setattr(raylux, "demo", stub, raising=False)
    assert main(["demo", "--folder", "elsewhere", "--backend", "local"]) == code
    assert asked == [("elsewhere", "local")]
