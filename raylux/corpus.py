"""Documents → token sequences with stable ids.

A long document is cut into pieces of ``max_length`` tokens (``docid:0``, ``docid:1``, …), or documents are
packed one after the other with the tokenizer's end token between them (``pack:0``, …). What is too short to
hold a label is dropped and counted. For a classifier each document is one sequence with its class; a longer one is
cut short, as it was when the model was trained.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from raylux.classes import class_labels, class_number
from raylux.config import CorpusSection
from raylux.errors import UserError
from raylux.readers import Document, read_documents
from raylux.tokens import IGNORE, Encoded, decode, tokenize

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Sequences:
    """A tokenized corpus: sequence i is ``tokens[offsets[i]:offsets[i + 1]]``.

    Attributes:
        tokens: int32, all sequences one after the other.
        offsets: int64, [sequences + 1].
        labels: int32 like ``tokens``, -100 where no loss counts; None: every token but a sequence's first.
        table: one row per sequence: ``sequence``, ``document``, ``text``, then the kept fields.
        dropped: what was left out, by reason; ``tokens`` is their number of tokens.
        classes: int32, the class of each sequence, for a classifier; there are no ``labels`` then.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None
    table: pd.DataFrame
    dropped: dict[str, int] = field(default_factory=dict)
    classes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels (int32, aligned) of a sequence.

        ``labels[t]`` is the token itself where its loss counts and -100 elsewhere. The first position never
        counts: nothing comes before it to predict it from. The shift happens in the loss. For a classifier the class
        stands at the first position, and nothing else counts.
        """
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        tokens = self.tokens[part]
        if self.classes is not None:
            return tokens, class_labels(len(tokens), int(self.classes[index]))
        labels = (tokens if self.labels is None else self.labels[part]).copy()
        labels[:1] = IGNORE
        return tokens, labels

    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [sequences]."""
        return np.diff(self.offsets)


def load_corpus(
    config: CorpusSection,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    context: int | None,
    classes: tuple[str, ...] | None = None,
) -> Sequences:
    """Read and tokenize the corpus that ``config`` names.

    Args:
        config: the config's ``corpus`` section.
        tokenizer: the model's tokenizer, called as it is (with the special tokens that it adds by itself).
        vocab_size: the model's number of token embeddings; a token beyond it is an error.
        context: the longest sequence that the model takes, or None if it has no limit.
        classes: of a classifier; None: a language model.

    Raises:
        UserError: the corpus is missing or empty, or a row does not fit; the line names file and row.
    """
    config = labelled(config, classes)
    return build_sequences(read_documents(config), config, tokenizer, vocab_size, context, classes)


def labelled(config: CorpusSection, classes: tuple[str, ...] | None) -> CorpusSection:
    """The section as documents are read by it: with the field of the class where the model is a classifier.

    Raises:
        UserError: it asks for what does not go with the model.
    """
    if classes is None:
        if config.label is not None:
            raise UserError(
                f"corpus.label = '{config.label}' is for classifiers, and the model is a causal language model; drop it"
            )
        return config
    if config.pack:
        raise UserError("corpus.pack: a classifier reads one document at a time; set corpus.pack=false")
    return config if config.label is not None else config.model_copy(update={"label": "label"})


def build_sequences(
    documents: Iterable[Document],
    config: CorpusSection,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    context: int | None,
    classes: tuple[str, ...] | None = None,
) -> Sequences:
    """Tokenize documents and cut or pack them; see ``load_corpus``. ``config`` as ``labelled`` gives it."""
    if context is not None and config.max_length > context:
        raise UserError(
            f"corpus.max_length = {config.max_length} is longer than the model's context of {context} tokens; "
            f"set corpus.max_length={context} or less"
        )
    encoded = tokenize(_unique(documents), tokenizer, vocab_size)
    build = _Builder()
    if classes is not None:
        count = _classified(encoded, config, tokenizer, build, classes)
    else:
        count = _pack(encoded, config, tokenizer, build) if config.pack else _cut(encoded, config, tokenizer, build)
    if count == 0:
        raise UserError(f"{config.path}: the corpus is empty, it holds no document")
    if not build.ids:
        reasons = ", ".join(f"{name}: {number}" for name, number in build.dropped.items())
        raise UserError(f"{config.path}: no sequence with a token to predict is left of {count} documents ({reasons})")
    return build.sequences(config.keep)


class _Builder:
    """Collects sequences in flat arrays: a corpus of Python lists of ints would take ten times the memory."""

    def __init__(self) -> None:
        self.ids: dict[str, str] = {}  # sequence id → document id, in order
        self.dropped: Counter[str] = Counter()
        self._tokens = array("i")
        self._labels = array("i")
        self._labelled = False
        self._offsets = array("q", [0])
        self._classes = array("i")
        self._texts: list[str] = []
        self._kept: list[dict[str, Any]] = []

    def add(self, name: str, document: str, tokens: np.ndarray, labels: np.ndarray | None) -> bool:
        """Take a sequence if a token of it can be predicted; otherwise count what is dropped and return False."""
        if len(tokens) < 2:
            return self._drop("sequences_short", tokens)
        if labels is not None and not (labels[1:] != IGNORE).any():
            return self._drop("sequences_unlabelled", tokens)
        self._labelled = self._labelled or labels is not None
        self._take(name, document, tokens, tokens if labels is None else labels)
        return True

    def add_classified(self, name: str, tokens: np.ndarray, number: int, lost: int) -> None:
        """Take a document with its class, of which ``lost`` tokens were cut off."""
        if lost:
            self.dropped["texts_cut"] += 1
            self.dropped["tokens"] += lost
        self._take(name, name, tokens, None)
        self._classes.append(number)

    def _take(self, name: str, document: str, tokens: np.ndarray, labels: np.ndarray | None) -> None:
        if name in self.ids:
            raise UserError(
                f"sequence id '{name}' comes twice, from the documents '{self.ids[name]}' and '{document}'; "
                "rename one of them"
            )
        self.ids[name] = document
        self._tokens.frombytes(tokens.astype(np.int32).tobytes())
        if labels is not None:
            self._labels.frombytes(labels.astype(np.int32).tobytes())
        self._offsets.append(len(self._tokens))

    def describe(self, text: str, kept: dict[str, Any]) -> None:
        """The text and kept fields of the sequence that ``add`` just took."""
        self._texts.append(text)
        self._kept.append(kept)

    def _drop(self, reason: str, tokens: np.ndarray) -> bool:
        self.dropped[reason] += 1
        self.dropped["tokens"] += len(tokens)
        return False

    def sequences(self, keep: tuple[str, ...]) -> Sequences:
        import pandas as pd

        columns: dict[str, Any] = {"sequence": list(self.ids), "document": list(self.ids.values()), "text": self._texts}
        columns.update({name: _column([kept.get(name) for kept in self._kept]) for name in keep})
        return Sequences(
            tokens=np.array(self._tokens, dtype=np.int32),
            offsets=np.array(self._offsets, dtype=np.int64),
            labels=np.array(self._labels, dtype=np.int32) if self._labelled else None,
            table=pd.DataFrame(columns),
            dropped=dict(self.dropped),
            classes=np.array(self._classes, dtype=np.int32) if self._classes else None,
        )


def _column(values: list[Any]) -> list[Any]:
    """Values of a kept field as one type, so that any table format takes the column; a mixture becomes text."""
    kinds = {type(value) for value in values if value is not None}
    large = any(isinstance(value, int) and not -(2**63) <= value < 2**63 for value in values)
    if (len(kinds) <= 1 or kinds == {int, float}) and not large:
        return values
    return [None if value is None else str(value) for value in values]


def _unique(documents: Iterable[Document]) -> Iterator[Document]:
    seen: dict[str, str] = {}
    for document in documents:
        if document.id in seen:
            raise UserError(f"{document.place}: the id '{document.id}' was already used by {seen[document.id]}")
        seen[document.id] = document.place
        yield document


def _cut(encoded: Iterator[Encoded], config: CorpusSection, tokenizer: PreTrainedTokenizerBase, build: _Builder) -> int:
    count = 0
    for item in encoded:
        count += 1
        document, size = item.document, config.max_length
        if len(item.tokens) <= size:
            if build.add(document.id, document.id, item.tokens, item.labels):
                text = document.text if document.text is not None else decode(tokenizer, item.tokens)
                build.describe(text, dict(document.keep))
            continue
        starts = range(0, len(item.tokens), size)
        texts = _piece_texts(item, list(starts), tokenizer, size)
        for number, start in enumerate(starts):
            part = slice(start, start + size)
            labels = None if item.labels is None else item.labels[part]
            if build.add(f"{document.id}:{number}", document.id, item.tokens[part], labels):
                build.describe(texts[number], dict(document.keep))
    return count


def _classified(
    encoded: Iterator[Encoded],
    config: CorpusSection,
    tokenizer: PreTrainedTokenizerBase,
    build: _Builder,
    classes: tuple[str, ...],
) -> int:
    """One sequence for each document, cut short as the tokenizer does it: with the special tokens at both ends."""
    count = 0
    for item in encoded:
        count += 1
        document, tokens = item.document, item.tokens
        number = class_number(document.label, classes, f"{document.place}: the class in '{config.label}'")
        if item.labels is not None:
            raise UserError(f"{document.place}: 'labels' are for language models; a classifier's text has one class")
        if not len(tokens):
            raise UserError(f"{document.place}: the text has no token; remove the row")
        if len(tokens) > config.max_length:
            if document.text is None:
                raise UserError(
                    f"{document.place}: {len(tokens)} input_ids, more than corpus.max_length = {config.max_length}"
                )
            tokens = cut_short(document.text, tokenizer, config.max_length)
        build.add_classified(document.id, tokens, number, len(item.tokens) - len(tokens))
        build.describe(document.text or decode(tokenizer, tokens), dict(document.keep))
    return count


def cut_short(text: str, tokenizer: PreTrainedTokenizerBase, size: int) -> np.ndarray:
    """Token ids [size] of the beginning of a text, special tokens among them."""
    return np.asarray(tokenizer(text, truncation=True, max_length=size)["input_ids"], dtype=np.int64)


def _piece_texts(item: Encoded, starts: list[int], tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """The text of each piece: slices of the original that join to it again, or else the decoded tokens."""
    text = item.document.text
    if text is None or item.encoding is None:
        return [decode(tokenizer, item.tokens[start : start + size]) for start in starts]
    offsets, special = item.encoding.offsets, item.encoding.special_tokens_mask
    # A special token has no place in the text: a piece that begins with one begins where the next token does.
    begins = [0]
    for start in starts[1:]:
        places = (offsets[t][0] for t in range(start, len(offsets)) if not special[t])
        begins.append(max(begins[-1], next(places, len(text))))
    return [text[begin:end] for begin, end in zip(begins, [*begins[1:], len(text)], strict=True)]


def _pack(
    encoded: Iterator[Encoded], config: CorpusSection, tokenizer: PreTrainedTokenizerBase, build: _Builder
) -> int:
    """Join all documents to one stream and slice it; an end token counts as a token to predict."""
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("corpus.pack: the tokenizer has no end-of-sequence token to put between documents")
    tokens, labels, starts, documents = array("i"), array("i"), array("q"), []
    for item in encoded:
        documents.append(item.document)
        if tokens and tokens[-1] != end:
            tokens.append(end)
            labels.append(end)
        starts.append(len(tokens))
        tokens.frombytes(item.tokens.astype(np.int32).tobytes())
        labels.frombytes((item.tokens if item.labels is None else item.labels).astype(np.int32).tobytes())
    stream, targets = np.array(tokens, dtype=np.int32), np.array(labels, dtype=np.int32)
    masked = bool((targets == IGNORE).any())
    first = np.array(starts, dtype=np.int64)
    for number, begin in enumerate(range(0, len(stream), config.max_length)):
        part = slice(begin, begin + config.max_length)
        inside = _documents_inside(documents, first, begin, min(part.stop, len(stream)))
        name = "|".join(document.id for document in inside)
        if build.add(f"pack:{number}", name, stream[part], targets[part] if masked else None):
            build.describe(decode(tokenizer, stream[part]), _joined(inside, config.keep))
    return len(documents)


def _documents_inside(documents: list[Document], first: np.ndarray, begin: int, end: int) -> list[Document]:
    """Documents with a token in [begin, end) of the stream; an end token belongs to the document before it."""
    low = int(np.searchsorted(first, begin, side="right")) - 1
    high = int(np.searchsorted(first, end, side="left"))
    return documents[max(low, 0) : high]


def _joined(documents: list[Document], keep: tuple[str, ...]) -> dict[str, Any]:
    """Kept fields of a pack: the value all its documents share, else all of them as one text."""
    kept = {}
    for name in keep:
        values = [document.keep.get(name) for document in documents]
        same = all(value == values[0] for value in values)
        kept[name] = values[0] if same else "|".join("" if value is None else str(value) for value in values)
    return kept
