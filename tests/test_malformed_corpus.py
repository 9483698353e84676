"""Corpora that are wrong: each ends in one line with the file, the row or line, and the fault."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylux import sources
from raylux.corpus import Sequences
from tests.corpora import load
from tests.malformed import Case, case, refused, table

GOOD = b'{"text": "the fox"}\n'
LONG = GOOD * 2000
NUL = "\u0000".encode()


def tokens(**row: Any) -> bytes:
    return json.dumps(row).encode()


def column(values: Any, name: str = "text", **more: Any) -> pa.Table:
    return pa.table({name: values, **more})


# A text column whose bytes are no UTF-8, as a careless writer makes it.
ENDS = bytes([0, 0, 0, 0, 7, 0, 0, 0, 11, 0, 0, 0])
LATIN = pa.StringArray.from_buffers(2, pa.py_buffer(ENDS), pa.py_buffer(b"the foxcaf\xe9"))
TWO = pa.Table.from_arrays([pa.array(["the fox"]), pa.array(["a dog"])], names=["text", "text"])

LINES = (
    case("jsonl: a key twice", b'{"text": "a", "text": "the fox"}', "line 1", "'text' comes twice"),
    case("jsonl: a NUL", GOOD + b'{"text": "a' + NUL + b'"}', "line 2", "NUL (byte 11)"),
    case("jsonl: a raw line break", GOOD + b'{"text": "a\n"}', "line 2", "not valid JSON"),
    case("jsonl: two rows on a line", GOOD.strip() + b" " + GOOD, "line 1", "Extra data"),
    case("jsonl: a comma at the end", GOOD.strip() + b",\n", "line 1", "Extra data"),
    case("jsonl: single quotes", b"{'text': 'the fox'}", "line 1", "double quotes"),
    case("jsonl: an array", b"[" + GOOD.strip() + b"]", "line 1", "not a list"),
    case("jsonl: null", GOOD + b"null", "line 2", "not null"),
    case("jsonl: a number", GOOD + b"7", "line 2", "not an int (7)"),
    case("jsonl: text", b'"the fox"', "line 1", "not text"),
    case("jsonl: cut in mid-line", LONG[:-9], "line 2000", "not valid JSON"),
    case("jsonl: UTF-16", "the fox".encode("utf-16"), "line 1", "NUL"),
    case("jsonl: a number of 5,000 digits", b'{"text": "a b", "n": ' + b"9" * 5000 + b"}", "line 1", "digits"),
    case("jsonl: 100,000 brackets", b"[" * 100_000, "line 1", "nested too deeply"),
    case("jsonl: 100,000 objects", b'{"a":' * 100_000, "line 1", "nested too deeply"),
    case("jsonl: text is true", b'{"text": true}', "line 1", "true or false (True)"),
    case("jsonl: text is a number", b'{"text": 1.5}', "line 1", "must be text, not a float (1.5)"),
    case("jsonl: text is a huge number", b'{"text": ' + b"9" * 4000 + b"}", "line 1", "bits"),
    case("jsonl: text is a list", b'{"text": ["the fox"]}', "line 1", "not a list"),
    case("jsonl: text is an object", b'{"text": {"en": "the fox"}}', "line 1", "not an object"),
    case("jsonl: text is NaN", b'{"text": NaN}', "line 1", "a float (nan)"),
    case("jsonl: blank text", b'{"text": "\\n\\t \\u3000"}', "line 1", "empty"),
    case("jsonl: no fields", b"{}", "line 1", "fields present: none"),
    case("jsonl: another case", b'{"Text": "the fox"}', "line 1", "no field 'text'", "Text"),
    case("jsonl: an HTML page", b"<!DOCTYPE html>\n<html>", "line 1", "not valid JSON"),
    case("jsonl: a pointer of Git LFS", b"version https://git-lfs\noid sha256:0\n", "line 1", "not valid JSON"),
    case("id: half a character", b'{"text": "a b", "i": "x\\ud800"}', "line 1", "U+D800", id="i"),
    case("id: a line break", b'{"text": "a b", "i": "x\\ny"}', "line 1", "U+000A", id="i"),
    case("id: an escape sequence", b'{"text": "a b", "i": "\\u001b[2J"}', "line 1", "U+001B", id="i"),
    case("id: a NUL", b'{"text": "a b", "i": "\\u0000"}', "line 1", "U+0000", id="i"),
    case("id: blank", b'{"text": "a b", "i": " "}', "line 1", "is blank", id="i"),
    case("id: empty", b'{"text": "a b", "i": ""}', "line 1", "not empty text", id="i"),
    case("id: null", b'{"text": "a b", "i": null}', "line 1", "no field 'i'", id="i"),
    case("id: true", b'{"text": "a b", "i": true}', "line 1", "true or false", id="i"),
    case("id: a list", b'{"text": "a b", "i": [1]}', "line 1", "not a list", id="i"),
    case("id: a megabyte", b'{"text": "a b", "i": "' + b"x" * 10**6 + b'"}', "1,000,000 characters", id="i"),
    case("id: 1 and '1'", b'{"text": "a b", "i": 1}\n{"text": "a b", "i": "1"}', "line 2", "'1' was already", id="i"),
    case("keep: half a character", b'{"text": "a b", "k": "\\udc00"}', "'k'", "half a surrogate", keep="k"),
    case("keep: half one within", b'{"text": "a b", "k": [{"x": "\\ud800"}]}', "half a surrogate", keep="k"),
    case("keep: no such field", GOOD, "no row has the field 'k'", keep="k"),
    case("keep: a column of raylux", GOOD, "'influence' is the name of a column", keep="influence"),
)

TOKENS = (
    case("empty", tokens(input_ids=[]) + b"\n" + GOOD, "line 1", "input_ids are empty"),
    case("beyond the vocabulary", tokens(input_ids=[5, 300]), "token 300 at position 1", "vocabulary of 300"),
    case("negative", tokens(input_ids=[-100, 5]), "token -100 at position 0"),
    case("2^31", tokens(input_ids=[5, 2**31]), "2147483648 at position 1"),
    case("2^64 + 5", tokens(input_ids=[5, 2**64 + 5]), "18446744073709551621 at position 1"),
    case("of 4,000 digits", tokens(input_ids=[5, 10**4000]), "bits", "position 1"),
    case("a float", tokens(input_ids=[5.0, 6]), "position 0 is a float (5.0)"),
    case("NaN", b'{"input_ids": [NaN, 5]}', "position 0 is a float (nan)"),
    case("infinity", b'{"input_ids": [5, 1e999]}', "position 1 is a float (inf)"),
    case("true", tokens(input_ids=[5, True]), "position 1 is true or false"),
    case("text", tokens(input_ids=["5", "6"]), "position 0 is text"),
    case("null", tokens(input_ids=[5, None]), "position 1 is null"),
    case("nested", tokens(input_ids=[[5, 6]]), "position 0 is a list"),
    case("an object", tokens(input_ids={"0": 5}), "not an object"),
    case("a number", tokens(input_ids=5), "not an int (5)"),
    case("one text", tokens(input_ids="5 6 7"), "not text"),
    case("one token", tokens(input_ids=[5]), "no sequence with a token to predict", "sequences_short: 1"),
    case("labels: too many", tokens(input_ids=[5, 6], labels=[5, 6, 7]), "3 labels for 2 input_ids"),
    case("labels: empty", tokens(input_ids=[5, 6], labels=[]), "0 labels for 2"),
    case("labels: other tokens", tokens(input_ids=[5, 6], labels=[-100, 7]), "label 7 at position 1"),
    case("labels: another mark", tokens(input_ids=[5, 6], labels=[-1, 6]), "label -1 at position 0"),
    case("labels: all -100", tokens(input_ids=[5, 6], labels=[-100, -100]), "sequences_unlabelled: 1"),
    case("labels: only the first", tokens(input_ids=[5, 6], labels=[5, -100]), "sequences_unlabelled: 1"),
    case("labels: a float", tokens(input_ids=[5, 6], labels=[-100, 6.0]), "labels", "position 1 is a float"),
    case("labels: huge", tokens(input_ids=[5, 6], labels=[-100, 2**40]), "labels", "1099511627776"),
    case("labels: text", tokens(input_ids=[5, 6], labels="56"), "labels must be a list"),
    case("mask: a hole", tokens(input_ids=[5, 6, 7], attention_mask=[1, 0, 1]), "one run of 1"),
    case("mask: a 2", tokens(input_ids=[5, 6, 7], attention_mask=[1, 2, 1]), "one run of 1"),
    case("mask: negative", tokens(input_ids=[5, 6], attention_mask=[1, -1]), "one run of 1"),
    case("mask: nothing", tokens(input_ids=[5, 6], attention_mask=[0, 0]), "one run of 1"),
    case("mask: too long", tokens(input_ids=[5, 6], attention_mask=[1, 1, 1]), "3 values for 2 input_ids"),
    case("mask: floats", tokens(input_ids=[5, 6], attention_mask=[1.0, 1.0]), "attention_mask", "a float"),
)

PARQUET = (
    case("numbers", column([1, 2]), "row 0", "not an int (1)"),
    case("floats", column([1.5]), "row 0", "not a float (1.5)"),
    case("bytes", column([b"the fox"]), "row 0", "not a bytes"),
    case("decimals", column([Decimal("1.5")]), "row 0", "not a Decimal"),
    case("dates", column(pa.array([0], pa.date32())), "row 0", "not a date"),
    case("a null among texts", column(["the fox", None]), "row 1", "not null"),
    case("only nulls", column(pa.nulls(2)), "row 0", "not null"),
    case("lists", column([["the fox"]]), "row 0", "not a list"),
    case("structs", column([{"en": "the fox"}]), "row 0", "not an object"),
    case("a dictionary with nulls", column(pa.array(["the fox", None]).dictionary_encode()), "row 1", "not null"),
    case("zero rows", column(pa.array([], pa.string())), "the corpus is empty"),
    case("zero columns", pa.table({}), "no column 'text'", "columns: none"),
    case("another column", column(["the fox"], "body"), "no column 'text'; columns: body"),
    case("a column twice", TWO, "two columns are called 'text'"),
    case("text that is no UTF-8", column(LATIN), "not a readable parquet file", "UnicodeDecodeError"),
    case("a date beyond the calendar", column(["a b"], k=pa.array([2**62], pa.timestamp("us"))), "date", keep="k"),
    case("tokens as floats", column([[5.0, 6.0]], "input_ids"), "row 0", "position 0 is a float (5.0)"),
    case("tokens with a null", column([[5, None]], "input_ids"), "row 0", "position 1 is null"),
    case("tokens as bytes", column([b"\5\6"], "input_ids"), "row 0", "not a bytes"),
    case("tokens as uint64", column(pa.array([[2**63, 5]], pa.list_(pa.uint64())), "input_ids"), "no token id"),
    case("tokens nested", column([[[5, 6]]], "input_ids"), "row 0", "position 0 is a list"),
    case("tokens as structs", column([[{"id": 5}]], "input_ids"), "row 0", "position 0 is an object"),
    case("tokens empty", column([[], [5, 6]], "input_ids"), "row 0", "input_ids are empty"),
    case("neither text nor tokens", column([None], "input_ids", text=pa.nulls(1)), "row 0", "not null"),
    case("an id of bytes", column(["a b"], i=[b"x"]), "row 0", "not a bytes", id="i"),
    case("an id of a float", column(["a b"], i=[1.0]), "row 0", "a float (1.0)", id="i"),
    case("an id that is null", column(["a b", "b c"], i=["x", None]), "row 1", "no field 'i'", id="i"),
    case("no such id", column(["a b"]), "row 0", "no field 'i'", id="i"),
    case("a path into a struct", column([{"b": "x y"}], "a"), "no column 'a.b'; columns: a", text="a.b"),
)

# Name of the file, its bytes.
BYTES = (
    case("a.json: empty", b"", "not valid JSON"),
    case("a.json: a number", b"7", "array of objects", "an int (7)"),
    case("a.json: NaN", b"NaN", "a float (nan)"),
    case("a.json: texts", b'["the fox"]', "row 0", "not text"),
    case("a.json: a list of lists", b"[[]]", "row 0", "not a list"),
    case("a.json: nothing in an object", b"{}", "the corpus is empty"),
    case("a.json: a key twice", b'{"a": {"text": "x y"}, "a": {"text": "y z"}}', "'a' comes twice"),
    case("a.json: a key of half a character", b'{"\\ud800": {"text": "x y"}}', "U+D800"),
    case("a.json: an empty key", b'{"": {"text": "x y"}}', "not empty text"),
    case("a.json: cut", b'[{"text": "the fox"},', "not valid JSON"),
    case("a.json: UTF-16", "[]".encode("utf-16"), "NUL"),
    case("a.json: UTF-32", "[]".encode("utf-32-be"), "NUL (byte 0)"),
    case("a.json: brackets", b"[" * 10**6, "nested too deeply"),
    case("a.txt: a binary file", b"PK\3\4\0\0", "NUL (byte 4)"),
    case("a.txt: UTF-16 without a mark", "the fox".encode("utf-16-le"), "NUL (byte 1)"),
    case("a.txt: an overlong form", b"the \xc0\xaf", "not UTF-8", "byte 4"),
    case("a.txt: half a character", b"\xed\xa0\x80", "not UTF-8", "byte 0"),
    case("a.txt: cut in a character", "the fé".encode()[:-1], "not UTF-8", "byte 5"),
    case("a.txt: blank", b" \n\t", "is empty"),
    case("a.jsonl.gz: cut", gzip.compress(LONG)[:-20], "cannot be read"),
    case("a.jsonl.gz: another sum", gzip.compress(LONG)[:-8] + b"\0" * 8, "CRC"),
    case("a.jsonl.gz: bits flipped", gzip.compress(LONG)[:10] + b"\xff" * 90, "cannot be read"),
    case("a.jsonl.gz: empty", b"", "the corpus is empty"),
    case("a.jsonl.gz: not packed", GOOD, "Not a gzipped file"),
    case("a.jsonl.bz2: cut", bz2.compress(LONG)[:-20], "cannot be read"),
    case("a.jsonl.bz2: not packed", GOOD, "cannot be read"),
    case("a.jsonl.xz: cut", lzma.compress(LONG)[:-20], "cannot be read"),
    case("a.jsonl.xz: not packed", GOOD * 9, "cannot be read"),
    case("a.jsonl.xz: bits flipped", lzma.compress(LONG)[:30] + b"\xff" * 90, "cannot be read"),
    case("a.jsonl.zip: an archive", b"PK\3\4", "cannot tell the format"),
    case("a.csv: a table", b"text\nthe fox\n", "cannot tell the format"),
    case("a: no suffix", GOOD, "cannot tell the format"),
    case("a.pkl: a pickle", b"\x80\x04N.", "cannot tell the format"),
    case("a.parquet: empty", b"", "not a readable parquet file", "0 bytes"),
    case("a.parquet: jsonl", LONG, "not a readable parquet file"),
    case("a.parquet: both ends", b"PAR1" + b"\xff" * 40 + b"\xff\xff\xff\x7fPAR1", "not a readable parquet file"),
    case("a.parquet: an encrypted footer", b"PAR1" + bytes(40) + b"\x10\0\0\0PARE", "not a readable parquet file"),
)


def write(path: Path, content: bytes | pa.Table) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(content, path)
    return path


@table(*LINES)
def test_lines(case: Case, tmp_path: Path) -> None:
    refused(lambda: load(write(tmp_path / "a.jsonl", case.content), **case.options), *case.says)


@table(*TOKENS)
def test_tokens(case: Case, tmp_path: Path) -> None:
    refused(lambda: load(write(tmp_path / "a.jsonl", case.content)), "a.jsonl", *case.says)


@table(*PARQUET)
def test_parquet(case: Case, tmp_path: Path) -> None:
    refused(lambda: load(write(tmp_path / "a.parquet", case.content), **case.options), "a.parquet", *case.says)


@table(*BYTES)
def test_bytes(case: Case, tmp_path: Path) -> None:
    name = case.name.split(":")[0]
    refused(lambda: load(write(tmp_path / name, case.content)), name, *case.says)


@pytest.mark.parametrize("part", ["footer", "half", "last byte"])
def test_a_cut_parquet_file(part: str, tmp_path: Path) -> None:
    whole = write(tmp_path / "a.parquet", column(["the fox"] * 999)).read_bytes()
    end = {"footer": len(whole) - 30, "half": len(whole) // 2, "last byte": len(whole) - 1}[part]
    refused(lambda: load(write(tmp_path / "a.parquet", whole[:end])), "a.parquet: not a readable parquet file")


def test_a_bad_row_far_into_a_parquet_file_is_counted(tmp_path: Path) -> None:
    rows = pa.table({"text": ["the fox"] * 1500 + [None]})
    refused(lambda: load(write(tmp_path / "a.parquet", rows)), "a.parquet row 1500", "not null")


def test_places_that_are_no_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo("pipe.jsonl")
    for name in ("pipes", "links"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.jsonl", GOOD)
    os.mkfifo("pipes/b.jsonl")
    (tmp_path / "links" / "b.jsonl").symlink_to("nowhere")
    for path, says in {
        "pipe.jsonl": "neither a file nor a folder",
        "/dev/zero": "neither a file nor a folder",
        "link.jsonl": "neither a file nor a folder",
        "loop": "neither a file nor a folder",
        "pipes": "b.jsonl: is a pipe or a device",
        "links": "links: cannot be listed",
        "~nobody_of_this_name/a.jsonl": "no such file or folder",
        "x" * 5000 + ".jsonl": "no such file or folder",
        "http://[bad/a.jsonl": "cannot be listed",
        "nosuch://a.jsonl": "cannot be listed",
        "memory://nothing.jsonl": "no such file or folder",
        "[": "the pattern matches no file",
        "**/*.nope": "the pattern matches no file",
        "../*/../nope/a.jsonl": "the pattern matches no file",
    }.items():
        refused(lambda path=path: load(path), says)


def test_a_line_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_LINE_LIMIT", 1000)
    packed = gzip.compress(GOOD + b"x" * 5000)
    refused(lambda: load(write(tmp_path / "a.jsonl.gz", packed)), "a.jsonl.gz line 2: longer than 1,000 bytes")


def test_a_compression_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.fsspec.utils, "compressions", {"gz": "gzip"})
    refused(lambda: load(write(tmp_path / "a.jsonl.zst", b"(\xb5/\xfd")), "a.jsonl.zst", "package")


def test_what_is_odd_but_right_is_read(tmp_path: Path) -> None:
    def read(content: bytes, **options: Any) -> Sequences:
        return load(write(tmp_path / "a.jsonl", content), **options)

    assert read(b"\xef\xbb\xbf\n\r\n" + GOOD.strip() + b"\r\n\n").table["text"].tolist() == ["the fox"]
    assert read(b'{"text": "a\\u0000b"}').table["text"].tolist() == ["a\0b"]
    assert read(b'{"text": "x y", "i": "../../x"}', id="i").table["sequence"].tolist() == ["../../x"]
    assert read(b'{"text": "x y", "i": "\xc3\xa9 \xe6\xbc\xa2|:,"}', id="i").table["sequence"].tolist() == ["é 漢|:,"]
    padded = read(tokens(input_ids=[0, 5, 6, 0], attention_mask=[0, 1, 1, 0]))
    assert padded.row(0)[0].tolist() == [5, 6]
    write(tmp_path / "a.parquet", column(pa.array(["the fox"] * 3).dictionary_encode()))
    assert len(load(tmp_path / "a.parquet")) == 3
