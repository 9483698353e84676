"""Tables for a terminal, readable at 100 columns: rich tables from what a run, a model or a query holds.

Texts of a corpus are foreign: they pass through ``plain`` before they reach a terminal, and are put into
cells as text, never as rich markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from raylux.report import profile
from raylux.shown import plain, visible

if TYPE_CHECKING:
    import pandas as pd

    from raylux.calibrated import Calibration
    from raylux.evaluate import Agreement
    from raylux.evaluation.outcome import Verdict
    from raylux.layers import Coverage, TrackedLayer
    from raylux.report.across import Across
    from raylux.report.profile import StageTime
    from raylux.report.watching import Seen

_TEXT_WIDTH = 180
_KEPT_WIDTH = 40
# Kept columns of fewer characters stand on the text's first line.
_SHORT = 20
_FIXED = ("rank", "influence", "prefilter", "sequence", "document", "text")


def number(value: float, signed: bool = True) -> str:
    """Three significant digits, with a sign; a dash where there is no number."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    sign = "+" if signed else ""
    size = math.floor(math.log10(abs(value)))
    if -4 <= size < 6:
        return f"{value:{sign}.{max(0, 2 - size)}f}"
    return f"{value:{sign}.2e}"


def top_table(frame: pd.DataFrame, title: str, unit: str | None = None) -> Table:
    """The most influential sequences (or documents) of a query, one per row, best first.

    Args:
        frame: as ``Run.top`` gives it: rank, sequence or document, influence, prefilter, kept columns, text.
            The kept columns stand above the text, in its cell: side by side they would leave it no room. The
            document of a sequence is not shown, its id begins with it.
        title: stands above the table.
        unit: of the influence, for the header; default: ``frame.attrs["unit"]`` if it is there.
    """
    unit = unit or frame.attrs.get("unit")
    table = _table(title)
    columns = [name for name in _FIXED[:5] if name in frame.columns]
    if "sequence" in columns and "document" in columns:
        columns.remove("document")
    kept = [name for name in frame.columns if name not in _FIXED]
    for name in columns:
        heading = f"influence (± {unit})" if name == "influence" and unit else name
        if name in ("sequence", "document"):
            table.add_column(name, max_width=16, overflow="fold")
        else:
            table.add_column(Text(plain(heading)), justify="right", max_width=11)
    heading = " · ".join([*kept, "text"]) if "text" in frame.columns else ""
    table.add_column(Text(plain(heading)), min_width=36, overflow="fold")
    for record in frame.to_dict("records"):
        row = {str(name): value for name, value in record.items()}
        cells = [_fixed_cell(name, row[name]) for name in columns]
        table.add_row(*cells, _text_cell(row, kept))
    return table


def self_influence_table(frame: pd.DataFrame, title: str) -> Table:
    """The sequences that teach the model most about themselves: ``Run.self_influence``, ranked."""
    numbers = ("self_influence", "norm", "step")
    table = _table(title)
    table.add_column("rank", justify="right")
    for name in ("self-influence", "‖∇log p‖", "‖step‖"):
        table.add_column(name, justify="right", max_width=14)
    table.add_column("sequence", max_width=16, overflow="fold")
    kept = [name for name in frame.columns if name not in (*_FIXED, *numbers)]
    table.add_column(Text(plain(" · ".join([*kept, "text"]))), min_width=36, overflow="fold")
    for record in frame.to_dict("records"):
        row = {str(name): value for name, value in record.items()}
        cells = [number(row[name], signed=False) for name in numbers]
        table.add_row(str(row["rank"]), *cells, Text(plain(str(row["sequence"]))), _text_cell(row, kept))
    return table


def _text_cell(row: Mapping[str, Any], kept: Sequence[str]) -> Text:
    said = [plain(str(row[name]), _KEPT_WIDTH) for name in kept if str(row[name]) not in ("", "nan")]
    cell = Text(" · ".join(said), style="dim")
    if said and "text" in row:
        cell.append(" · " if len(cell) < _SHORT else "\n")
    return cell.append(plain(str(row.get("text", "")), _TEXT_WIDTH), style="not dim")


def coverage_table(covered: Coverage) -> Table:
    """Every tracked layer of a model with its shape; one line for the same matrix of all experts of a block."""
    layers = covered.tracked
    table = _table(f"{len(layers)} tracked layers, {covered.share:.1%} of {covered.parameters:,} parameters")
    table.add_column("layer", overflow="fold")
    table.add_column("inputs", justify="right")
    table.add_column("outputs", justify="right")
    table.add_column("kind")
    table.add_column("parameters", justify="right")
    lines: dict[str, list[TrackedLayer]] = {}
    for layer in layers:
        lines.setdefault(layer.pool or layer.name, []).append(layer)
    for name, members in lines.items():
        layer = members[0]
        plain_kind = "Embedding, by word" if layer.words else "Conv1D" if layer.conv1d else "Linear"
        kind = plain_kind + (", bias" if layer.bias else "")
        if layer.routed:
            kind += f" of {len(members)} expert{'s' * (len(members) > 1)}, {layer.share:.0%} of the tokens each"
        inputs = layer.inputs - int(layer.bias)  # M counts the bias coordinate
        parameters = sum(member.parameters for member in members)
        table.add_row(Text(plain(name)), f"{inputs:,}", f"{layer.outputs:,}", kind, f"{parameters:,}")
    return table


def status_table(stages: Iterable[Any]) -> Table:
    """What a run holds: one row per ``StageStatus`` (name, done, detail, command)."""
    table = _table(None)
    table.add_column("stage", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("what is there", ratio=1, overflow="fold")
    table.add_column("made by", ratio=1, overflow="fold")
    for stage in stages:
        state = Text("done", style="green") if stage.done else Text("missing", style="yellow")
        command = "" if stage.done else plain(stage.command)
        table.add_row(Text(plain(stage.name)), state, Text(plain(stage.detail)), Text(command))
    return table


def profile_table(stages: Sequence[StageTime]) -> Table:
    """Where the time of a run went: per stage the kinds of work of workers and shards, then what the driver did."""
    work, clock = profile.total(stages)
    table = _table(f"{_seconds(work)} s of workers and shards, {_seconds(clock)} s on the driver's clock")
    for name in ("stage", "work", "seconds", "CPU s", "share", "units", "tokens/s"):
        table.add_column(name, justify="left" if name in ("stage", "work") else "right")
    for stage in stages:
        cpu = sum(cpu for _, _, cpu in profile.by_size(stage.work))
        rate = "–" if math.isnan(stage.rate) else f"{stage.rate:,.0f}"
        share = f"{stage.seconds / work:.1%}" if work else "–"
        whole = (_seconds(stage.seconds), _seconds(cpu), share, f"{stage.units:,}", rate)
        table.add_row(Text(plain(stage.stage)), "all", *whole, style="bold")
        for kind, wall, cpu in profile.by_size(stage.work):
            table.add_row("", kind, _seconds(wall), _seconds(cpu), f"{wall / work:.1%}" if work else "–")
        for kind, wall, cpu in profile.by_size(stage.driver):
            table.add_row("", f"driver: {kind}", _seconds(wall), _seconds(cpu), style="dim")
    return table


def watch_table(found: Seen, driver: object | None, now: float) -> Table:
    """How far a run is; ``driver``: who works on it, ``now``: seconds since 1970."""
    ago = f"; last word {clock(max(0.0, now - found.last))} ago" if found.last else ""
    table = _table(plain((f"driver: {driver}" if driver else "no driver works on it") + ago))
    for name in ("stage", "done", "of", "", "%", "time", "left"):
        table.add_column(name, justify="left" if name in ("stage", "") else "right")
    for stage in found.stages:
        share = f"{stage.done / stage.total:.0%}" if stage.total else "–"
        left = "" if stage.state == "done" else "–" if stage.left is None else clock(stage.left)
        title = Text(plain(stage.stage), style="" if stage.state == "done" else "bold")
        table.add_row(
            title, f"{stage.done:,}", f"{stage.total:,}", plain(stage.what), share, clock(stage.seconds), left
        )
    parts = []
    if driver:
        parts = [f"{len(found.workers)} workers", f"{found.rate:,.0f} tokens/s in the last minute"]
    if found.deaths:
        parts.append(f"{found.deaths} died, last {plain(found.trouble)}")
    table.caption = Text("; ".join(parts))
    return table


def watch_line(found: Seen) -> str:
    """The stage that is worked on, in a line; empty where none is."""
    stage = found.working
    if stage is None:
        return ""
    left = "" if stage.left is None else f", about {clock(stage.left)} left"
    return plain(f"{stage.stage}: {stage.done:,} of {stage.total:,} {stage.what}{left}")


def across_table(found: Across, most: int = 10) -> Table:
    """The sequences that are among the best of several queries, those of most queries first."""
    several = found.sequences[found.sequences["queries"] > 1]
    more = f", {len(several) - most:,} more in the file" if len(several) > most else ""
    table = _table(f"sequences among the best of several of {found.queries:,} queries{more}")
    for name in ("queries", "weight", "sequence", "strongest for"):
        table.add_column(name, justify="right" if name in ("queries", "weight") else "left", overflow="fold")
    for row in several.head(most).to_dict("records"):
        cells = (f"{row['queries']:,}", f"{row['weight']:.2f}", plain(row["sequence"], 60), plain(row["strongest"], 60))
        table.add_row(*map(Text, cells))
    return table


def cluster_table(found: Across, most: int = 10) -> Table:
    """The clusters of queries that share their influences, the largest first."""
    together = found.clusters[found.clusters["size"] > 1]
    alone = int((found.clusters["size"] == 1).sum())
    table = _table(f"queries that share their influences; {alone:,} share little with any other")
    for name in ("queries", "alike", "shared most", "which"):
        table.add_column(name, justify="right" if name in ("queries", "alike") else "left", overflow="fold")
    for _, part in list(together.groupby("cluster"))[:most]:
        names = part["query"].tolist()
        which = ", ".join(plain(name, 40) for name in names[:6]) + (", …" if len(names) > 6 else "")
        cells = (f"{len(names):,}", f"{part['alike'].mean():.2f}", plain(part["shared"].iloc[0], 40), which)
        table.add_row(*map(Text, cells))
    return table


def calibration_table(found: Calibration) -> Table:
    """The queries that a run is calibrated by: own slope and R², residual and products of the better solve."""
    table = _table(f"scores of better solves on those of the run; d_eff = {found.freedom:,.1f}, {found.share:.2g} of N")
    for name in ("query", "slope", "R²", "residual", "products"):
        table.add_column(name, justify="left" if name == "query" else "right", overflow="fold")
    for query, row in found.queries.iterrows():
        cells = f"{row['slope']:.3f}", f"{row['r_squared']:.3f}", f"{row['residual']:.1e}", f"{row['products']:.0f}"
        table.add_row(Text(plain(str(query), 40)), *cells)
    return table


def verification_table(frame: pd.DataFrame) -> Table:
    """A row per pair that was asked for (``top`` and ``random``): predictions beside what was measured, in nats."""
    doses, train_size = frame.attrs["doses"], frame.attrs["train_size"]
    large = doses["size"] * doses["factor"]
    table = _table(
        f"nats per copy among N = {train_size:,}, measured by ±{doses['size']:g} and ±{large:g} copies at the proximal "
        f"optimum on {frame.attrs['sequences']:,} sequences"
    )
    names = ("query", "sequence", "chosen", "predicted", "calibrated", "solved", "measured", "±", "", "whole", "by h")
    for name in names:
        left = name in ("query", "sequence", "chosen", "")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for row in frame[frame["chosen"] != "cross"].to_dict("records"):
        said = [number(row[name]) for name in ("predicted", "calibrated", "solved")]
        measured = number(row["measured"]) if row["resolved"] else "below noise"
        error = number((row["high"] - row["low"]) / 2 if row["resolved"] else row["noise"], signed=False)
        note = "" if row["linear"] or not row["resolved"] else "not linear"
        names_of = (Text(plain(row[name], 24)) for name in ("query", "sequence", "chosen"))
        table.add_row(*names_of, *said, measured, error, note, number(row["whole"]), number(row["whole_leverage"]))
    cross = int((frame["chosen"] == "cross").sum())
    if cross:
        table.caption = f"{cross:,} pairs of a query with the top of another one are counted below"
    return table


def perturbation_table(frame: pd.DataFrame, k: int, title: str) -> Table:
    """The k inputs that move a score most, of ``Perturbation.table``: tokens by their norm, features by their size."""
    shown = ("token", "norm", "projection") if "token" in frame.columns else ("value", "gradient")
    size = frame[shown[1]].abs()
    table = _table(title)
    for name in ("position", *shown):
        table.add_column(name, justify="left" if name == "token" else "right", overflow="fold")
    for row in frame.loc[size.sort_values(ascending=False, kind="stable").index[:k]].to_dict("records"):
        cells = [Text(plain(row[name])) if name == "token" else number(row[name], name != "norm") for name in shown]
        table.add_row(str(row["position"]), *cells)
    return table


def agreement_table(found: Mapping[str, Agreement]) -> Table:
    """How measured changes follow each kind of prediction."""
    table = _table("measured per predicted over all pairs")
    for name in ("prediction", "pairs", "slope", "90 %", "R²"):
        table.add_column(name, justify="left" if name == "prediction" else "right")
    for name, one in found.items():
        slope = one.slope
        table.add_row(
            name, f"{one.pairs:,}", f"{slope.value:.3f}", f"{slope.low:.3f} to {slope.high:.3f}", f"{one.r_squared:.3f}"
        )
    return table


def evaluation_table(verdict: Verdict, against: str) -> Table:
    """A figure of every estimator of an evaluation, the best first."""
    table = _table(f"{verdict.test}: {verdict.figure}")
    against = verdict.against or against
    for heading in (verdict.rows, "90 %", f"above {against}"):
        table.add_column(Text(plain(heading)), justify="left" if heading == verdict.rows else "right")
    for name in verdict.order():
        table.add_row(Text(plain(name)), *verdict_cells(verdict, name, against))
    table.caption, table.caption_justify = Text(verdict.what), "left"
    return table


def verdict_cells(verdict: Verdict, name: str, against: str) -> tuple[str, str]:
    """An estimator's figure with its interval, and the difference to the one that others are compared with."""
    above = verdict.found.above[name]
    # Gaps go over orders of magnitude.
    digits = ".3g" if verdict.rows == "gap" else ".3f"
    one, *many = (
        f"{found.value:{sign}{digits}} ({found.low:{sign}{digits}} to {found.high:{sign}{digits}})"
        for found, sign in ((verdict.found.lds[name], ""), (above, "+"))
    )
    return one, "" if name == against else many[0]


def clock(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3:05 min, 2:07 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else "<0.001"


def split_table(rows: Iterable[tuple[str, bool, int]], label: str | None = None) -> Table:
    """How a query is split into tokens; each row is (token's text, whether it is measured, position).

    Args:
        rows: in order.
        label: the class that is measured, of a text as a whole, where the model is a classifier.
    """
    measures = "those marked" if label is None else f"'{plain(label)}' given all of them"
    table = _table(f"tokens of the query; what is measured is the log probability of {measures}")
    table.add_column("position", justify="right")
    table.add_column("token", overflow="fold")
    table.add_column("part")
    for text, measured, position in rows:
        # Quotes show leading blanks, which decide how a token is read.
        part = "completion, measured" if measured else "prompt"
        shown = Text("'" + visible(text) + "'", style="bold" if measured and label is None else "")
        table.add_row(str(position), shown, part if label is None else "text")
    return table


def comparison_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Methods side by side: one mapping per method with equal keys.

    Floats in [0, 1] under a heading that does not begin with ``mean`` are shares and printed with two digits.
    """
    table = _table(title)
    for name in rows[0] if rows else ():
        table.add_column(Text(plain(name)), justify="left" if name == "method" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_comparison_cell(value)) for value in row.values()))
    return table


def _table(title: str | None) -> Table:
    shown = Text(plain(title), style="bold") if title else None
    return Table(
        title=shown,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        header_style="bold",
    )


def _fixed_cell(name: str, value: Any) -> Text:
    if name == "influence":
        return Text(number(float(value)), style="red" if value < 0 else "green")
    if name == "prefilter":
        return Text(number(float(value), signed=False))
    return Text(plain(str(value), 60))


def _comparison_cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else plain(str(value))
