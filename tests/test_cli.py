"""The command line: help, exit codes, one line per mishap, and output that programs can read."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

import raylux
from raylux.cli import main
from raylux.errors import MissingStageError, NumericsError, UserError
from raylux.health import Quarantined
from raylux.profiling import Spent
from raylux.report.profile import StageTime
from raylux.shown import plain

COMMANDS = (
    *("run", "fit", "prefilter", "query", "score", "report", "top", "inspect", "models", "demo", "doctor", "plan"),
    *("submit", "status", "stop"),
)
STAGES = ("corpus", "fit", "prefilter", "query", "score", "report")
ROOT = Path(__file__).parent.parent
ESCAPES = "red \x1b[31m title \x1b]0;owned\x07 and \x9b2J"


@dataclass
class StubRun:
    """A run of two queries with three sequences each; the second text tries to steer the terminal."""

    folder: str = "runs/stub"
    unit: str = "nats"
    queries: list[str] = field(default_factory=lambda: ["boat", "piano"])
    missing: tuple[str, ...] = ()
    quarantined: list[Quarantined] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    mixed: dict[str, list[str]] = field(default_factory=dict)
    times: list[StageTime] = field(default_factory=list)

    def profile(self) -> list[StageTime]:
        return self.times

    def problems(self, checksums: bool) -> list[str]:
        assert checksums
        return self.damaged

    def mixed_numerics(self) -> dict[str, list[str]]:
        return self.mixed

    def top(self, query: str, k: int = 10, by: str = "sequence") -> pd.DataFrame:
        frame = pd.DataFrame(
            {
                "rank": [1, 2, 3],
                "sequence": ["a:0", "b:0", "c:0"],
                "influence": np.array([1 / 3, 1e-17, -2.5]),
                "prefilter": [7.25, np.nan, 0.1],
                "unit": ["kept", "by", "user"],
                "text": [f"{query} by {by}", ESCAPES, 'two\nlines, "quoted"'],
            }
        )
        return frame.head(k)

    def status(self) -> list[Any]:
        return [
            SimpleNamespace(
                name=name, done=name not in self.missing, detail="2 units", command=f"raylux {name} stub.yaml"
            )
            for name in STAGES
        ]


@dataclass
class StubApi:
    """Stands in for ``raylux.api``: records the stages asked for, and ends as it is told to."""

    run: Any = field(default_factory=StubRun)
    error: BaseException | None = None
    calls: list[Any] = field(default_factory=list)

    def run_stages(
        self, config: Any, stages: Any = None, config_path: str | None = None, restart: str | None = None
    ) -> Any:
        self.calls.append((config, stages, config_path, restart))
        if self.error is not None:
            raise self.error
        return self.run

    def open_run(self, path: str) -> Any:
        self.calls.append(path)
        if self.error is not None:
            raise self.error
        return self.run


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> StubApi:
    stub = StubApi()
    monkeypatch.setitem(sys.modules, "raylux.api", stub)
    monkeypatch.setattr(raylux, "api", stub, raising=False)
    monkeypatch.delenv("RAYLUX_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    return stub


@pytest.fixture
def config(tmp_path: Path) -> str:
    return _write(
        tmp_path / "config.yaml",
        {
            "run": {"folder": str(tmp_path / "run")},
            "model": {"path": str(tmp_path / "model")},
            "corpus": {"path": str(tmp_path / "corpus.jsonl")},
            "queries": {"path": str(tmp_path / "queries.yaml")},
        },
    )


def _write(path: Path, content: Any) -> str:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def _one_line(text: str) -> str:
    """The one line of stderr; no second one, no traceback."""
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text.rstrip("\n")


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
    line = _one_line(capsys.readouterr().err)
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
    line = _one_line(capsys.readouterr().err)
    assert all(part in line for part in parts), line
    assert not api.calls


def test_broken_config_files_end_in_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    for content in (b"run: [", b"\xff\xfe", b"- a list", b"", b"run: {}"):
        path.write_bytes(content)
        assert main(["run", str(path)]) == 2
        assert str(path) in _one_line(capsys.readouterr().err)


def test_unknown_query_names_the_nearest(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "RUN", "--query", "bout"]) == 2
    assert "did you mean 'boat'?" in _one_line(capsys.readouterr().err)
    assert main(["top", "RUN", "--query", "zzz"]) == 2
    assert "known: boat, piano" in _one_line(capsys.readouterr().err)


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
        assert _one_line(capsys.readouterr().err) == f"raylux: error: {error}"


def test_an_error_message_cannot_steer_the_terminal(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.error = UserError(f"bad id {ESCAPES}\nsecond line")
    assert main(["inspect", "RUN"]) == 2
    line = _one_line(capsys.readouterr().err)
    assert line.isprintable()
    assert "second line" in line


def test_an_internal_error_keeps_its_traceback_in_a_file(
    config: str, api: StubApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    api.error = ZeroDivisionError("nobody foresaw this")
    assert main(["run", config]) == 1
    line = _one_line(capsys.readouterr().err)
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
    assert _one_line(capsys.readouterr().err) == expected


GIVEN_UP = Quarantined("score", "u000003", tuple(f"s{place}{ESCAPES}" for place in range(7)), 3, f"killed {ESCAPES}")


def test_quarantined_units_end_in_3(config: str, api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    for units, said in (([GIVEN_UP], "1 unit is quarantined"), ([GIVEN_UP] * 2, "2 units are quarantined")):
        api.run.quarantined = units
        assert main(["score", config]) == 3
        line = _one_line(capsys.readouterr().err)
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
    assert "'score'" in _one_line(capsys.readouterr().err)
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


# ----------------------------------------------------------------------------------------------- top


def test_top_json_is_a_list_of_records_with_unit_and_sign(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "RUN", "--query", "boat", "--format", "json", "--by", "document"]) == 0
    text = capsys.readouterr().out
    assert text.replace("\n", "").isprintable()
    records = json.loads(text)
    assert [record["rank"] for record in records] == [1, 2, 3]
    assert records[0]["influence"] == 1 / 3  # every digit
    assert records[1]["prefilter"] is None
    assert records[0]["text"] == "boat by document"
    assert records[1]["text"] == ESCAPES  # lossless
    assert {record["unit"] for record in records} == {"nats"}
    assert all(record["sign"].startswith("positive") for record in records)
    assert [record["kept.unit"] for record in records] == ["kept", "by", "user"]


def test_top_without_a_query_holds_all_queries(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "RUN", "-k", "2", "--format", "json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["query"] for record in records] == ["boat", "boat", "piano", "piano"]


def test_top_csv_has_one_header_and_full_precision(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "RUN", "--format", "csv"]) == 0
    text = capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 6
    assert next(iter(rows[0])) == "query"
    assert float(rows[0]["influence"]) == 1 / 3
    assert float(rows[1]["influence"]) == 1e-17
    assert rows[0]["unit"] == "nats"
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "owned" in rows[1]["text"]  # escaped, not dropped


def test_top_table_shows_unit_and_no_escape_sequence(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "RUN", "--query", "boat"]) == 0
    text = capsys.readouterr().out
    assert "nats" in text
    assert "boat by sequence" in text
    assert "piano" not in text
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "\x07" not in text


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    """A reader that stops early, with far more output than a pipe holds."""
    script = tmp_path / "many.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import raylux, test_cli\n"
        "stub = test_cli.StubApi()\n"
        "stub.run.queries = [f'q{i}' for i in range(300)]\n"
        "sys.modules['raylux.api'] = raylux.api = stub\n"
        "sys.exit(raylux.cli.main(['top', 'RUN', '--format', sys.argv[1]]))\n",
        encoding="utf-8",
    )
    for form in ("json", "csv", "table"):
        process = subprocess.Popen(
            [sys.executable, str(script), form], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        with process.stderr as stderr:
            assert stderr.read() == ""
        assert process.wait(timeout=60) == 0


# -------------------------------------------------------------------------------------------- models


@pytest.fixture
def model_config(config: str, tmp_path: Path) -> str:
    """A config whose model is a tiny GPT-2 on disk, with a tokenizer of whole words and two queries."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    from tests.architectures import build  # torch, which the other tests do without

    words = ["<s>", "<pad>", "the", "boat", "sank", "piano", "played", "itself"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    build("gpt2", vocab=len(words)).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<pad>").save_pretrained(
        tmp_path / "model"
    )
    queries = [
        {"id": "boat", "prompt": "the boat", "completion": "sank"},
        {"id": "piano", "prompt": "the piano", "completion": "played itself"},
    ]
    _write(tmp_path / "queries.yaml", queries)
    return config


def test_models_shows_coverage_and_the_split_of_a_query(
    model_config: str, api: StubApi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", model_config, "--query", "piano"]) == 0
    text = capsys.readouterr().out
    assert "transformer.h.0.mlp.c_fc" in text
    assert "transformer.h.1.mlp.c_proj" in text
    assert "% of " in text
    assert "skipped: " in text
    assert "attn" in text
    assert "played" in text
    assert "sank" not in text


def test_models_reports_bad_input_in_one_line(
    model_config: str, api: StubApi, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "model.layers=[no.such.*]": "no.such.*",
        f"model.path={os.devnull}/nowhere": "nowhere",
        "queries.path=no-such.yaml": "no-such.yaml",
    }
    for override, part in cases.items():
        assert main(["models", model_config, override]) == 2
        assert part in _one_line(capsys.readouterr().err)
