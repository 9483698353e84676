"""Documents from files: jsonl, json, parquet, text files and `datasets` data sets, one row at a time.

In messages, lines of a jsonl file count from 1, as editors do; rows count from 0, as default ids do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from raylux.config import CorpusSection
from raylux.errors import UserError, shown
from raylux.markup import odd_character, parse_json
from raylux.sources import (
    SourceFile,
    data_suffix,
    decode_utf8,
    find_files,
    is_url,
    one_line,
    open_bytes,
    read_lines,
    resolve,
)

RESERVED = frozenset({"sequence", "document", "text", "rank", "influence", "prefilter"})
_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".pq": "parquet"}
_TEXT = (".txt", ".text", ".md", ".rst")
_LONGEST_NAME = 4096
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True, eq=False)
class Document:
    """One document: either ``text``, or ``tokens`` with optional ``labels`` of the same length (-100: no loss).

    ``label`` is what the field for the class holds, ``keep`` holds the kept fields, ``where`` the place to name in an
    error (``file line 3``).
    """

    id: str
    text: str | None = None
    tokens: Sequence[int] | None = None
    labels: Sequence[int] | None = None
    label: Any = None
    keep: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def place(self) -> str:
        """Where the document came from, for a message."""
        return self.where or f"document '{self.id}'"


@dataclass(frozen=True, eq=False)
class _Row:
    data: Any
    where: str
    id: str | None = None  # an id that the format gives (file name, key of a mapping); else the row's number


def read_documents(config: CorpusSection) -> Iterator[Document]:
    """Read the corpus that ``config`` names, up to ``limit`` documents.

    Raises:
        UserError: nothing is there, or a row does not fit; the line names file and row.
    """
    path = resolve(config.path)
    return _documents(_rows(path, config), config, where=path)


def documents_from(rows: Iterable[Any], config: CorpusSection, where: str = "train") -> Iterator[Document]:
    """Documents from rows in memory: strings, or mappings with the fields that ``config`` names."""
    return _documents((_Row(_in_memory(row, config), f"{where} row {n}") for n, row in enumerate(rows)), config, where)


def _in_memory(row: Any, config: CorpusSection) -> Any:
    return {config.text: row} if isinstance(row, str) else row


def _documents(rows: Iterator[_Row], config: CorpusSection, where: str) -> Iterator[Document]:
    for name in config.keep:
        if name in RESERVED:
            raise UserError(f"corpus.keep: '{name}' is the name of a column that raylux writes; rename the field")
    missing = set(config.keep)
    number = -1
    for number, row in enumerate(islice(rows, config.limit)):
        document = _document(row, number, config)
        missing -= row.data.keys()
        yield document
    if missing and number >= 0:
        raise UserError(f"{where}: no row has the field '{min(missing)}' that corpus.keep or evaluate.marks names")


def _document(row: _Row, number: int, config: CorpusSection) -> Document:
    data = row.data
    if not isinstance(data, Mapping):
        raise UserError(f"{row.where}: a row must be an object with fields, not {_kind(data)}")
    name = _identity(row, number, config)
    keep = {column: _plain(data.get(column), f"{row.where}: the field '{column}'") for column in config.keep}
    label = None if config.label is None else _label(data, row.where, config.label)
    if data.get("input_ids") is not None:
        tokens, labels = _tokens(data, row.where)
        return Document(name, tokens=tokens, labels=labels, label=label, keep=keep, where=row.where)
    return Document(name, text=_text(data, row.where, config.text), label=label, keep=keep, where=row.where)


def _label(data: Mapping[str, Any], where: str, name: str) -> Any:
    if data.get(name) is None:
        raise UserError(f"{where}: no class in the field '{name}'; fields present: {_fields(data)} (set corpus.label)")
    return data[name]


def _identity(row: _Row, number: int, config: CorpusSection) -> str:
    if config.id is None:
        return str(number) if row.id is None else check_name(row.id, f"{row.where}: the id")
    value = row.data.get(config.id)
    if value is None:
        raise UserError(f"{row.where}: no field '{config.id}' for the id; fields present: {_fields(row.data)}")
    return check_name(value, f"{row.where}: the id in '{config.id}'")


def _text(data: Mapping[str, Any], where: str, name: str) -> str:
    if name not in data:
        raise UserError(f"{where}: no field '{name}'; fields present: {_fields(data)} (set corpus.text)")
    text = data[name]
    if not isinstance(text, str):
        raise UserError(f"{where}: the field '{name}' must be text, not {_kind(text)}")
    if not text.strip():
        raise UserError(f"{where}: the text in '{name}' is empty; remove the row")
    check_surrogates(text, f"{where}: the text in '{name}'")
    return text


def check_name(value: Any, where: str) -> str:
    """An id as text: it is printed, typed and written, so it holds no control characters and no half characters.

    Raises:
        UserError: it is neither text nor a whole number, empty, too long or not printable; begins with ``where``.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise UserError(f"{where} must be text or a whole number, not {_kind(value)}")
    name = str(value)
    if not name.strip() or len(name) > _LONGEST_NAME:
        what = f"has {len(name):,} characters, more than {_LONGEST_NAME:,}" if name.strip() else "is blank"
        raise UserError(f"{where} {what}")
    odd = odd_character(name)
    if odd is not None:
        raise UserError(f"{where} holds the character {odd}; an id must be printable")
    return name


def check_surrogates(text: str, where: str) -> None:
    """Raise a UserError that begins with ``where`` for text that no UTF-8 can hold (JSON's ``\\ud800`` can)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has half a surrogate pair at character {error.start}") from None


def _tokens(data: Mapping[str, Any], where: str) -> tuple[list[int], list[int] | None]:
    """``input_ids`` and ``labels`` of a row, without the padding that an ``attention_mask`` marks."""
    tokens = integers(data["input_ids"], f"{where}: input_ids")
    if not tokens:
        raise UserError(f"{where}: input_ids are empty; remove the row")
    labels = None if data.get("labels") is None else integers(data["labels"], f"{where}: labels")
    if labels is not None and len(labels) != len(tokens):
        raise UserError(f"{where}: {len(labels)} labels for {len(tokens)} input_ids; each token needs one (-100: none)")
    if data.get("attention_mask") is None:
        return tokens, labels
    mask = integers(data["attention_mask"], f"{where}: attention_mask")
    if len(mask) != len(tokens):
        raise UserError(f"{where}: attention_mask has {len(mask)} values for {len(tokens)} input_ids")
    kept = [position for position, value in enumerate(mask) if value]
    if not set(mask) <= {0, 1} or not kept or kept[-1] - kept[0] >= len(kept):
        raise UserError(f"{where}: attention_mask must be one run of 1 with 0 before or after it, for padding alone")
    part = slice(kept[0], kept[-1] + 1)
    return tokens[part], None if labels is None else labels[part]


def integers(values: Any, where: str) -> list[int]:
    """A list (or array) of whole numbers as a list, or a UserError that begins with ``where``."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise UserError(f"{where} must be a list of whole numbers, not {_kind(values)}")
    for position, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{where} must be whole numbers; position {position} is {_kind(value)}")
        if not -(2**31) <= value < 2**31:
            raise UserError(f"{where}: {shown(value)} at position {position} is no token id")
    return list(values)


def _rows(path: str, config: CorpusSection) -> Iterator[_Row]:
    """Rows of whatever ``path`` names. The format is settled before the first row is read."""
    if config.format == "hub":
        return _hub(path, config)
    files = find_files(path)
    if not files:
        if config.format == "auto" and _HUB_NAME.fullmatch(path) and data_suffix(path) not in (*_FORMATS, *_TEXT):
            return _hub(path, config)
        raise UserError(f"{path}: no such file or folder")
    if config.format == "auto" and any(file.name in ("state.json", "dataset_dict.json") for file in files):
        return _hub(path, config)
    kind = _format(path, files) if config.format == "auto" else config.format
    if kind == "text":
        return _text_files(files, config)
    readers: dict[str, Callable[[SourceFile, CorpusSection], Iterator[_Row]]] = {
        "jsonl": _jsonl,
        "json": _json,
        "parquet": _parquet,
    }
    return (row for file in files for row in readers[kind](file, config))


def _format(path: str, files: list[SourceFile]) -> str:
    """The one format of all files, by suffix."""
    kinds = {_FORMATS.get(data_suffix(file.name), "text") for file in files}
    if len(kinds) > 1:
        raise UserError(f"{path}: files of several formats ({', '.join(sorted(kinds))}); name those you mean by a glob")
    if len(files) == 1 and kinds == {"text"} and data_suffix(files[0].name) not in _TEXT:
        raise UserError(f"{path}: cannot tell the format by the suffix; set corpus.format (jsonl, json, parquet, text)")
    return kinds.pop()


def _jsonl(file: SourceFile, config: CorpusSection) -> Iterator[_Row]:
    with open_bytes(file.path) as stream:
        for number, line in read_lines(stream, file.path):
            where = f"{file.path} line {number}"
            text = decode_utf8(line, where).strip()
            if text:
                yield _Row(parse_json(text, where), where)


def _json(file: SourceFile, config: CorpusSection) -> Iterator[_Row]:
    """An array of objects, or one object of objects, whose keys are then the default ids."""
    with open_bytes(file.path) as stream:
        data = parse_json(decode_utf8(stream.read(), file.path), file.path)
    if isinstance(data, list):
        yield from (_Row(row, f"{file.path} row {number}") for number, row in enumerate(data))
    elif isinstance(data, dict) and all(isinstance(row, dict) for row in data.values()):
        yield from (_Row(row, f"{file.path} key '{key}'", id=key) for key, row in data.items())
    else:
        raise UserError(f"{file.path}: must hold an array of objects (or an object of objects), not {_kind(data)}")


def _parquet(file: SourceFile, config: CorpusSection) -> Iterator[_Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    with open_bytes(file.path) as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            columns = _columns(table.schema_arrow.names, file.path, config)
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for data in batch.to_pylist():
                    yield _Row(data, f"{file.path} row {number}")
                    number += 1
        # Text that is no UTF-8 and dates beyond the calendar are Python's errors, when a value is first looked at.
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            after = f" after row {number - 1}" if number else ""
            raise UserError(f"{file.path}: not a readable parquet file{after} ({one_line(error)})") from None


def _columns(names: list[str], where: str, config: CorpusSection) -> list[str]:
    """The columns to read of those that a table has."""
    wanted = {config.text, config.id, config.label, "input_ids", "labels", "attention_mask", *config.keep}
    columns = [name for name in names if name in wanted]
    if config.text not in names and "input_ids" not in names:
        raise UserError(f"{where}: no column '{config.text}'; columns: {_fields(names)} (set corpus.text)")
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise UserError(f"{where}: two columns are called '{twice}'")
    return columns


def _text_files(files: list[SourceFile], config: CorpusSection) -> Iterator[_Row]:
    for file in files:
        with open_bytes(file.path) as stream:
            data = stream.read()
        yield _Row({config.text: decode_utf8(data, file.path)}, file.path, id=file.name)


def _hub(path: str, config: CorpusSection) -> Iterator[_Row]:
    """A data set by its hub name (``owner/name``, ``owner/name:configuration``) or a local data set folder."""
    if is_url(path):
        raise UserError(f"{path}: format hub takes a data set's name or a local folder, not a URL")
    number = -1
    try:
        for number, data in enumerate(_load_hub(path, config)):
            yield _Row(data, f"{path} split {config.split} row {number}")
    except UserError:
        raise
    except Exception as error:  # as in _load_hub
        raise UserError(f"{path}: cannot be read after {number + 1} rows ({one_line(error)})") from None


def _load_hub(path: str, config: CorpusSection) -> Iterable[Mapping[str, Any]]:
    # Imported late: the library takes a second to import, and files of your own do without it.
    import datasets

    try:
        if find_files(path):
            return _local_dataset(path, config.split)
        name, _, configuration = path.partition(":")
        # With a limit only the rows that are asked for travel; offline only a whole cached data set can serve.
        streaming = config.limit is not None and not datasets.config.HF_HUB_OFFLINE
        loaded = datasets.load_dataset(name, configuration or None, split=config.split, streaming=streaming)
        return loaded
    except UserError:
        raise
    except (ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{path}: no such file or folder here, and the data set hub cannot be reached ({one_line(error)})"
        ) from None
    except Exception as error:  # the library raises what its backends raise
        raise UserError(f"{path}: the data set cannot be loaded ({one_line(error)})") from None


def _local_dataset(path: str, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    if any(file.name in ("state.json", "dataset_dict.json") for file in find_files(path)):
        loaded = datasets.load_from_disk(path)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise UserError(f"{path}: no split '{split}'; splits: {', '.join(map(str, loaded))} (set corpus.split)")
            loaded = loaded[split]
        return loaded
    return datasets.load_dataset(path, split=split)


def _plain(value: Any, where: str) -> Any:
    """A kept value as a table's cell: numbers, text and None as they are, anything else as JSON text."""
    if value is None or isinstance(value, (int, float, bool)):
        return value
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply to be kept") from None
    check_surrogates(text, where)
    return text


def _fields(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names)) or "none"


def _kind(value: Any) -> str:
    """A value's type in words of JSON."""
    names = {
        "NoneType": "null",
        "dict": "an object",
        "list": "a list",
        "str": "empty text" if isinstance(value, str) and not value else "text",
        "bool": "true or false",
        "int": "an int",
    }
    name = names.get(type(value).__name__, f"a {type(value).__name__}")
    return f"{name} ({shown(value)})" if isinstance(value, (bool, int, float)) else name
