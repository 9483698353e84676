"""A plan as tables: of rich for a terminal, of Markdown for docs/scaling.md, from the same rows."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from raylux.cost.costs import Choice, RunPlan, StageCost
from raylux.shown import plain

STAGES = ("stage", "worker", "shards", "disk", "moved", "FLOPs", "time", "idle", "device-hours")
WORK = ("stage", "work", "FLOPs", "bytes", "device-hours")
CHOICES = ("choice", "value", "why")


def bytes_text(size: float) -> str:
    """Powers of 1000, three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:
            return f"{size:.3g} {unit}" if size else "0"
        size /= 1000
    return f"{size:,.3g} PB"


def time_text(seconds: float) -> str:
    """In the unit that suits."""
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 5970 else f"{seconds / 3600:.3g} h"


def flops_text(flops: float) -> str:
    """FLOPs with a power of ten."""
    return f"{flops:.2e}" if flops else "0"


def hours_text(hours: float) -> str:
    """Device-hours."""
    return f"{hours:.2f}" if hours >= 0.005 or not hours else f"{hours:.1e}"


def stage_rows(plan: RunPlan) -> list[list[str]]:
    """A row per stage and one of totals; dollars where there is a price."""
    rows = [_stage_row(stage, plan.price) for stage in plan.stages]
    total = ["total", "", "", bytes_text(plan.disk_bytes), "", flops_text(sum(s.flops for s in plan.stages))]
    total += [time_text(plan.seconds), "", hours_text(plan.device_hours)]
    return [*rows, total if plan.dollars is None else [*total, f"{plan.dollars:,.2f}"]]


def stage_names(plan: RunPlan) -> tuple[str, ...]:
    """Headers of ``stage_rows``."""
    return STAGES if plan.price is None else (*STAGES, "$")


def _stage_row(stage: StageCost, price: float | None) -> list[str]:
    sizes = (stage.worker_bytes, stage.shard_bytes, stage.disk_bytes, stage.moved_bytes)
    row = [stage.name, *map(bytes_text, sizes), flops_text(stage.flops), time_text(stage.seconds)]
    row += [f"{max(0.0, stage.idle):.0%}", hours_text(stage.device_hours)]
    return row if price is None else [*row, f"{stage.device_hours * price:,.2f}"]


def work_rows(plan: RunPlan) -> list[list[str]]:
    """A row per stage and kind of work; what takes nothing is left out."""
    return [
        [stage.name, work.kind, flops_text(work.flops), bytes_text(work.bytes), hours_text(work.seconds / 3600)]
        for stage in plan.stages
        for work in stage.works
        if work.seconds
    ]


def choice_rows(choices: Sequence[Choice]) -> list[list[str]]:
    """A row per choice; what the engine does not do yet is marked."""
    return [
        [choice.name, choice.value + ("" if choice.in_engine else " (not in the engine yet)"), choice.reason]
        for choice in choices
    ]


def rich_table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """For a terminal; columns of numbers to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    texts = {"stage", "work", "choice", "value", "why"}
    for name in names:
        table.add_column(name, justify="left" if name in texts else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown."""
    texts = {"stage", "work", "choice", "value", "why", "model"}
    rule = ["---" if name in texts else "--:" for name in names]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [names, rule, *rows])
