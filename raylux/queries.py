"""Queries: what the model said, as tokens, and the measurement f whose gradient is asked for.

Every measurement is f = Σ weight · log p(labelled tokens) over a query's parts: ``logprob`` has one part of
weight +1, ``loss`` one of weight −1, ``contrast`` one of +1 (``completion``) and one of −1 (``contrast``).
For a classifier it is f = Σ weight · log p(class | text), with ``label`` and ``contrast`` two classes of one text.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raylux.classes import class_labels, class_number
from raylux.corpus import cut_short
from raylux.errors import UserError, shown
from raylux.markup import parse_json, parse_yaml
from raylux.readers import check_name, check_surrogates, integers
from raylux.sources import data_suffix, one_line, read_text, resolve
from raylux.tokens import IGNORE, check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEYS = ("id", "prompt", "completion", "contrast", "input_ids", "labels", "measurement", "chat")
CLASS_KEYS = ("id", "text", "label", "contrast", "input_ids", "measurement")
MEASUREMENTS = ("logprob", "contrast", "loss")


@dataclass(frozen=True, eq=False)
class QueryPart:
    """One sequence of a query.

    Attributes:
        tokens: int32 [tokens].
        labels: int32 like ``tokens``: the token itself in the completion, -100 elsewhere and at position 0; for a
            classifier the class at position 0 alone.
        weight: of its summed log-probability in f.
    """

    tokens: np.ndarray
    labels: np.ndarray
    weight: float


@dataclass(frozen=True, eq=False)
class Query:
    """A query: f = Σ weight · log p(labelled tokens) over ``parts``, in nats.

    Attributes:
        id: unique among the queries.
        measurement: ``logprob``, ``contrast`` or ``loss``.
        parts: one, or two for a contrast.
        record: what the file said, JSON-able, for display.
        search_tokens: int32, prompt and completions without special tokens or template: what the prefilter seeks.
    """

    id: str
    measurement: str
    parts: tuple[QueryPart, ...]
    record: dict[str, Any]
    search_tokens: np.ndarray


def load_queries(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    context: int | None,
    classes: tuple[str, ...] | None = None,
) -> list[Query]:
    """Read a YAML, JSON or jsonl file of queries; ``classes`` of a classifier, None for a language model.

    YAML and JSON hold a list of queries, or a mapping with the one key ``queries``.

    Raises:
        UserError: the file is missing or empty, or a query does not fit; the line names file and query.
    """
    found = resolve(path)
    records = records_in(read_text(found), found)
    return parse_queries(records, tokenizer, vocab_size, context, where=found, classes=classes)


def records_in(text: str, found: str) -> Any:
    """Records of a file that was read, not looked at yet; ``found`` names it and tells its format by the suffix.

    Raises:
        UserError: they cannot be read, or the file holds something else.
    """
    suffix = data_suffix(found)
    records: Any
    if suffix in (".jsonl", ".ndjson"):
        lines = enumerate(text.split("\n"), start=1)
        records = [parse_json(line, f"{found} line {number}") for number, line in lines if line.strip()]
    elif suffix == ".json":
        records = parse_json(text, found)
    elif suffix in (".yaml", ".yml"):
        records = parse_yaml(text, found)
    else:
        raise UserError(f"{found}: queries are a .yaml, .json or .jsonl file")
    if isinstance(records, dict):
        if set(records) != {"queries"}:
            raise UserError(f"{found}: must be a list of queries, or a mapping with the one key 'queries'")
        records = records["queries"]
    return records


def parse_queries(
    records: Sequence[Mapping[str, Any]] | None,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    context: int | None,
    where: str = "queries",
    classes: tuple[str, ...] | None = None,
) -> list[Query]:
    """Queries from records in memory; see ``load_queries``. Without an ``id`` a query gets its number, from 0.

    Raises:
        UserError: there is none, or one does not fit; the line names ``where`` and the query.
    """
    if records is None or (isinstance(records, (list, tuple)) and not records):
        raise UserError(f"{where}: holds no query")
    if not isinstance(records, (list, tuple)):
        raise UserError(f"{where}: must be a list of queries")
    encoder = _Encoder(tokenizer, vocab_size, context, classes)
    queries: list[Query] = []
    seen: dict[str, int] = {}
    for number, record in enumerate(records):
        query = _query(record, number, encoder, f"{where} query {number}")
        if query.id in seen:
            raise UserError(f"{where} query {number}: the id '{query.id}' was already used by query {seen[query.id]}")
        seen[query.id] = number
        queries.append(query)
    return queries


def token_split(query: Query, tokenizer: PreTrainedTokenizerBase, part: int = 0) -> list[tuple[str, bool, int]]:
    """The tokens of one part of a query as (text, whether the measurement counts it, position)."""
    tokens, labels = query.parts[part].tokens.tolist(), query.parts[part].labels
    return [
        (_token_text(tokens, position, tokenizer), bool(labels[position] != IGNORE), position)
        for position in range(len(tokens))
    ]


def _query(record: Any, number: int, encoder: _Encoder, where: str) -> Query:
    known, others = (KEYS, CLASS_KEYS) if encoder.classes is None else (CLASS_KEYS, KEYS)
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a query is a mapping with the keys {', '.join(known)}")
    for key in record:
        if key not in known and key in others:
            kind = "a causal language model" if encoder.classes is None else "a classifier"
            raise UserError(f"{where}: '{key}' does not go with {kind}; a query has the keys {', '.join(known)}")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {shown(key)}; {hint}")
    name = check_name(record.get("id", number), f"{where}: the id")
    where = f"{where} ('{name}')" if "id" in record else where
    measurement = record.get("measurement", "logprob")
    if measurement not in MEASUREMENTS:
        raise UserError(f"{where}: unknown measurement {shown(measurement)}; known: {', '.join(MEASUREMENTS)}")
    if (measurement == "contrast") != ("contrast" in record):
        other = "completion" if encoder.classes is None else "class"
        raise UserError(f"{where}: 'contrast' (the other {other}) and 'measurement: contrast' go together")
    if encoder.classes is not None:
        parts, search = encoder.classified(record, measurement, where, encoder.classes)
    else:
        build = encoder.from_tokens if "input_ids" in record else encoder.from_text
        parts, search = build(record, measurement, where)
    for part in parts:
        encoder.check(part, where)
    return Query(name, measurement, parts, {**record, "id": name}, search)


class _Encoder:
    """Turns records to tokens, with what the tokenizer puts around a text found out once."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        context: int | None,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.classes = classes
        self.vocab_size = vocab_size
        self.context = context
        self.special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
        self.suffix = _added_suffix(tokenizer)

    def from_text(self, record: Mapping[str, Any], measurement: str, where: str) -> tuple[tuple[QueryPart, ...], Any]:
        """Parts and search tokens of a query with ``prompt`` and ``completion``."""
        if "labels" in record:
            raise UserError(f"{where}: 'labels' go with 'input_ids'; a query in text has 'completion'")
        prompt = _text(record, "prompt", where, default="")
        names = ("completion", "contrast") if measurement == "contrast" else ("completion",)
        texts = [_text(record, name, where) for name in names]
        if len(texts) == 2 and texts[0] == texts[1]:
            raise UserError(f"{where}: 'completion' and 'contrast' are the same text, f would be 0")
        head = self._prompt(prompt, record.get("chat", False), where)
        tails = [self._ids(text) for text in texts]
        weights = (-1.0,) if measurement == "loss" else (1.0, -1.0)
        parts = tuple(
            _part(head + tail, [IGNORE] * len(head) + tail, weight)
            for tail, weight in zip(tails, weights, strict=False)
        )
        for name, tail in zip(names, tails, strict=True):
            if not tail:
                raise UserError(f"{where}: '{name}' has no token")
        if not head:
            raise UserError(
                f"{where}: the prompt is empty and this tokenizer adds no start token, so nothing predicts the "
                "completion's first token; give the query a prompt"
            )
        return parts, self._search(sum(tails, self._ids(prompt)))

    def from_tokens(self, record: Mapping[str, Any], measurement: str, where: str) -> tuple[tuple[QueryPart, ...], Any]:
        """The part and search tokens of a query with ``input_ids`` and ``labels``."""
        extra = [key for key in ("prompt", "completion", "contrast", "chat") if key in record]
        if extra:
            raise UserError(f"{where}: '{extra[0]}' does not go with 'input_ids'")
        if "labels" not in record:
            raise UserError(f"{where}: 'input_ids' need 'labels': the token itself in the completion, -100 elsewhere")
        tokens = integers(record["input_ids"], f"{where}: input_ids")
        if not tokens:
            raise UserError(f"{where}: input_ids are empty")
        labels = integers(record["labels"], f"{where}: labels")
        check_tokens(np.array(tokens, dtype=np.int64), np.array(labels, dtype=np.int64), self.vocab_size, where)
        part = _part(tokens, labels, -1.0 if measurement == "loss" else 1.0)
        if not (part.labels != IGNORE).any():
            raise UserError(f"{where}: no completion: every label after the first position is -100")
        return (part,), self._search(tokens)

    def classified(
        self, record: Mapping[str, Any], measurement: str, where: str, classes: tuple[str, ...]
    ) -> tuple[tuple[QueryPart, ...], np.ndarray]:
        """Parts and search tokens of a query with ``text`` (or ``input_ids``) and ``label``."""
        if ("text" in record) == ("input_ids" in record):
            raise UserError(f"{where}: a query of a classifier has 'text' and 'label' (or 'input_ids' and 'label')")
        if "input_ids" in record:
            tokens = integers(record["input_ids"], f"{where}: input_ids")
        else:
            text = _text(record, "text", where)
            tokens = self._ids(text, specials=True)
            if self.context is not None and len(tokens) > self.context:
                tokens = cut_short(text, self.tokenizer, self.context).tolist()
        if not tokens:
            raise UserError(f"{where}: there is no token in it")
        names = ("label", "contrast") if measurement == "contrast" else ("label",)
        for name in names:
            if record.get(name) is None:
                raise UserError(f"{where}: no '{name}'; the class whose log probability is measured")
        numbers = [class_number(record[name], classes, f"{where}: '{name}'") for name in names]
        if len(set(numbers)) < len(numbers):
            raise UserError(f"{where}: 'label' and 'contrast' are the same class, f would be 0")
        weights = (-1.0,) if measurement == "loss" else (1.0, -1.0)
        ids = np.array(tokens, dtype=np.int32)
        parts = tuple(
            QueryPart(ids, class_labels(len(ids), number), weight)
            for number, weight in zip(numbers, weights, strict=False)
        )
        return parts, self._search(tokens)

    def check(self, part: QueryPart, where: str) -> None:
        """Raise a UserError for a part that the model cannot take."""
        check_tokens(part.tokens, None, self.vocab_size, where)
        if self.context is not None and len(part.tokens) > self.context:
            raise UserError(f"{where}: {len(part.tokens)} tokens, longer than the model's context of {self.context}")

    def _ids(self, text: str, specials: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=specials, truncation=False, verbose=False)["input_ids"])

    def _prompt(self, prompt: str, chat: Any, where: str) -> list[int]:
        if not isinstance(chat, bool):
            raise UserError(f"{where}: 'chat' must be true or false, not {shown(chat)}")
        if chat:
            # A template writes the start token itself where its model wants one.
            ids = self._ids(self._templated(prompt, where))
        else:
            ids = self._ids(prompt, specials=True)
            ids = ids[: len(ids) - self.suffix]
        start = self.tokenizer.bos_token_id
        while start is not None and ids[:2] == [start, start]:
            ids = ids[1:]
        return ids

    def _templated(self, prompt: str, where: str) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(f"{where}: chat: true, but the tokenizer has no chat template")
        messages = [{"role": "user", "content": prompt}]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program of the model's author
            raise UserError(f"{where}: the tokenizer's chat template fails ({one_line(error)})") from None

    def _search(self, tokens: list[int]) -> np.ndarray:
        found = np.array(tokens, dtype=np.int32)
        return found[~np.isin(found, self.special)]


def _added_suffix(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens the tokenizer puts after a text: they may not stand between prompt and completion."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for count in range(len(full) - len(bare) + 1):
        if full[len(full) - len(bare) - count : len(full) - count] == bare:
            return count
    return 0


def _part(tokens: list[int], labels: list[int], weight: float) -> QueryPart:
    ids, targets = np.array(tokens, dtype=np.int32), np.array(labels, dtype=np.int32)
    targets[:1] = IGNORE  # nothing comes before the first token to predict it from
    return QueryPart(ids, targets, weight)


def _text(record: Mapping[str, Any], name: str, where: str, default: str | None = None) -> str:
    value = record.get(name, default)
    if value is None:
        raise UserError(f"{where}: no '{name}'; a query needs prompt and completion, or input_ids and labels")
    if not isinstance(value, str):
        raise UserError(f"{where}: '{name}' must be text, not {shown(value)}; put it in quotes")
    if not value and default is None:
        raise UserError(f"{where}: '{name}' is empty")
    check_surrogates(value, f"{where}: '{name}'")
    return value


def _token_text(tokens: list[int], position: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """One token as text with the space it begins with, or its raw name where it is but a part of a character."""
    before = _decode(tokens[max(position - 1, 0) : position], tokenizer)
    both = _decode(tokens[max(position - 1, 0) : position + 1], tokenizer)
    text = both.removeprefix(before)
    if "\ufffd" in both or not both.startswith(before) or not text:
        return str(tokenizer.convert_ids_to_tokens([tokens[position]])[0])
    return text


def _decode(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
