"""Query files that are wrong, by line and query; and what the command line makes of any bad input."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from raylux.cli import main
from raylux.queries import load_queries
from tests.corpora import PLAIN
from tests.malformed import Case, case, clear, refused, table
from tests.small import Inputs, make_inputs, write_lines

GOOD: dict[str, Any] = {"id": "a", "prompt": "The", "completion": " end"}
IDS: dict[str, Any] = {"id": "a", "input_ids": [5, 6, 7], "labels": [-100, 6, 7]}

RECORDS = (
    case("id: null", {**GOOD, "id": None}, "the id must be text or a whole number, not null"),
    case("id: a float", {**GOOD, "id": 1.0}, "not a float (1.0)"),
    case("id: a list", {**GOOD, "id": ["a"]}, "not a list"),
    case("id: an object", {**GOOD, "id": {}}, "not an object"),
    case("id: blank", {**GOOD, "id": " \t"}, "the id is blank"),
    case("id: a line break", {**GOOD, "id": "a\nb"}, "U+000A"),
    case("id: an escape sequence", {**GOOD, "id": "\x1b]0;x\x07"}, "U+001B"),
    case("id: a NUL", {**GOOD, "id": "\0"}, "U+0000"),
    case("id: half a character", {**GOOD, "id": "\ud800"}, "U+D800"),
    case("id: 5,000 characters", {**GOOD, "id": "x" * 5000}, "5,000 characters, more than 4,096"),
    case("prompt: null", {**GOOD, "prompt": None}, "('a')", "no 'prompt'"),
    case("prompt: a number", {**GOOD, "prompt": 7}, "'prompt' must be text, not 7"),
    case("prompt: a list", {**GOOD, "prompt": ["The"]}, "'prompt' must be text, not a list of 1"),
    case("prompt: a list of messages", {**GOOD, "prompt": [{"role": "user"}], "chat": True}, "'prompt' must be text"),
    case("prompt: absent", {"completion": " end"}, "the prompt is empty"),
    case("prompt and completion: empty", {"prompt": "", "completion": ""}, "'completion' is empty"),
    case("prompt: half a character", {**GOOD, "prompt": "\udfff"}, "half a surrogate pair at character 0"),
    case("completion: a number", {**GOOD, "completion": 1.5}, "'completion' must be text, not 1.5"),
    case("completion: true", {**GOOD, "completion": True}, "not True; put it in quotes"),
    case("completion: an object", {**GOOD, "completion": {}}, "not a mapping of 0"),
    case("completion: half a character", {**GOOD, "completion": "ab\ud800"}, "at character 2"),
    case("too long", {**GOOD, "prompt": "x y " * 99}, "longer than the model's context of 64"),
    case("a contrast too long", {**GOOD, "contrast": "x y " * 99, "measurement": "contrast"}, "context of 64"),
    case("contrast: null", {**GOOD, "contrast": None, "measurement": "contrast"}, "no 'contrast'"),
    case("contrast: a list", {**GOOD, "contrast": ["x"], "measurement": "contrast"}, "'contrast' must be text"),
    case("contrast with a loss", {**GOOD, "contrast": " x", "measurement": "loss"}, "go together"),
    case("measurement: null", {**GOOD, "measurement": None}, "unknown measurement None"),
    case("measurement: a list", {**GOOD, "measurement": ["loss"]}, "unknown measurement a list of 1"),
    case("measurement: another case", {**GOOD, "measurement": "Loss"}, "unknown measurement 'Loss'", "logprob"),
    case("measurement: empty", {**GOOD, "measurement": ""}, "unknown measurement ''"),
    case("chat: a number", {**GOOD, "chat": 1}, "'chat' must be true or false, not 1"),
    case("chat: null", {**GOOD, "chat": None}, "'chat' must be true or false, not None"),
    case("an empty key", {**GOOD, "": 1}, "unknown key ''"),
    case("a key of another case", {**GOOD, "Prompt": "x"}, "unknown key 'Prompt'", "did you mean 'prompt'"),
    case("a key of a megabyte", {**GOOD, "x" * 10**6: 1}, "unknown key 'xxx"),
    case("no keys", {}, "no 'completion'"),
    case("null", None, "a query is a mapping"),
    case("a list", ["The", " end"], "a query is a mapping"),
    case("a number", 7, "a query is a mapping"),
    case("tokens: empty", {**IDS, "input_ids": [], "labels": []}, "input_ids are empty"),
    case("tokens: null", {**IDS, "input_ids": None}, "input_ids must be a list", "not null"),
    case("tokens: negative", {**IDS, "input_ids": [-1, 6, 7]}, "token -1 at position 0"),
    case("tokens: beyond", {**IDS, "input_ids": [5, 6, 300]}, "token 300 at position 2", "vocabulary of 300"),
    case("tokens: 2^31", {**IDS, "input_ids": [5, 6, 2**31]}, "2147483648 at position 2"),
    case("tokens: 2^100", {**IDS, "input_ids": [5, 6, 2**100]}, "at position 2 is no token id"),
    case("tokens: a float", {**IDS, "input_ids": [5, 6, 7.0]}, "position 2 is a float (7.0)"),
    case("tokens: true", {**IDS, "input_ids": [5, True, 7]}, "position 1 is true or false"),
    case("tokens: text", {**IDS, "input_ids": ["5", 6, 7]}, "position 0 is text"),
    case("tokens: nested", {**IDS, "input_ids": [[5, 6, 7]]}, "position 0 is a list"),
    case("tokens: too many", {**IDS, "input_ids": [5] * 99, "labels": [5] * 99}, "99 tokens", "context of 64"),
    case("labels: null", {**IDS, "labels": None}, "labels must be a list", "not null"),
    case("labels: absent", {"input_ids": [5, 6]}, "'input_ids' need 'labels'"),
    case("labels: empty", {**IDS, "labels": []}, "0 labels for 3 input_ids"),
    case("labels: too many", {**IDS, "labels": [5, 6, 7, 8]}, "4 labels for 3"),
    case("labels: all -100", {**IDS, "labels": [-100] * 3}, "no completion"),
    case("labels: only the first", {**IDS, "labels": [5, -100, -100]}, "no completion"),
    case("labels: shifted", {**IDS, "labels": [6, 7, -100]}, "label 6 at position 0"),
    case("labels: of 0 and 1", {**IDS, "labels": [0, 1, 1]}, "label 0 at position 0"),
    case("labels: a float", {**IDS, "labels": [-100, 6.0, 7]}, "labels", "position 1 is a float"),
    case("tokens with a prompt", {**IDS, "prompt": "The"}, "'prompt' does not go with 'input_ids'"),
    case("tokens with a chat", {**IDS, "chat": False}, "'chat' does not go with 'input_ids'"),
    case("tokens with a contrast", {**IDS, "measurement": "contrast", "contrast": " x"}, "'contrast' does not go"),
    case("text with labels", {**GOOD, "labels": [1]}, "'labels' go with 'input_ids'"),
)

FILES = (
    case("q.yaml: a date as text", "- {prompt: a, completion: b, chat: 2024-01-01}", "not '2024-01-01'"),
    case("q.yaml: no as a completion", "- {prompt: a, completion: no}", "query 0", "not False; put it in quotes"),
    case("q.yaml: null as a completion", "- {prompt: a, completion: ~}", "query 0", "no 'completion'"),
    case("q.yaml: a number as a prompt", "- {prompt: 1969, completion: b}", "query 0", "not 1969"),
    case("q.yaml: a key twice", "- prompt: a\n  completion: b\n  prompt: c\n", "line 3", "'prompt' comes twice"),
    case("q.yaml: 'queries' twice", "queries: []\nqueries: []\n", "line 2", "'queries' comes twice"),
    case("q.yaml: a bomb", "a: &a [x, x]\nqueries: [*a, *a]\n", "line 2", "*a stands for"),
    case("q.yaml: a tag", "- !!python/object/apply:os.getpid []\n", "line 1", "!!python/object"),
    case("q.yaml: a number as a key", "- {prompt: a, completion: b, 7: c}\n", "unknown key 7"),
    case("q.yaml: two documents", "- {prompt: a, completion: b}\n---\n[]\n", "line 2", "another document"),
    case("q.yaml: a tab", "- prompt: a\n\tcompletion: b\n", "line 2"),
    case("q.yaml: a mapping of queries", "queries:\n  a: {prompt: x}\n", "must be a list of queries"),
    case("q.yaml: more than queries", "queries: []\nversion: 1\n", "the one key 'queries'"),
    case("q.yaml: null queries", "queries:\n", "holds no query"),
    case("q.yaml: a number", "7", "must be a list of queries"),
    case("q.yaml: only a comment", "# later\n", "holds no query"),
    case("q.yaml: a NUL", "- prompt: a\0b", "NUL (byte 11)"),
    case("q.yaml: UTF-16", "- prompt: a".encode("utf-16"), "NUL"),
    case("q.yaml: an escape", "- prompt: \x1b[2J", "line 1", "U+001B"),
    case("q.yaml: brackets", "[" * 10_000, "nested too deeply"),
    case("q.json: an object of queries", '{"a": {"prompt": "x"}}', "the one key 'queries'"),
    case("q.json: a key twice", '[{"id": "a", "id": "b"}]', "'id' comes twice"),
    case("q.json: lines", '{"prompt": "a"}\n{"prompt": "b"}\n', "its format is jsonl"),
    case("q.json: null", "null", "holds no query"),
    case("q.json: NaN", "[NaN]", "query 0", "a query is a mapping"),
    case("q.json: brackets", "[" * 100_000, "nested too deeply"),
    case("q.json: a huge number", '[{"id": ' + "9" * 5000 + "}]", "digits"),
    case("q.jsonl: a list", '[{"prompt": "a", "completion": "b"}]', "query 0", "a query is a mapping"),
    case("q.jsonl: cut", '{"prompt": "a", "completion": "b"}\n{"prom', "line 2", "not valid JSON"),
    case("q.jsonl: a key twice", '\n{"id": 1, "id": 2}', "line 2", "'id' comes twice"),
    case("q.jsonl: Latin-1", b'{"prompt": "caf\xe9"}', "not UTF-8", "byte 15"),
    case("q.jsonl.gz: not packed", "{}", "Not a gzipped file"),
    case("q.txt: text", "The end", "a .yaml, .json or .jsonl file"),
    case("q.py: a program", "print(1)", "a .yaml, .json or .jsonl file"),
)


def load(path: Path | str) -> Any:
    return load_queries(str(path), PLAIN, 300, 64)


@table(*RECORDS)
def test_records(case: Case, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(case.content))
    refused(lambda: load(tmp_path / "q.jsonl"), "q.jsonl query 0", *case.says)


@table(*FILES)
def test_files(case: Case, tmp_path: Path) -> None:
    name = case.name.split(":")[0]
    (tmp_path / name).write_bytes(case.content if isinstance(case.content, bytes) else case.content.encode())
    refused(lambda: load(tmp_path / name), name, *case.says)


def test_places_that_are_no_query_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "q.yaml")
    for path, says in {
        tmp_path / "q.yaml": "is a pipe or a device",
        tmp_path: "is a folder",
        "/dev/zero": "is a pipe or a device",
        "a\0.yaml": "U+0000",
        "~nobody_of_this_name/q.yaml": "no such file",
        "nosuch://q.yaml": "cannot be read",
        "package://yaml/../q.yaml": "leaves the folder",
    }.items():
        refused(lambda path=path: load(path), says)


def test_an_id_is_a_name_and_no_path(tmp_path: Path) -> None:
    names = ["../../x", "/etc/passwd", "C:\\x", ".", "-q", "é 漢", "<b>", "010", "2024-01-01"]
    (tmp_path / "q.yaml").write_text(
        "".join(f"- {{id: {json.dumps(n, ensure_ascii=False)}, prompt: a, completion: b}}\n" for n in names[:-2])
        + "".join(f"- {{id: {n}, prompt: a, completion: b}}\n" for n in names[-2:])
    )
    assert [query.id for query in load(tmp_path / "q.yaml")] == names


# --- the command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("model"), "gpt2")


ROW = {"id": "s", "shelf": 0, "text": "anna bought the red boat"}
QUERY = {"id": "q", "prompt": "anna bought", "completion": "the red boat"}

# File that is spoilt (or an override) and its bytes; the command; what the line says.
COMMANDS = (
    case("config: a key twice", b"run: {folder: a, folder: b}\n", "c.yaml", "line 1", "comes twice"),
    case("config: a tag", b"run: !!python/object/apply:os.getpid []\n", "c.yaml", "!!python"),
    case("config: a bomb", b"a: &a [x]\nb: [*a, *a]\n", "c.yaml", "line 2", "*a"),
    case("config: binary", b"\x7fELF\0\0", "c.yaml", "U+007F"),
    case("config: a null section", b"run:\n", "c.yaml", "'run'", "is empty"),
    case("corpus.jsonl: a key twice", b'{"id": 1, "id": 2}', "line 1", "'id' comes twice"),
    case("corpus.jsonl: half an id", b'{"text": "anna", "id": "\\ud800"}', "line 1", "U+D800"),
    case("corpus.jsonl: half a kept field", b'{"text": "anna", "id": "x", "shelf": "\\ud800"}', "'shelf'", "surrogate"),
    case("corpus.jsonl: a hole", b'{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1], "id": 1}', "one run of 1"),
    case("corpus.jsonl: a NUL", b"\0", "line 1", "NUL"),
    case("queries.jsonl: half an id", b'{"id": "\\ud800"}', "query 0", "U+D800"),
    case("queries.jsonl: a line break", b'{"id": "a\\nb"}', "query 0", "U+000A"),
    case("queries.jsonl: a huge number", b'{"id": ' + b"9" * 5000 + b"}", "line 1", "digits"),
    case("override: a float", b"fit.sequences=1e3", "'fit.sequences' = '1e3'", "valid integer"),
    case("override: true", b"corpus.max_length=true", "'corpus.max_length' = True"),
    case("override: octal", b"fit.seed=010", "'fit.seed' = '010'"),
    case("override: infinity", b"engine.timeout=.inf", "finite"),
    case("override: no tokenizer", b"model.tokenizer=/dev", "no tokenizer could be loaded"),
)


@table(*COMMANDS)
@pytest.mark.parametrize("command", ["run", "models"])
def test_commands_end_in_one_line_and_2_and_leave_nothing(
    case: Case, command: str, model: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = Inputs(tmp_path)
    own.model.symlink_to(model.model)
    write_lines(own.corpus, [ROW])
    write_lines(own.queries, [QUERY])
    name, overrides = case.name.split(":")[0], [case.content.decode()] if case.name.startswith("override") else []
    if command == "models" and name == "corpus.jsonl":
        name = "queries.jsonl"  # this command reads no corpus: the same bytes as queries are as wrong
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(own.sections(tmp_path / "run")))
    if not overrides:
        (config if name == "config" else tmp_path / name).write_bytes(case.content)
    before = sorted(tmp_path.rglob("*"))
    assert main([command, str(config), *overrides]) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1, said
    clear(said[0], "raylux: error: ", *(case.says if name == case.name.split(":")[0] else [name]))
    assert sorted(tmp_path.rglob("*")) == before
