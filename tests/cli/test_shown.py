"""What the command line prints: output that programs can read, and tables for people."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raylux.cli import main
from tests.cli.stubs import ESCAPES, ROOT, StubApi, one_line, write

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


def test_a_segment_of_training_is_said_in_the_place_of_calibration(
    api: StubApi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", "RUN", "--query", "boat"]) == 0
    assert "not calibrated" in capsys.readouterr().out
    api.run.segment = 0.5
    assert main(["top", "RUN", "--query", "boat"]) == 0
    text = capsys.readouterr().out
    assert "calibrated" not in text and "one segment of a training: sizes go by curvature.segment" in text


def test_top_says_what_scores_are_divided_by(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "RUN", "--query", "boat", "--normalise", "step"]) == 0
    text = capsys.readouterr().out
    assert "influence in nats by step" in text and "calibrated" not in text
    assert main(["top", "RUN", "--query", "boat", "--normalise", "step", "--format", "json"]) == 0
    assert {record["unit"] for record in json.loads(capsys.readouterr().out)} == {"nats by step"}


def test_top_by_self_influence_asks_no_query(api: StubApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "RUN", "--by-self-influence", "--format", "json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [(record["rank"], record["sequence"], record["unit"]) for record in records] == [
        (1, "b:0", "nats"),
        (2, "a:0", "nats"),
    ]
    assert records[1]["self_influence"] == 1 / 3
    assert main(["top", "RUN", "--by-self-influence", "-k", "1"]) == 0
    text = capsys.readouterr().out
    assert "b:0" in text and "a:0" not in text and "high" in text and "\x1b" not in text
    for more in (["--query", "boat"], ["--normalise", "norm"], ["--by", "document"], ["RUN2"]):
        assert main(["top", "RUN", *more, "--by-self-influence"]) == 2
        assert "asks no query" in one_line(capsys.readouterr().err)


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    """A reader that stops early, with far more output than a pipe holds."""
    script = tmp_path / "many.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import raylux.cli\n"
        "from tests.cli.stubs import StubApi\n"
        "stub = StubApi()\n"
        "stub.run.queries = [f'q{i}' for i in range(300)]\n"
        "sys.modules['raylux.opening'] = raylux.opening = stub\n"
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
    write(tmp_path / "queries.yaml", queries)
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
        assert part in one_line(capsys.readouterr().err)
