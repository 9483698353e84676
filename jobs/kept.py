"""What takes long and is one piece: a file, read where it is and never made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Arrays = dict[str, np.ndarray]
"""A result: arrays by name."""


def kept(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """The result that lies at ``path``; made and put there, whole or not at all, where it does not."""
    if not path.exists():
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **result)
        partial.replace(path)
    with np.load(path) as found:
        return dict(found)


def folder_name(settings: DataclassInstance, without: str = "") -> str:
    """Of the folder of a study's results: other settings, other results; but for the field ``without``."""
    own = {name: value for name, value in asdict(settings).items() if name != without}
    return hashlib.blake2b(json.dumps(own).encode(), digest_size=8).hexdigest()
