"""What a plan says: work by kind, stages, choices, totals."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

# What the engine can do; a plan may count on more where it is asked to look ahead.
EXPANDED_FORM = "low rank expanded per block of queries"
EIGENBASIS_FORM = "queries left in the eigenbasis"
SHARED_ROTATION = "one rotation per input group"
SYMMETRIC = "symmetric rank-k covariances"
TOKEN_SOLVE = "a query's tokens rotated instead of its gradient"
LAYERWISE = "queries solved a layer at a time, every basis and probe read once"
RANGE_FINDER = "low rank by a randomised range finder"
SPLIT = "a model over several devices that work at once"
# The engine's symmetric updates are those of a CPU's BLAS: on a GPU they are ahead.
ENGINE = frozenset({SHARED_ROTATION, TOKEN_SOLVE})
ENGINE_CPU = ENGINE | {SYMMETRIC}
AHEAD = frozenset(
    {
        EXPANDED_FORM,
        EIGENBASIS_FORM,
        SHARED_ROTATION,
        SYMMETRIC,
        TOKEN_SOLVE,
        LAYERWISE,
        RANGE_FINDER,
        SPLIT,
    }
)


@dataclass(frozen=True)
class Passes:
    """In how many layer passes the covariances and Λ are summed."""

    covariance: int = 1
    moments: int = 1


@dataclass(frozen=True)
class Work:
    """One kind of work of a stage, over all devices: FLOPs, bytes touched or moved, device-seconds."""

    kind: str
    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class StageCost:
    """One stage.

    Attributes:
        name: of the stage.
        works: by kind.
        tasks: pieces that go to devices; fewer than devices leave some idle.
        parallel: devices (or workers) over which they go.
        devices: that are held meanwhile.
        worker_bytes: of a worker at its peak.
        shard_bytes: of all factor shards together at their peak.
        disk_bytes: that the stage leaves in the run folder.
        moved_bytes: between workers, shards and the run folder.
        longest: seconds of the longest single task, which more devices do not shorten.
        device_bytes: of the fullest device of a worker that has several; 0: it has one.
    """

    name: str
    works: tuple[Work, ...]
    tasks: int
    parallel: int
    devices: int
    worker_bytes: float
    shard_bytes: float
    disk_bytes: float
    moved_bytes: float
    longest: float = 0.0
    device_bytes: float = 0.0

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.works)

    @property
    def work_seconds(self) -> float:
        """Device-seconds of work, without waiting."""
        return sum(work.seconds for work in self.works)

    @property
    def seconds(self) -> float:
        """Wall time: whole rounds of tasks over the devices."""
        rounds = math.ceil(self.tasks / self.parallel)
        return max(self.longest, self.work_seconds / max(1, self.tasks) * rounds)

    @property
    def device_hours(self) -> float:
        """Devices held × wall time."""
        return self.devices * self.seconds / 3600

    @property
    def idle(self) -> float:
        """Share of the held devices' time in which they have no task."""
        spent = self.seconds * self.parallel
        return 1 - self.work_seconds / spent if spent > 0 else 0.0


@dataclass(frozen=True)
class Choice:
    """What the planner chose, why, and whether the engine does it yet."""

    name: str
    value: str
    reason: str
    in_engine: bool = True


@dataclass(frozen=True)
class RunPlan:
    """Stages in order, the choices behind them, and dollars per device-hour if a price was given."""

    stages: tuple[StageCost, ...]
    choices: tuple[Choice, ...]
    price: float | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def device_hours(self) -> float:
        return sum(stage.device_hours for stage in self.stages)

    @property
    def disk_bytes(self) -> float:
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def dollars(self) -> float | None:
        return None if self.price is None else self.device_hours * self.price

    def stage(self, name: str) -> StageCost:
        return next(stage for stage in self.stages if stage.name == name)

    def dump(self) -> dict[str, Any]:
        """As plain numbers and texts."""
        derived = ("flops", "work_seconds", "seconds", "device_hours", "idle")
        stages = [asdict(stage) | {name: getattr(stage, name) for name in derived} for stage in self.stages]
        if self.price is not None:
            stages = [stage | {"dollars": stage["device_hours"] * self.price} for stage in stages]
        totals = {name: getattr(self, name) for name in ("seconds", "device_hours", "disk_bytes", "dollars")}
        return {
            "stages": stages,
            "choices": [asdict(choice) for choice in self.choices],
            "notes": list(self.notes),
            "total": totals,
        }
