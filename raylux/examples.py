"""Examples with features and a class, for modules in memory: from rows to what the stages read.

An example is a sequence of one token, its features of a fixed shape; its class is its label. Rows are pairs (features,
class) or records; on disk they are one safetensors file, with ids and texts in its header.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from raylux.classes import class_labels, class_number
from raylux.config import Config
from raylux.corpus import Sequences
from raylux.errors import UserError, shown
from raylux.markup import parse_json
from raylux.modules import Features
from raylux.queries import MEASUREMENTS, Query, QueryPart, records_in
from raylux.readers import check_name
from raylux.sources import read_text

ROW_KEYS = ("id", "features", "label", "text")
QUERY_KEYS = ("id", "features", "label", "contrast", "measurement", "text")
_NUMBERS = {"f": "floating", "i": "integer", "u": "integer"}


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows, checked.

    Attributes:
        features: [n, *shape].
        labels: as the rows have them, checked against no classes yet.
        ids: of the rows.
        texts: what to show of each.
    """

    features: np.ndarray
    labels: list[Any]
    ids: list[str]
    texts: list[str]


def check_config(config: Config) -> None:
    """Raises UserError for what a run of a module in memory cannot do."""
    if config.engine.backend != "local":
        raise UserError("engine.backend: a module in memory computes in process; set engine.backend=local")
    if config.prefilter.kind != "none":
        raise UserError("prefilter.kind: features share no tokens; set prefilter.kind=none")
    if config.score.token_top:
        raise UserError("score.token_top: features have no tokens; set score.token_top=0")
    if config.model.device == "cuda":
        raise UserError("model.device: a module in memory computes on the CPU; set model.device=cpu")
    if config.model.dtype == "bfloat16":
        raise UserError("model.dtype: a module in memory computes in float32 or float64")


def collect(rows: Any, dtype: str, where: str = "train") -> Examples:
    """Rows in memory, a data set of torch among them.

    Args:
        rows: pairs (features, class), or records with ``ROW_KEYS``.
        dtype: of features that are no whole numbers.
        where: what messages call them.

    Raises:
        UserError: there are none, or one is not like the others.
    """
    features: list[np.ndarray] = []
    labels, ids, texts = [], [], []
    seen: set[str] = set()
    for number, row in enumerate(_rows(rows)):
        place = f"{where} row {number}"
        record = as_record(row, place, ROW_KEYS)
        array = feature_array(record["features"], dtype, place)
        if features and array.shape != features[0].shape:
            raise UserError(
                f"{place}: features of shape {list(array.shape)}, those before are {list(features[0].shape)}"
            )
        name = check_name(record.get("id", number), f"{place}: the id")
        if name in seen:
            raise UserError(f"{place}: the id '{name}' was already used")
        seen.add(name)
        features.append(array)
        labels.append(plain_label(record["label"]))
        ids.append(name)
        texts.append(str(record.get("text", f"example {name}")))
    if not features:
        raise UserError(f"{where}: there is no example")
    if len({array.dtype.kind for array in features}) > 1:
        raise UserError(f"{where}: some features are whole numbers and others are not; give all of one kind")
    return Examples(np.stack(features), labels, ids, texts)


def _rows(rows: Any) -> Iterator[Any]:
    """One row after the other; a data set that can only be indexed has no other end than its length."""
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__") and not hasattr(rows, "__iter__"):
        return (rows[place] for place in range(len(rows)))
    if not isinstance(rows, Iterable) or isinstance(rows, Mapping):
        raise UserError(f"examples: {shown(type(rows).__name__)} is no list of pairs (features, class)")
    return iter(rows)


def as_record(row: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    """A pair (features, class), or a record with these keys.

    Raises:
        UserError: it is neither.
    """
    if isinstance(row, Mapping):
        record = dict(row)
        odd = next((key for key in record if key not in keys), None)
        if odd is not None:
            raise UserError(f"{where}: unknown key {shown(odd)}; known: {', '.join(keys)}")
    elif isinstance(row, tuple | list) and len(row) == 2:
        record = {"features": row[0], "label": row[1]}
    else:
        raise UserError(f"{where}: must be a pair (features, class) or a record with features and label")
    for key in ("features", "label"):
        if record.get(key) is None:
            raise UserError(f"{where}: no '{key}'")
    return record


def feature_array(values: Any, dtype: str, where: str) -> np.ndarray:
    """Features as an array, whole numbers as int64, others in ``dtype``; without the axes that a number has not.

    Raises:
        UserError: they are no finite numbers.
    """
    try:
        array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: features must be an array of numbers ({error})") from None
    if array.dtype.kind not in _NUMBERS or not array.size:
        raise UserError(f"{where}: features must be an array of numbers, not {shown(values)}")
    if not np.isfinite(array).all():
        raise UserError(f"{where}: NaN or infinity in the features")
    return array.astype(dtype if array.dtype.kind == "f" else np.int64)


def plain_label(value: Any) -> Any:
    """A class as plain data: tensors and numpy's numbers hold one."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", None) != 0 else value


def write(path: Path, examples: Examples) -> None:
    """Write examples to a safetensors file."""
    head = {"ids": examples.ids, "texts": examples.texts, "labels": examples.labels}
    save_file({"features": examples.features}, str(path), {"rows": json.dumps(head)})


def load(path: str, features: Features) -> Sequences:
    """Examples of a file that ``write`` left, as the stages read them.

    Raises:
        UserError: a row has a class that the module does not have.
    """
    import pandas as pd

    with safe_open(path, "np") as opened:
        array = opened.get_tensor("features")
        rows = parse_json(opened.metadata()["rows"], path)
    classes = class_numbers(rows["labels"], features)
    names = [features.classes[number] for number in classes]
    table = pd.DataFrame({"sequence": rows["ids"], "document": rows["ids"], "text": rows["texts"], "label": names})
    offsets = np.arange(len(array) + 1, dtype=np.int64)
    return Sequences(array, offsets, None, table, classes=np.array(classes, np.int32))


def class_numbers(labels: Sequence[Any], features: Features) -> list[int]:
    """The class of each row; raises UserError where the module does not have it."""
    return [
        class_number(label, features.classes, f"train row {number}: the class") for number, label in enumerate(labels)
    ]


def load_questions(path: str, features: Features, dtype: str) -> list[Query]:
    """Queries of a jsonl file; see ``parse_questions``."""
    return parse_questions(records_in(read_text(path), path), features, dtype)


def parse_questions(records: Any, features: Features, dtype: str, where: str = "queries") -> list[Query]:
    """Queries from records with ``QUERY_KEYS``: f = Σ weight · log p(class | features).

    Raises:
        UserError: there is none, or one does not fit; the line names it.
    """
    if not isinstance(records, list | tuple) or not records:
        raise UserError(f"{where}: holds no query")
    found: dict[str, Query] = {}
    for number, row in enumerate(records):
        query = _question(row, number, features, dtype, f"{where} row {number}")
        if query.id in found:
            raise UserError(f"{where} row {number}: the id '{query.id}' was already used")
        found[query.id] = query
    return list(found.values())


def _question(row: Any, number: int, features: Features, dtype: str, where: str) -> Query:
    record = as_record(row, where, QUERY_KEYS)
    name = check_name(record.get("id", number), f"{where}: the id")
    measurement = record.get("measurement", "logprob")
    if measurement not in MEASUREMENTS:
        raise UserError(f"{where}: unknown measurement {shown(measurement)}; known: {', '.join(MEASUREMENTS)}")
    if (measurement == "contrast") != ("contrast" in record):
        raise UserError(f"{where}: 'contrast' (the other class) and 'measurement: contrast' go together")
    array = feature_array(record["features"], dtype, where)
    if array.shape != features.shape or (array.dtype.kind == "i") != features.whole:
        kind = "whole numbers" if features.whole else "real numbers"
        raise UserError(f"{where}: the features must be {kind} of shape {list(features.shape)}, as those of train")
    numbers = [
        class_number(plain_label(record[key]), features.classes, f"{where}: '{key}'")
        for key in ("label", "contrast")
        if key in record
    ]
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{where}: 'label' and 'contrast' are the same class, f would be 0")
    weights = (-1.0,) if measurement == "loss" else (1.0, -1.0)
    parts = tuple(
        QueryPart(array[None], class_labels(1, label), weight) for label, weight in zip(numbers, weights, strict=False)
    )
    plain = {**record, "id": name, "features": array.tolist()}
    plain |= {key: plain_label(plain[key]) for key in ("label", "contrast") if key in plain}
    return Query(name, measurement, parts, plain, np.zeros(0, np.int32))
