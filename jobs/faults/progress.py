"""What a run's progress.jsonl says, read while it is written."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from raylux.engine.plan import QUERY_BLOCK
from raylux.errors import RayluxError
from raylux.ledger import COVARIANCE, MOMENTS, SCORE, SNAPSHOT
from raylux.store import RunFolder

# Stage as people call it -> the methods whose calls are its units.
METHODS = {
    "covariance": ("covariance_unit",),
    "eigenbases": ("decompose",),
    "lambda": ("moment_unit",),
    "query": ("query_gradients", "probe"),
    "score": ("score_unit",),
}
STAGES = tuple(METHODS)
_STAGE_OF = {method: stage for stage, methods in METHODS.items() for method in methods}
_SNAPSHOTS = {"covariance": COVARIANCE, "lambda": MOMENTS}


class Progress:
    """Follows one run folder.

    Attributes:
        stage: the stage that is under way, if it is one of ``STAGES``.
        units: stage -> name of a unit -> how often it was computed.
        totals: stage -> what it counts, in all.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(str(folder))
        self._path = folder / "progress.jsonl"
        self._offset = 0
        self.stage: str | None = None
        self.units: dict[str, Counter[str]] = {stage: Counter() for stage in STAGES}
        self.totals: dict[str, int] = {}

    def poll(self) -> int:
        """Read what is new; how many lines that was."""
        if not self._path.exists():
            return 0
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines()
        for line in lines:
            self._take(json.loads(line))
        return len(lines)

    def moves(self, stage: str) -> int:
        """Units of a stage computed so far, repeats and all."""
        return self.units[stage].total()

    def at_stake(self, stage: str) -> int:
        """Units of a stage that are computed and in no snapshot."""
        if stage not in _SNAPSHOTS:
            return 0
        try:
            cursor = self._folder.manifest(SNAPSHOT, _SNAPSHOTS[stage]).meta["cursor"]
        except RayluxError:  # none yet, or none any more
            cursor = 0
        return max(0, len(self.units[stage]) - int(cursor))

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "task":
            self._task(event["stage"], event["state"], event["total"])
        elif event["event"] == "unit" and event["method"] in _STAGE_OF:
            # Queries that run together are a unit each; no id of these inputs has a comma.
            self.units[_STAGE_OF[event["method"]]].update(event["unit"].split(", "))

    def _task(self, stage: str, state: str, total: int) -> None:
        if stage in STAGES:
            self.stage = None if state == "done" else stage
            self.totals.setdefault(stage, total)


def needed(folder: Path, probes: int) -> dict[str, int]:
    """Stage -> units that have to be computed, from a run that was left alone.

    Args:
        folder: of a run that nothing disturbed; in process, where no unit is logged.
        probes: of a query's compression; a quarter of them are its own, the others its block's.
    """
    progress = Progress(folder)
    progress.poll()
    units = {stage: progress.totals[stage] for stage in ("covariance", "eigenbases", "lambda")}
    queries = progress.totals["query"]
    own = probes // 4
    blocks = -(-queries // QUERY_BLOCK)
    scored = len(RunFolder(str(folder)).committed(SCORE))
    return {**units, "query": queries * (1 + own) + blocks * (probes - own), "score": scored}
