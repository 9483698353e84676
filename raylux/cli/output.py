"""What the commands print: rich tables for people, json and csv for programs, one line for a mishap.

Texts of a corpus are foreign: nothing of them may steer a terminal. Tables and csv escape control
characters with ``raylux.shown.plain``; json escapes everything beyond ASCII and stays lossless.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from raylux.errors import UserError
from raylux.shown import plain, redacted

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from raylux.api import Run
    from raylux.doctor import Finding
    from raylux.health import Quarantined
    from raylux.models import Coverage, SkippedLayer

SIGN = "positive: training on the sequence raises the measurement"
_PIPE_WIDTH = 120


def console() -> Console:
    """A rich console on stdout that leaves a closed pipe to ``main``.

    What it prints is what it is given: neither ``[red]`` nor ``:boom:`` in a text means anything to it.
    """
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> NoReturn:
            raise BrokenPipeError  # rich itself would exit with 1

    knows_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return PipeConsole(width=None if knows_width else _PIPE_WIDTH, highlight=False, markup=False, emoji=False)


def say(line: str) -> None:
    """Print one line on stderr; what is not printable is escaped, secrets are left out."""
    with contextlib.suppress(BrokenPipeError):
        print(f"raylux: {plain(redacted(line))}", file=sys.stderr, flush=True)


def print_profile(run: Run) -> None:
    """Where the time of a run went."""
    from raylux.report import tables

    stages = run.profile()
    if stages:
        console().print(tables.profile_table(stages))
    else:
        console().print(f"{plain(run.folder)}: no profile; a run folder at a URL keeps no progress.jsonl")


def print_status(run: Run) -> None:
    """The stages of a run, and the command that makes the first missing one."""
    from raylux.report import tables

    status = run.status()
    console().print(tables.status_table(status))
    print_next(run)


def print_next(run: Run) -> None:
    """The command that makes the first missing stage, or shows what is there."""
    missing = next((stage for stage in run.status() if not stage.done), None)
    hint = f"next: {missing.command}" if missing else f"look: raylux top {run.folder} --query {run.queries[0]} -k 10"
    _line(console(), hint)


def print_calibration(run: Run) -> None:
    """One line: what a run's scores are to be multiplied by, or that nobody knows."""
    text = sizes_line(run)
    if text:
        _line(console(), text)


def sizes_line(run: Run) -> str:
    """Whether the sizes of a run's scores are calibrated; empty where they have none."""
    if run.unit not in ("nats", "raw"):
        return ""
    if run.segment is not None:
        return "one segment of a training: sizes go by curvature.segment, and add up with those of the other segments"
    if run.carried:
        return "through a later stage of training: sizes go by the λ of both stages, and cannot be calibrated"
    found = run.calibration
    if found is None:
        return f"not calibrated: sizes may be off by a factor of 2 to 10; raylux calibrate {run.folder}"
    return f"{found}; d_eff/N = {found.share:.2g}"


def print_problems(problems: Sequence[str]) -> None:
    """One line per missing or damaged object, and what to do."""
    out = console()
    for problem in problems:
        _line(out, f"damaged: {problem}")
    if problems:
        _line(
            out,
            f"{len(problems):,} in all; `raylux run CONFIG --restart STAGE` computes what is damaged anew",
        )
    else:
        _line(out, "verified: every object is as it was written")


def print_quarantine(units: Sequence[Quarantined]) -> None:
    """One line per unit that was given up: which sequences are missing, and why."""
    out = console()
    for unit in units:
        some = ", ".join(unit.sequences[:5]) + (", …" if len(unit.sequences) > 5 else "")
        count = len(unit.sequences)
        _line(
            out,
            f"quarantined: {unit.stage} {unit.unit}, {count:,} sequence{'s' * (count != 1)} ({some}): "
            f"{unit.deaths} workers died of it; {unit.reason}",
        )


def quarantine_summary(run: Run) -> str:
    """How many units of a run were given up, and how to see them."""
    count = len(run.quarantined)
    what = "1 unit is" if count == 1 else f"{count} units are"
    return f"{what} quarantined and missing in the results; raylux inspect {run.folder} lists them"


def print_numerics(mixed: Mapping[str, Sequence[str]]) -> None:
    """One line if units of a run were computed on unlike machines."""
    if mixed:
        said = "; ".join(f"{name}: {', '.join(values)}" for name, values in mixed.items())
        _line(console(), f"computed on unlike machines ({said}): equal bits are not promised")


def print_finding(out: Console, finding: Finding) -> None:
    """One line of ``raylux doctor``; where it is no ok, what to do stands behind it."""
    from rich.table import Table
    from rich.text import Text

    detail = plain(redacted(finding.detail))
    advice = f" → {plain(redacted(finding.advice))}" if finding.advice else ""
    if not out.is_terminal:  # for grep: one line, however long
        out.print(f"{finding.state:<4}  {plain(finding.name):<9}  {detail}{advice}", soft_wrap=True)
        return
    row = Table.grid(padding=(0, 2))
    row.add_column(width=4)
    row.add_column(width=9)
    row.add_column(ratio=1, overflow="fold")
    style = {"ok": "green", "warn": "yellow"}.get(finding.state, "bold red")
    row.add_row(Text(finding.state, style=style), Text(plain(finding.name)), Text(detail).append(advice, style="bold"))
    out.print(row)


def print_skipped(out: Console, covered: Coverage) -> None:
    """One line per reason for which layers are not tracked."""
    by_reason: dict[str, list[SkippedLayer]] = defaultdict(list)
    for layer in covered.skipped:
        by_reason[layer.reason].append(layer)
    for reason, layers in by_reason.items():
        parameters = sum(layer.parameters for layer in layers)
        names = ", ".join(layer.name for layer in layers[:3]) + (", …" if len(layers) > 3 else "")
        _line(out, f"skipped: {len(layers)} layers, {parameters:,} parameters: {reason} ({names})")


def _line(out: Console, text: str) -> None:
    """One line, never wrapped by us, that steers nothing and tells no secret."""
    out.print(plain(redacted(text)), soft_wrap=True)


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
