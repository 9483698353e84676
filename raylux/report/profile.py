"""Where the time of a run went: the events of progress.jsonl, summed by stage and kind of work."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raylux.profiling import KINDS, Spent

# Of the run's work, below which a kind is not named in a bar.
_NAMED = 0.03
# Hues that stay apart for most eyes, on white and on black; the kinds of ``KINDS`` take them in turn.
COLOURS = (
    "#b07aa1", "#9c755f", "#4e79a7", "#76b7b2", "#f28e2b", "#e15759", "#edc948", "#59a14f", "#86bc86",
    "#3b5b92", "#ff9da7", "#8c564b", "#17a2a2", "#c5b0d5", "#7f7f7f", "#bab0ac", "#aaaa55", "#555599", "#d37295",
    "#6b8e23",
)  # fmt: skip


@dataclass
class StageTime:
    """What a stretch of work took, in all commands that worked on it, repeated units included.

    Attributes:
        stage: as the progress bar calls it.
        work: of gradient workers and factor shards; ``work.kinds``: kind -> [wall, CPU] seconds.
        driver: of the driver, its waiting for them included: they sum to the stretch's time on the clock.
        units: calls of a worker, or of a shard where each stands for a unit, that finished.
    """

    stage: str
    work: Spent = field(default_factory=Spent)
    driver: Spent = field(default_factory=Spent)
    units: int = 0

    @property
    def seconds(self) -> float:
        """Wall seconds of all workers and shards together."""
        return seconds(self.work)

    @property
    def rate(self) -> float:
        """Tokens per second on the driver's clock; NaN where no token was counted."""
        clock = seconds(self.driver)
        return self.work.tokens / clock if clock and self.work.tokens else math.nan


def seconds(spent: Spent) -> float:
    """Wall seconds of every kind together."""
    return sum(wall for wall, _ in spent.kinds.values())


def parsed(raw: bytes) -> list[dict[str, Any]]:
    """The lines of progress.jsonl that are whole; nothing else is made of it, so a damaged line is left out."""
    events = []
    for line in raw.split(b"\n"):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def stage_times(events: Iterable[Mapping[str, Any]]) -> list[StageTime]:
    """Sum events by stage, in the order in which the stages were first worked on.

    Args:
        events: as ``Reporter`` writes them: ``task`` names the stage, ``kinds`` has the seconds, ``who`` is "driver"
            where they are not of a worker or shard. Events without ``kinds`` say nothing of time.
    """
    found: dict[str, StageTime] = {}
    for event in events:
        name, spent = event.get("task"), _spent(event)
        if not isinstance(name, str) or spent is None:
            continue
        stage = found.setdefault(name, StageTime(name))
        (stage.driver if event.get("who") == "driver" else stage.work).add(spent)
        stage.units += event.get("event") == "unit"
    return list(found.values())


def _spent(event: Mapping[str, Any]) -> Spent | None:
    """The seconds of an event, if it has any and they are such."""
    kinds, tokens = event.get("kinds"), event.get("tokens", 0)
    if not isinstance(kinds, dict) or not isinstance(tokens, int) or not _is_time(tokens):
        return None
    pairs = {
        kind: [float(value) for value in pair]
        for kind, pair in kinds.items()
        if kind in KINDS and isinstance(pair, list) and len(pair) == 2 and all(_is_time(value) for value in pair)
    }
    return Spent(pairs, tokens) if len(pairs) == len(kinds) else None


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1e12


def total(stages: Sequence[StageTime]) -> tuple[float, float]:
    """Wall seconds of all workers and shards together, and of the driver."""
    return sum(stage.seconds for stage in stages), sum(seconds(stage.driver) for stage in stages)


def by_size(spent: Spent) -> list[tuple[str, float, float]]:
    """(kind, wall, CPU), the largest first."""
    return sorted(((kind, wall, cpu) for kind, (wall, cpu) in spent.kinds.items()), key=lambda row: (-row[1], row[0]))


def bars(stages: Sequence[StageTime]) -> list[dict[str, Any]]:
    """A stacked bar per stage for the page: its width and those of its kinds in per cent of the widest stage."""
    widest = max((stage.seconds for stage in stages), default=0.0) or 1.0
    whole = total(stages)[0] or 1.0
    return [
        {
            "stage": stage.stage,
            "seconds": stage.seconds,
            "share": stage.seconds / whole,
            "clock": seconds(stage.driver),
            "units": stage.units,
            "rate": stage.rate,
            "parts": [
                {
                    "kind": kind,
                    "seconds": wall,
                    "cpu": cpu,
                    "share": wall / whole,
                    "width": 100 * wall / widest,
                    "colour": COLOURS[KINDS.index(kind)],
                    "named": wall >= _NAMED * whole,
                }
                for kind, wall, cpu in by_size(stage.work)
            ],
            "driver": [{"kind": kind, "seconds": wall, "cpu": cpu} for kind, wall, cpu in by_size(stage.driver)],
        }
        for stage in stages
    ]
