"""What the commands print: rich tables for people, json and csv for programs, one line for a mishap.

Texts of a corpus are foreign: nothing of them may steer a terminal. Tables and csv escape control
characters with ``raylux.report.tables.plain``; json escapes everything beyond ASCII and stays lossless.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from raylux.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from raylux.api import Run
    from raylux.models import Coverage, SkippedLayer

SIGN = "positive: training on the sequence raises the measurement"
_PIPE_WIDTH = 120


def console() -> Console:
    """A rich console on stdout that leaves a closed pipe to ``main``."""
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> NoReturn:
            raise BrokenPipeError  # rich itself would exit with 1

    knows_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return PipeConsole(width=None if knows_width else _PIPE_WIDTH, highlight=False)


def say(line: str) -> None:
    """Print one line on stderr; what is not printable is escaped."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    with contextlib.suppress(BrokenPipeError):
        print(f"raylux: {escaped}", file=sys.stderr, flush=True)


def print_status(run: Run) -> None:
    """The stages of a run, and the command that makes the first missing one."""
    from raylux.report import tables

    status = run.status()
    out = console()
    out.print(tables.status_table(status))
    missing = next((stage for stage in status if not stage.done), None)
    hint = f"next: {missing.command}" if missing else f"look: raylux top {run.folder} --query {run.queries[0]} -k 10"
    out.print(tables.plain(hint), markup=False, soft_wrap=True)


def print_skipped(out: Console, covered: Coverage) -> None:
    """One line per reason for which layers are not tracked."""
    by_reason: dict[str, list[SkippedLayer]] = defaultdict(list)
    for layer in covered.skipped:
        by_reason[layer.reason].append(layer)
    for reason, layers in by_reason.items():
        parameters = sum(layer.parameters for layer in layers)
        names = ", ".join(layer.name for layer in layers[:3]) + (", …" if len(layers) > 3 else "")
        line = f"skipped: {len(layers)} layers, {parameters:,} parameters: {reason} ({names})"
        out.print(line, markup=False, soft_wrap=True)


def known(name: str, names: Sequence[str], where: str) -> str:
    """``name`` if it is one of the queries ``names``.

    Raises:
        UserError: it is not; the message has the nearest one, or the first few.
    """
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(list(names)[:10])}"
    raise UserError(f"{where}: no query '{name}'; {hint}")


def with_meaning(frame: pd.DataFrame, query: str, unit: str) -> pd.DataFrame:
    """A frame of ``Run.top`` with the columns query, unit and sign; kept columns of these names become kept.NAME."""
    meaning = {"query": query, "unit": unit, "sign": SIGN}
    renamed = frame.rename(columns={name: f"kept.{name}" for name in meaning if name in frame.columns})
    renamed.insert(0, "query", query)
    return renamed.assign(unit=unit, sign=SIGN)


def as_json(frames: Sequence[pd.DataFrame]) -> str:
    """All rows as one list of records; NaN becomes null."""
    records = [_plain_value(row) for frame in frames for row in frame.to_dict("records")]
    return json.dumps(records, indent=1, allow_nan=False, default=str) + "\n"


def as_csv(frames: Sequence[pd.DataFrame]) -> str:
    """All rows under one header; control characters of texts and names escaped, numbers in full precision."""
    import pandas as pd

    from raylux.report.tables import plain

    def cell(value: Any) -> Any:
        return plain(value) if isinstance(value, str) else value

    return pd.concat(frames, ignore_index=True).map(cell).rename(columns=plain).to_csv(index=False)


def _plain_value(value: Any) -> Any:
    """Numbers of numpy as Python's, NaN and infinities as None, containers likewise."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
