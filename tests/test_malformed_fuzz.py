"""Random input: whatever it is, it is read in full or refused in one line."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylux import weights
from raylux.config import Config, CorpusSection
from raylux.corpus import Sequences, build_sequences
from raylux.markup import parse_json, parse_yaml
from raylux.queries import load_queries, parse_queries
from raylux.readers import documents_from
from tests.corpora import PLAIN, VOCABULARY, load, section
from tests.malformed import valid_or_refused

pytestmark = pytest.mark.filterwarnings("ignore")

# No deadline for an example: a busy machine is no bug. A reader that hangs meets pytest's own timeout.
quick = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # half characters too
NUMBERS = st.integers() | st.integers(-(2**70), 2**70) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | ANY_TEXT | st.sampled_from(["auto", "x.jsonl", "010", "1e3", "no"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3))
SECTIONS: dict[str, Any] = {
    "run": {"folder": "runs/x"},
    "model": {"path": "m"},
    "corpus": {"path": "c.jsonl"},
    "queries": {"path": "q.yaml"},
}
KEYS = [
    f"{name}.{key}"
    for name, field in Config.model_fields.items()
    for key in field.annotation.model_fields  # type: ignore[union-attr]
]
MARKS_OF_YAML = [*"-:?[]{},&*!|>%@`'\"#\n\t ~=.0x", "\n  ", ": ", "- ", "<<", "&a ", "*a", "!!int ", "---\n", "...\n"]
WORDS_OF_YAML = ["run", "folder", "fit", "seed", "null", "yes", ".nan", "2024-01-01", "0o7", "1:2", "\\u"]
YAML_PARTS = st.sampled_from([*MARKS_OF_YAML, *WORDS_OF_YAML, "\x00", "\x85", "\ufeff", "\u2028"])


def mutated(data: st.DataObject, good: bytes) -> bytes:
    """Good bytes with a few of them changed, left out, doubled or cut off."""
    spoilt = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(len(spoilt) - 1, 0)))
        kind = data.draw(st.sampled_from(["change", "drop", "insert", "cut", "double"]))
        if kind == "change" and spoilt:
            spoilt[place] = data.draw(st.integers(0, 255))
        elif kind == "drop":
            del spoilt[place : place + data.draw(st.integers(1, 8))]
        elif kind == "insert":
            spoilt[place:place] = data.draw(st.binary(max_size=6))
        elif kind == "cut":
            del spoilt[place:]
        else:
            spoilt[place:place] = spoilt[place : place + 20]
    return bytes(spoilt)


def sound(sequences: Sequences) -> None:
    """What every corpus that is accepted holds."""
    assert len(sequences) == len(sequences.table) > 0
    assert ((sequences.tokens >= 0) & (sequences.tokens < VOCABULARY)).all()
    for index in range(len(sequences)):
        tokens, labels = sequences.row(index)
        assert ((labels == -100) | (labels == tokens)).all()
        assert (labels != -100).any()
    for name in sequences.table["sequence"]:
        name.encode("utf-8")


# --- configs ---------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_any_value_of_any_key(changes: list[tuple[str, Any]]) -> None:
    sections = {name: dict(keys) for name, keys in SECTIONS.items()}
    for key, value in changes:
        section_, _, name = key.partition(".")
        sections.setdefault(section_, {})[name] = value
    config = valid_or_refused(lambda: Config.parse(sections))
    if isinstance(config, Config):
        assert Config.model_validate(yaml.safe_load(yaml.safe_dump(config.dump()))) == config
        for key, value in dict(changes).items():  # an accepted value is the value that was given
            section_, _, name = key.partition(".")
            kept = getattr(getattr(config, section_), name)
            if isinstance(kept, float) and isinstance(value, str):
                value = float(value)  # 1e3 is the one text that is a number
            given_ = (value,) if isinstance(kept, tuple) and isinstance(value, str) else value
            assert kept == (tuple(given_) if isinstance(kept, tuple) else given_), key
            assert isinstance(kept, bool) == isinstance(value, bool)


@quick
@given(st.dictionaries(st.sampled_from(sorted(Config.model_fields)) | ANY_TEXT | SCALARS, VALUES, max_size=5))
def test_any_sections(sections: dict[Any, Any]) -> None:
    valid_or_refused(lambda: Config.parse({**SECTIONS, **sections}))


@quick
@given(st.sampled_from(KEYS), st.lists(YAML_PARTS, max_size=6).map("".join) | ANY_TEXT)
def test_any_override(key: str, value: str) -> None:
    valid_or_refused(lambda: Config.parse(SECTIONS, [f"{key}={value}"]))
    valid_or_refused(lambda: Config.parse(SECTIONS, [value]))


@quick
@given(data=st.data())
def test_any_bytes_as_a_config(data: st.DataObject, tmp_path: Path) -> None:
    good = yaml.safe_dump({**SECTIONS, "fit": {"seed": 3, "labels": "sampled"}, "query": {"max_error": 0.5}}).encode()
    parts = st.lists(YAML_PARTS, max_size=30).map(lambda parts: "".join(parts).encode())
    content = mutated(data, good) if data.draw(st.booleans()) else data.draw(parts | st.binary())
    (tmp_path / "c.yaml").write_bytes(content)
    valid_or_refused(lambda: Config.load(tmp_path / "c.yaml"))


@quick
@given(VALUES)
def test_plain_data_comes_back_from_yaml_and_json(value: Any) -> None:
    """What is no text, no number and no container is never made; what is comes back as it was written."""
    written = json.dumps({"value": value})
    found = parse_json(written, "x")
    assert json.dumps(found) == written
    dumped = yaml.safe_dump({"value": value}, allow_unicode=False, sort_keys=False)
    again = valid_or_refused(lambda: parse_yaml(dumped, "x"))
    if again is not None:
        assert json.dumps(again) == written or "\\ud" in written


# --- corpora and queries ---------------------------------------------------------------------------------------

ROWS = [{"text": "the quick fox", "i": "a", "k": 1}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "i": "b"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@quick
@given(data=st.data())
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.jsonl.gz"])
def test_any_bytes_as_a_corpus(name: str, data: st.DataObject, tmp_path: Path) -> None:
    good = {"a.json": json.dumps(ROWS).encode(), "a.jsonl.gz": gzip.compress(LINES * 5, mtime=0)}.get(name, LINES)
    content = mutated(data, good) if data.draw(st.booleans()) else data.draw(st.binary())
    (tmp_path / name).write_bytes(content)
    options: dict[str, Any] = {"keep": "k"} if data.draw(st.booleans()) else {}
    corpus = valid_or_refused(lambda: load(tmp_path / name, **options))
    if isinstance(corpus, Sequences):
        sound(corpus)
        corpus.table.to_parquet(tmp_path / "kept.parquet")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    table = pa.table({"text": ["the fox", "a dog"] * 9, "k": list(range(18)), "input_ids": [None, [5, 6]] * 9})
    pq.write_table(table, path, row_group_size=7)
    return path.read_bytes()


@quick
@given(data=st.data())
def test_any_bytes_as_parquet(data: st.DataObject, parquet: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(mutated(data, parquet))
    corpus = valid_or_refused(lambda: load(tmp_path / "a.parquet", keep="k"))
    if isinstance(corpus, Sequences):
        sound(corpus)


TOKEN = st.integers(-2, VOCABULARY + 2) | st.sampled_from([-100, 2**31, -(2**63), 2**64, 5.0, True, "5", None, [5]])
TOKENS = st.lists(TOKEN, max_size=6) | st.lists(st.integers(0, 9), max_size=6) | VALUES
MARKS = st.lists(st.integers(0, 1), max_size=6) | TOKENS


@quick
@given(st.lists(st.fixed_dictionaries({"input_ids": TOKENS}, optional={"labels": TOKENS, "attention_mask": MARKS})))
def test_any_token_ids(rows: list[dict[str, Any]]) -> None:
    config: CorpusSection = section(max_length=4)
    corpus = valid_or_refused(
        lambda: build_sequences(documents_from(rows, config), config, PLAIN, VOCABULARY, context=None)
    )
    if isinstance(corpus, Sequences):
        sound(corpus)
        padding = sum(row["attention_mask"].count(0) for row in rows if row.get("attention_mask") is not None)
        kept = len(corpus.tokens) + corpus.dropped.get("tokens", 0)
        assert kept == sum(len(row["input_ids"]) for row in rows) - padding


@quick
@given(st.dictionaries(st.sampled_from(["id", "i", "text", "k"]) | ANY_TEXT, VALUES, max_size=5))
def test_any_row(row: dict[str, Any]) -> None:
    config: CorpusSection = section(id="i", keep=("k",))
    build_all = lambda: build_sequences(documents_from([row], config), config, PLAIN, VOCABULARY, None)  # noqa: E731
    corpus = valid_or_refused(build_all)
    if isinstance(corpus, Sequences):
        sound(corpus)
        assert corpus.table["text"].tolist() == [row["text"]]


QUERY_KEYS = st.sampled_from(["id", "prompt", "completion", "contrast", "input_ids", "labels", "measurement", "chat"])
RECORDS = st.dictionaries(QUERY_KEYS | ANY_TEXT, VALUES | TOKENS | st.sampled_from(["loss", "contrast"]), max_size=5)


@quick
@given(st.lists(RECORDS | VALUES, max_size=3) | VALUES)
def test_any_query(records: Any) -> None:
    queries = valid_or_refused(lambda: parse_queries(records, PLAIN, VOCABULARY, context=64))
    for query in queries if isinstance(queries, list) else ():
        json.dumps(query.record).encode("utf-8")
        assert query.id.isprintable() or query.id.encode("utf-8")
        for part in query.parts:
            assert ((part.tokens >= 0) & (part.tokens < VOCABULARY)).all()
            assert (part.labels != -100).any()


@quick
@given(data=st.data())
@pytest.mark.parametrize("name", ["q.yaml", "q.json", "q.jsonl"])
def test_any_bytes_as_queries(name: str, data: st.DataObject, tmp_path: Path) -> None:
    record = {"id": "a", "prompt": "the", "completion": " fox", "contrast": " dog", "measurement": "contrast"}
    content = mutated(data, json.dumps(record if name == "q.jsonl" else [record]).encode())
    (tmp_path / name).write_bytes(content if data.draw(st.booleans()) else data.draw(st.binary()))
    valid_or_refused(lambda: load_queries(str(tmp_path / name), PLAIN, VOCABULARY, 64))


# --- weights ---------------------------------------------------------------------------------------------------


@quick
@given(data=st.data())
def test_any_bytes_as_safetensors(data: st.DataObject, tmp_path: Path) -> None:
    facts = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    if data.draw(st.booleans()):
        facts["x"][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(VALUES | TOKENS)
    text = json.dumps(facts).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(8)
    (tmp_path / weights.SINGLE).write_bytes(mutated(data, content) if data.draw(st.booleans()) else content)
    tensors = valid_or_refused(lambda: weights.read_header(tmp_path / weights.SINGLE))
    for tensor in tensors if isinstance(tensors, list) else ():
        assert 0 <= tensor.start <= tensor.stop <= (tmp_path / weights.SINGLE).stat().st_size
    hashes = valid_or_refused(lambda: weights.tensor_hashes(tmp_path))
    assert hashes is None or tensors is not None


@quick
@given(data=st.data())
def test_any_bytes_as_an_index(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / weights.INDEX
    good = json.dumps({"weight_map": {"x": "a.safetensors"}}).encode()
    drawn = data.draw(VALUES)
    path.write_bytes(mutated(data, good) if data.draw(st.booleans()) else json.dumps({"weight_map": drawn}).encode())
    assert not valid_or_refused(lambda: weights.check_indexes(tmp_path)), "no shard is there"
