"""Documents to sequences: every format, cutting, packing, labels, and one line for every bad input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from raylux.config import CorpusSection
from raylux.corpus import Sequences, build_sequences, load_corpus
from raylux.errors import UserError
from raylux.readers import Document, documents_from

LINES = ["The quick brown fox jumps over the lazy dog.", "A dog and a fox met; the fox was quick."]


def make_tokenizer(before: str = "", after: str = "", **specials: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens: <s> is 0, </s> is 1; ``before`` and ``after`` surround each text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(LINES * 4, trainer)
    if before or after:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", **specials}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=16, **names)


PLAIN = make_tokenizer()
START = make_tokenizer(before="<s>")
BOTH = make_tokenizer(before="<s>", after="</s>")
VOCABULARY = 300


def section(path: Path | str = "memory", **values: Any) -> CorpusSection:
    return CorpusSection(path=str(path), **values)


def load(path: Path | str, tokenizer: PreTrainedTokenizerFast = PLAIN, **values: Any) -> Sequences:
    return load_corpus(section(path, **values), tokenizer, VOCABULARY, context=None)


def build(documents: list[Document], tokenizer: PreTrainedTokenizerFast = PLAIN, **values: Any) -> Sequences:
    return build_sequences(documents, section(**values), tokenizer, VOCABULARY, context=None)


def tokens_of(sequences: Sequences) -> list[list[int]]:
    return [sequences.row(index)[0].tolist() for index in range(len(sequences))]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = [{"text": text, "name": f"n{i}", "size": i, "tags": ["x", i]} for i, text in enumerate([*LINES, "Ein Fuchs. é"])]


def check_rows(sequences: Sequences, ids: list[str]) -> None:
    """The three rows of ROWS, tokenized as they stand."""
    assert sequences.table["sequence"].tolist() == sequences.table["document"].tolist() == ids
    assert sequences.table["text"].tolist() == [row["text"] for row in ROWS]
    assert tokens_of(sequences) == [PLAIN(row["text"])["input_ids"] for row in ROWS]
    assert sequences.labels is None
    assert sequences.dropped == {}


class TestFormats:
    """The same rows by every road."""

    def test_jsonl_with_blank_lines_and_a_byte_order_mark(self, tmp_path: Path) -> None:
        text = "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS)
        (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
        check_rows(load(tmp_path / "a.jsonl"), ["0", "1", "2"])

    def test_jsonl_packed_with_gzip(self, tmp_path: Path) -> None:
        plain = write_jsonl(tmp_path / "a.jsonl", ROWS)
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
        check_rows(load(tmp_path / "b.jsonl.gz"), ["0", "1", "2"])

    def test_json_array(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
        check_rows(load(tmp_path / "a.json"), ["0", "1", "2"])

    def test_json_object_of_objects_gives_its_keys_as_ids(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text(json.dumps({row["name"]: row for row in ROWS}))
        check_rows(load(tmp_path / "a.json"), ["n0", "n1", "n2"])

    def test_parquet(self, tmp_path: Path) -> None:
        pd.DataFrame(ROWS).drop(columns="tags").to_parquet(tmp_path / "a.parquet")
        check_rows(load(tmp_path / "a.parquet", id="size"), ["0", "1", "2"])

    def test_text_files_of_a_folder_and_a_glob(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        names = ["a.txt", "b.txt", "sub/c.txt"]
        for name, row in zip(names, ROWS, strict=True):
            (tmp_path / name).write_text(str(row["text"]), encoding="utf-8")
        check_rows(load(tmp_path), names)
        check_rows(load(tmp_path / "**" / "*.txt"), names)
        assert load(tmp_path / "a.txt").table["sequence"].tolist() == ["a.txt"]

    def test_several_jsonl_files_number_their_rows_on(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
        write_jsonl(tmp_path / "b.jsonl", ROWS[2:])
        check_rows(load(tmp_path), ["0", "1", "2"])
        check_rows(load(tmp_path / "*.jsonl"), ["0", "1", "2"])

    def test_a_saved_data_set_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        saved = datasets.Dataset.from_list([{"text": row["text"]} for row in ROWS])
        saved.save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "splits")
        check_rows(load(tmp_path / "one"), ["0", "1", "2"])
        check_rows(load(tmp_path / "splits"), ["0", "1", "2"])
        assert len(load(tmp_path / "splits", split="test")) == 1
        with pytest.raises(UserError, match="no split 'dev'; splits: train, test"):
            load(tmp_path / "splits", split="dev")

    def test_a_hub_name_goes_to_datasets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []

        def load_dataset(*args: Any, **options: Any) -> Any:
            asked.append((args, options["split"]))
            return datasets.Dataset.from_list([{"text": row["text"]} for row in ROWS])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        check_rows(load("owner/some-name:part.1"), ["0", "1", "2"])
        check_rows(load("some_name", split="train[:3]"), ["0", "1", "2"])
        assert asked == [(("owner/some-name", "part.1"), "train"), (("some_name", None), "train[:3]")]

    def test_rows_in_memory(self) -> None:
        documents = documents_from([ROWS[0]["text"], ROWS[1], ROWS[2]], section())
        check_rows(build(list(documents)), ["0", "1", "2"])


class TestFields:
    def test_id_limit_and_kept_fields(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", [*ROWS, {"text": "more", "name": "n3"}])
        sequences = load(path, id="name", keep=("size", "tags"), limit=2)
        assert sequences.table["sequence"].tolist() == ["n0", "n1"]
        assert sequences.table.columns.tolist() == ["sequence", "document", "text", "size", "tags"]
        assert sequences.table["size"].tolist() == [0, 1]
        assert sequences.table["tags"].tolist() == ['["x", 0]', '["x", 1]']

    def test_a_kept_field_may_miss_in_some_rows_but_not_in_all(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one two", "x": "a"}, {"text": "three"}])
        assert load(path, keep="x").table["x"].isna().tolist() == [False, True]
        with pytest.raises(UserError, match=r"a\.jsonl: no row has the field 'y'"):
            load(path, keep=("x", "y"))
        with pytest.raises(UserError, match="'text' is the name of a column"):
            load(path, keep="text")

    def test_table_types_after_a_round_trip_through_parquet(self, tmp_path: Path) -> None:
        mixed = [1, "a", None]
        rows = [{**row, "mixed": value, "large": 2**70} for row, value in zip(ROWS, mixed, strict=True)]
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        table = load(path, keep=("size", "tags", "name", "mixed", "large")).table
        assert table["mixed"].tolist()[:2] == ["1", "a"]
        table.to_parquet(tmp_path / "t.parquet")
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), table)


class TestCutting:
    def test_special_tokens_as_the_tokenizer_adds_them(self) -> None:
        ids = tokens_of(build([Document("a", "the fox")], BOTH))[0]
        assert ids == [0, *PLAIN("the fox")["input_ids"], 1]

    @pytest.mark.parametrize("tokenizer", [PLAIN, START, BOTH], ids=["plain", "start", "both"])
    @pytest.mark.parametrize("size", [2, 3, 7, 16])
    def test_pieces_join_to_the_document(self, tokenizer: PreTrainedTokenizerFast, size: int) -> None:
        text = " ".join(LINES) + " é ü 漢字!"
        whole = tokenizer(text)["input_ids"]
        sequences = build([Document("long", text), Document("short", "ab")], tokenizer, max_length=size)
        pieces = [index for index, name in enumerate(sequences.table["document"]) if name == "long"]
        joined = [token for index in pieces for token in sequences.row(index)[0].tolist()]
        lost = sequences.dropped.get("tokens", 0)
        assert joined == whole[: len(joined)]
        assert len(joined) >= len(whole) - lost
        assert sequences.table["sequence"][: len(pieces)].tolist() == [f"long:{k}" for k in range(len(pieces))]
        assert (sequences.lengths() <= size).all()
        assert text.startswith("".join(sequences.table["text"][index] for index in pieces))

    def test_text_of_pieces_is_a_slice_of_the_original(self) -> None:
        text = "The quick brown fox jumps over the lazy dog."
        sequences = build([Document("a", text)], START, max_length=4)
        assert "".join(sequences.table["text"]) == text
        for index, shown in enumerate(sequences.table["text"]):
            assert PLAIN.decode(sequences.row(index)[0], skip_special_tokens=True).strip() == shown.strip()

    def test_a_document_that_fits_keeps_its_id(self) -> None:
        length = len(PLAIN(LINES[0])["input_ids"])
        assert build([Document("a", LINES[0])], max_length=length).table["sequence"].tolist() == ["a"]
        assert build([Document("a", LINES[0])], max_length=length - 2).table["sequence"].tolist() == ["a:0", "a:1"]

    def test_what_is_too_short_is_dropped_and_counted(self) -> None:
        documents = [Document("a", "x"), Document("b", tokens=[5, 6, 7, 8, 9]), Document("c", "the fox")]
        sequences = build(documents, max_length=2)
        assert sequences.table["sequence"].tolist()[:2] == ["b:0", "b:1"]
        assert sequences.dropped == {"sequences_short": 2, "tokens": 2}
        assert len(sequences.offsets) == len(sequences) + 1 == len(sequences.table) + 1

    def test_types_and_labels_of_plain_text(self) -> None:
        sequences = build([Document("a", "the fox"), Document("b", "a dog")])
        assert sequences.tokens.dtype == np.int32
        assert sequences.offsets.dtype == np.int64
        assert sequences.lengths().dtype == np.int64
        tokens, labels = sequences.row(1)
        assert labels.dtype == np.int32
        assert labels.tolist() == [-100, *tokens[1:].tolist()]
        assert sequences.tokens.tolist() == [*sequences.row(0)[0].tolist(), *tokens.tolist()], "row() wrote nothing"

    def test_no_warning_about_the_tokenizers_own_length(self, capfd: pytest.CaptureFixture[str]) -> None:
        build([Document("a", " ".join(LINES * 3))], max_length=300)
        assert "longer than" not in capfd.readouterr().err

    def test_more_documents_than_one_batch(self) -> None:
        texts = [f"dog {n} fox" for n in range(600)]
        sequences = build([Document(str(n), text) for n, text in enumerate(texts)])
        assert tokens_of(sequences) == PLAIN(texts)["input_ids"]


class TestTokenized:
    def test_tokenized_rows(self, tmp_path: Path) -> None:
        rows = [{"input_ids": PLAIN("the fox")["input_ids"], "text": None}, {"input_ids": [5, 6, 7]}]
        sequences = load(write_jsonl(tmp_path / "a.jsonl", rows))
        assert tokens_of(sequences) == [row["input_ids"] for row in rows]
        assert sequences.table["text"][0] == "the fox"
        assert sequences.labels is None

    def test_labels_are_kept_and_plain_rows_beside_them_count_in_full(self, tmp_path: Path) -> None:
        rows = [
            {"input_ids": [5, 6, 7]},
            {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
            {"input_ids": [5, 6], "labels": [5, 6]},
        ]
        sequences = load(write_jsonl(tmp_path / "a.jsonl", rows))
        assert [sequences.row(i)[1].tolist() for i in range(3)] == [[-100, 6, 7], [-100, -100, 7, 8], [-100, 6]]

    def test_parquet_columns(self, tmp_path: Path) -> None:
        frame = pd.DataFrame({"input_ids": [[5, 6, 7]], "labels": [[-100, 6, -100]], "attention_mask": [[1, 1, 1]]})
        frame.to_parquet(tmp_path / "a.parquet")
        sequences = load(tmp_path / "a.parquet")
        assert sequences.row(0)[1].tolist() == [-100, 6, -100]

    def test_padding_marked_by_an_attention_mask_is_left_out(self) -> None:
        row = {"input_ids": [1, 1, 5, 6, 7], "labels": [-100, -100, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]}
        sequences = build(list(documents_from([row], section())))
        assert sequences.row(0)[0].tolist() == [5, 6, 7]
        assert sequences.row(0)[1].tolist() == [-100, 6, 7]

    def test_pieces_without_a_label_are_dropped_and_counted(self) -> None:
        document = Document("a", tokens=[5, 6, 7, 8, 9, 10], labels=[-100, -100, 7, -100, 9, 10])
        sequences = build([document], max_length=2)
        assert sequences.table["sequence"].tolist() == ["a:2"]  # of a:1 only the first position is labelled
        assert sequences.dropped == {"sequences_unlabelled": 2, "tokens": 4}


class TestPacking:
    def test_documents_joined_by_the_end_token(self) -> None:
        documents = [Document("a", tokens=[5, 6, 7]), Document("b", tokens=[8]), Document("c", tokens=[9, 10, 11, 12])]
        sequences = build(documents, max_length=4, pack=True)
        assert tokens_of(sequences) == [[5, 6, 7, 1], [8, 1, 9, 10], [11, 12]]
        assert sequences.table["sequence"].tolist() == ["pack:0", "pack:1", "pack:2"]
        assert sequences.table["document"].tolist() == ["a", "b|c", "c"]
        assert sequences.row(0)[1].tolist() == [-100, 6, 7, 1]
        assert sequences.dropped == {}
        assert sequences.table["text"][0] == PLAIN.decode([5, 6, 7, 1])

    def test_an_end_token_is_not_doubled(self) -> None:
        sequences = build([Document("a", "the"), Document("b", "fox")], BOTH, max_length=64, pack=True)
        assert tokens_of(sequences) == [BOTH("the")["input_ids"] + BOTH("fox")["input_ids"]]

    def test_a_last_token_alone_is_dropped(self) -> None:
        sequences = build([Document("a", tokens=[5, 6, 7, 8, 9])], max_length=4, pack=True)
        assert tokens_of(sequences) == [[5, 6, 7, 8]]
        assert sequences.dropped == {"sequences_short": 1, "tokens": 1}

    def test_labels_travel(self) -> None:
        documents = [Document("a", tokens=[5, 6], labels=[-100, 6]), Document("b", tokens=[7, 8])]
        sequences = build(documents, max_length=16, pack=True)
        assert sequences.row(0)[1].tolist() == [-100, 6, 1, 7, 8]

    def test_kept_fields_are_shared_or_joined(self) -> None:
        documents = [Document(str(i), tokens=[5, 6], keep={"x": "same", "y": i}) for i in range(2)]
        table = build(documents, max_length=8, pack=True, keep=("x", "y")).table
        assert table[["x", "y"]].values.tolist() == [["same", "0|1"]]

    def test_a_tokenizer_without_end_token(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(UserError, match="no end-of-sequence token"):
            build([Document("a", "the fox")], tokenizer, pack=True)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.lists(st.integers(2, 250), min_size=1, max_size=9), min_size=1, max_size=8), st.integers(2, 9))
    def test_packs_hold_every_token_in_order(self, rows: list[list[int]], size: int) -> None:
        stream = [token for row in rows for token in [*row, 1]][:-1]
        if len(stream) < 2:
            return
        sequences = build([Document(str(i), tokens=row) for i, row in enumerate(rows)], max_length=size, pack=True)
        lost = sequences.dropped.get("tokens", 0)
        assert sequences.tokens.tolist() == stream[: len(stream) - lost]
        assert (sequences.lengths()[:-1] == size).all()
        owner = [i for i, row in enumerate(rows) for _ in range(len(row) + 1)]
        for index, name in enumerate(sequences.table["document"]):
            part = owner[sequences.offsets[index] : sequences.offsets[index + 1]]
            assert name == "|".join(map(str, sorted(set(part))))


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
