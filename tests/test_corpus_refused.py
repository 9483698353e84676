"""One line for every corpus that cannot be read, with file and row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from raylux.corpus import build_sequences
from raylux.errors import UserError
from raylux.readers import Document
from tests.corpora import (
    LINES,
    PLAIN,
    ROWS,
    VOCABULARY,
    check_rows,
    load,
    section,
    write_jsonl,
)

GOOD = '{"text": "the fox"}\n'
BAD_FILES = {
    "empty file": ("a.jsonl", b"", {}, r"a\.jsonl: the corpus is empty"),
    "empty array": ("a.json", b"[]", {}, r"a\.json: the corpus is empty"),
    "only short": ("a.jsonl", b'{"text": "x"}', {}, r"no sequence .* left of 1 documents \(sequences_short: 1"),
    "no field": ("a.jsonl", GOOD.encode() + b'{"body": "x", "n": 1}', {}, r"line 2: no field 'text'.*: body, n"),
    "no field in json": ("a.json", b'[{"text": "the fox"}, {"n": 1}]', {}, r"a\.json row 1: no field 'text'.*: n"),
    "text is no text": ("a.jsonl", b'{"text": 3}', {}, r"line 1: the field 'text' must be text, not an int \(3\)"),
    "text is null": ("a.jsonl", b'{"text": null}', {}, r"line 1: the field 'text' must be text, not null"),
    "empty text": ("a.jsonl", GOOD.encode() + b'{"text": " "}', {}, r"line 2: the text in 'text' is empty"),
    "empty text file": ("a.txt", b"", {}, r"a\.txt: the text in 'text' is empty"),
    "broken json line": ("a.jsonl", GOOD.encode() + b'\n{"text": "x"', {}, r"line 3: not valid JSON at column 13"),
    "broken json": ("a.json", b'[{"text": "x"},\n{"text"}]', {}, r"a\.json: not valid JSON at line 2, column 8"),
    "lines named json": (
        "a.json",
        GOOD.encode() * 2,
        {},
        r"Extra data; one object per line\? then its format is jsonl",
    ),
    "json of no rows": ("a.json", b'{"a": 1}', {}, r"must hold an array of objects"),
    "row is a list": ("a.jsonl", b"[1, 2]", {}, r"line 1: a row must be an object with fields, not a list"),
    "not UTF-8 jsonl": ("a.jsonl", GOOD.encode() + b'{"text": "\xe9"}', {}, r"line 2: not UTF-8 text \(byte 10\)"),
    "not UTF-8 json": ("a.json", b'[{"text": "\xe9"}]', {}, r"a\.json: not UTF-8 text \(byte 11\)"),
    "not UTF-8 text": ("a.txt", b"caf\xe9", {}, r"a\.txt: not UTF-8 text \(byte 3\)"),
    "half a character": ("a.jsonl", b'{"text": "ab\\ud800"}', {}, r"line 1: .* half a surrogate pair at character 2"),
    "no id": ("a.jsonl", GOOD.encode(), {"id": "name"}, r"line 1: no field 'name' for the id.*: text"),
    "id of a bad type": ("a.jsonl", b'{"text": "x", "id": 1.5}', {"id": "id"}, r"line 1: the id in 'id' must be"),
    "same id": (
        "a.jsonl",
        b'{"text": "the fox", "i": "u"}\n{"text": "a dog", "i": "v"}\n{"text": "a dog", "i": "u"}',
        {"id": "i"},
        r"a\.jsonl line 3: the id 'u' was already used by .*a\.jsonl line 1",
    ),
    "same sequence id": (
        "a.jsonl",
        b'{"text": "the quick brown fox", "i": "u"}\n{"text": "a", "i": "v"}\n{"text": "a dog", "i": "u:1"}',
        {"id": "i", "max_length": 2},
        r"sequence id 'u:1' comes twice, from the documents 'u' and 'u:1'",
    ),
    "token too large": ("a.jsonl", b'{"input_ids": [5, 300]}', {}, r"line 1: token 300 at position 1 .* of 300"),
    "token negative": ("a.jsonl", b'{"input_ids": [5, -1]}', {}, r"line 1: token -1 at position 1"),
    "token huge": ("a.jsonl", b'{"input_ids": [5, 99999999999]}', {}, r"line 1: input_ids: 99999999999 at position 1"),
    "tokens no list": ("a.jsonl", b'{"input_ids": "5 6"}', {}, r"line 1: input_ids must be a list .* not text"),
    "tokens no numbers": (
        "a.jsonl",
        b'{"input_ids": [5, 6.5]}',
        {},
        r"input_ids must be whole .* position 1 is a float",
    ),
    "labels too few": ("a.jsonl", b'{"input_ids": [5, 6], "labels": [6]}', {}, r"line 1: 1 labels for 2 input_ids"),
    "labels shifted": (
        "a.jsonl",
        b'{"input_ids": [5, 6, 7], "labels": [6, 7, -100]}',
        {},
        r"label 6 at position 0 is nei",
    ),
    "mask too short": (
        "a.jsonl",
        b'{"input_ids": [5, 6], "attention_mask": [1]}',
        {},
        r"attention_mask has 1 values for 2",
    ),
    "broken parquet": ("a.parquet", b"PAR1 no", {}, r"a\.parquet: not a readable parquet file"),
    "unknown suffix": ("a.dat", b"x", {}, r"cannot tell the format .* set corpus.format"),
    "broken gzip": ("a.jsonl.gz", b"no gzip", {}, r"cannot be read"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_end_in_one_line_with_file_and_row(tmp_path: Path, case: str) -> None:
    name, content, values, said = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        load(tmp_path / name, **values)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("path", "values", "said"),
    [
        ("missing.jsonl", {}, "no such file or folder"),
        ("./missing", {}, "no such file or folder"),
        ("missing", {"format": "text"}, "no such file or folder"),
        ("*.jsonl", {}, "the pattern matches no file"),
        ("package://nosuchpackage_x/a.json", {}, "is not installed"),
        ("s3://bucket/rows", {"format": "hub"}, "not a URL"),
    ],
)
def test_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, values: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        load(path, **values)


@pytest.mark.parametrize("values", [{}, {"format": "hub"}, {"limit": 3}], ids=["auto", "hub", "limit"])
def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the data set hub cannot be reached") as caught:
        load("nobody/nosuchdataset", **values)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_text_column_names_its_columns(tmp_path: Path) -> None:
    pd.DataFrame({"body": ["x"], "n": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'text'; columns: body, n"):
        load(tmp_path / "a.parquet")


def test_a_parquet_file_cut_short(tmp_path: Path) -> None:
    pd.DataFrame({"text": LINES * 100}).to_parquet(tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:60] = b"\xff" * 56  # the footer is whole, the first page is not
    (tmp_path / "a.parquet").write_bytes(bytes(content))
    with pytest.raises(UserError, match="not a readable parquet file"):
        load(tmp_path / "a.parquet")


def test_a_folder_of_several_formats_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(UserError, match=r"several formats \(jsonl, text\)"):
        load(tmp_path)
    check_rows(load(tmp_path / "*.jsonl"), ["0", "1", "2"])


def test_max_length_beyond_the_context_says_both() -> None:
    documents = [Document("a", "the fox")]
    with pytest.raises(UserError, match="max_length = 64 is longer than the model's context of 32"):
        build_sequences(documents, section(max_length=64), PLAIN, VOCABULARY, context=32)
    assert len(build_sequences(documents, section(max_length=32), PLAIN, VOCABULARY, context=32)) == 1


def test_a_tokenizer_of_another_model_is_noticed() -> None:
    with pytest.raises(UserError, match="vocabulary of 10; do tokenizer and model belong together"):
        build_sequences([Document("a", "the fox")], section(), PLAIN, 10, context=None)
