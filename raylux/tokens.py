"""The tokens of documents, from a tokenizer or from the documents themselves, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from raylux.errors import UserError
from raylux.readers import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "*.jinja", "*.tiktoken")
IGNORE = -100  # the label of a position without loss, as everywhere in PyTorch
_BATCH = 256  # documents tokenized at once


@dataclass(eq=False)
class Encoded:
    """A tokenized document; ``encoding`` is the fast tokenizer's record, with offsets into the text."""

    document: Document
    tokens: np.ndarray
    labels: np.ndarray | None
    encoding: Any = None


def tokenize(documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Iterator[Encoded]:
    """Documents with their tokens; those that came as tokens are checked alone.

    Raises:
        UserError: as ``check_tokens``.
    """
    while batch := list(islice(documents, _BATCH)):
        texts = [document.text for document in batch if document.tokens is None]
        encoded = iter(_encode(texts, tokenizer))
        for document in batch:
            if document.tokens is None:
                tokens, encoding = next(encoded)
                item = Encoded(document, tokens, None, encoding)
            else:
                tokens = np.asarray(document.tokens, dtype=np.int64)
                labels = None if document.labels is None else np.asarray(document.labels, dtype=np.int64)
                item = Encoded(document, tokens, labels)
            check_tokens(item.tokens, item.labels, vocab_size, document.place)
            yield item


def _encode(texts: list[str | None], tokenizer: PreTrainedTokenizerBase) -> list[tuple[np.ndarray, Any]]:
    if not texts:
        return []
    # verbose=False: raylux cuts long documents itself, the library's warning about them would mislead.
    result = tokenizer(texts, truncation=False, padding=False, return_attention_mask=False, verbose=False)
    encodings = result.encodings or [None] * len(texts)
    return [(np.asarray(ids, dtype=np.int64), item) for ids, item in zip(result["input_ids"], encodings, strict=True)]


def check_tokens(tokens: np.ndarray, labels: np.ndarray | None, vocab_size: int, where: str) -> None:
    """Raise a UserError that begins with ``where`` for a token that the model has not, or a label that misfits."""
    wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        position = int(wrong[0])
        raise UserError(
            f"{where}: token {tokens[position]} at position {position} is outside the model's vocabulary of "
            f"{vocab_size}; do tokenizer and model belong together?"
        )
    if labels is None:
        return
    if len(labels) != len(tokens):
        raise UserError(f"{where}: {len(labels)} labels for {len(tokens)} input_ids; each token needs one (-100: none)")
    wrong = np.flatnonzero((labels != IGNORE) & (labels != tokens))
    if len(wrong):
        position = int(wrong[0])
        raise UserError(
            f"{where}: label {labels[position]} at position {position} is neither -100 nor the token there "
            f"({tokens[position]}); labels are aligned with input_ids, not shifted"
        )


def decode(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    """Token ids as text, special tokens shown, spaces as they are."""
    return str(tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False))
