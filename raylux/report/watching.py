"""How far a run is: the events of progress.jsonl, as they stand. Works beside the run and after its cluster is gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

# Seconds, by the events' own clock, over which tokens per second are taken.
_RECENT = 60.0


@dataclass
class StageSeen:
    """A stretch of work, as its last command left it.

    Attributes:
        stage: as the progress bar calls it.
        what: what ``done`` and ``total`` count.
        state: started, running or done.
        done, total: counts.
        first: of ``done`` when the command began.
        began, last: seconds since 1970.
    """

    stage: str
    what: str = ""
    state: str = "started"
    done: int = 0
    total: int = 0
    first: int = 0
    began: float = 0.0
    last: float = 0.0

    @property
    def seconds(self) -> float:
        """Since this command began with it."""
        return max(0.0, self.last - self.began)

    @property
    def left(self) -> float | None:
        """Seconds left by the pace of this command; None where that is not known, or nothing is left."""
        own = self.done - self.first
        if self.state == "done" or own <= 0 or not self.seconds:
            return None
        return self.seconds / own * (self.total - self.done)


@dataclass
class Seen:
    """A run as its events tell it.

    Attributes:
        stages: in the order in which they were first worked on.
        workers: slots of gradient workers that are alive, by what was told.
        deaths: workers and shards that died.
        last: time of the last event, seconds since 1970; 0 where there is none.
        rate: tokens per second over the last minute of events.
        trouble: the last death, in words; empty where there was none.
    """

    stages: list[StageSeen] = field(default_factory=list)
    workers: set[int] = field(default_factory=set)
    deaths: int = 0
    last: float = 0.0
    rate: float = 0.0
    trouble: str = ""

    @property
    def working(self) -> StageSeen | None:
        """The stretch that was begun last, if it is not done."""
        open_ = [stage for stage in self.stages if stage.state != "done"]
        return max(open_, key=lambda stage: stage.last, default=None)


def seen(events: Iterable[Mapping[str, Any]]) -> Seen:
    """Sum events up.

    Args:
        events: as ``Reporter`` writes them, oldest first; what does not look like one of them is passed over.
    """
    found = Seen()
    stages: dict[str, StageSeen] = {}
    tokens: list[tuple[float, int]] = []
    for event in events:
        time = event.get("time")
        if not _number(time):
            continue
        found.last = max(found.last, float(time))
        kind = event.get("event")
        if kind == "task" and isinstance(event.get("stage"), str):
            stage = stages.setdefault(event["stage"], StageSeen(event["stage"]))
            _move(stage, event)
        elif kind == "unit" and _number(event.get("tokens")):
            tokens.append((float(time), int(event["tokens"])))
        elif kind in ("worker", "shard"):
            _member(found, event)
    found.stages = list(stages.values())
    since = found.last - _RECENT
    recent = [(at, count) for at, count in tokens if at > since]
    if recent and found.last > (start := max(since, tokens[0][0] if len(recent) == len(tokens) else since)):
        found.rate = sum(count for _, count in recent) / (found.last - start)
    return found


def _move(stage: StageSeen, event: Mapping[str, Any]) -> None:
    done, total, time = event.get("done"), event.get("total"), float(event["time"])
    if not (_number(done) and _number(total)):
        return
    stage.state, stage.what = str(event.get("state")), str(event.get("what", ""))
    if stage.state == "started":
        stage.began, stage.first = time, int(done)
    stage.done, stage.total, stage.last = int(done), int(total), time


def _member(found: Seen, event: Mapping[str, Any]) -> None:
    state, slot = event.get("state"), event.get("slot")
    if state == "died":
        found.deaths += 1
        found.trouble = f"{event['event']} {slot if slot is not None else event.get('shard')}: {event.get('reason')}"
    if event["event"] == "worker" and isinstance(slot, int):
        (found.workers.add if state == "started" else found.workers.discard)(slot)


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12
