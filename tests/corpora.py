"""A small tokenizer and small corpora: what the tests of reading share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from raylux.config import CorpusSection
from raylux.corpus import Sequences, build_sequences, load_corpus
from raylux.readers import Document

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
