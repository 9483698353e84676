"""What takes long and is one piece: a file, read where it is and never made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

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
