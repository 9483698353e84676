"""Documents to sequences: every format, cutting, packing, labels."""

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
from transformers import PreTrainedTokenizerFast

from raylux.errors import UserError
from raylux.readers import Document, documents_from
from tests.corpora import (
    BOTH,
    LINES,
    PLAIN,
    ROWS,
    START,
    build,
    check_rows,
    load,
    make_tokenizer,
    section,
    tokens_of,
    write_jsonl,
)


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
