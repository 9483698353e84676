"""Real actors that only sleep, so that the driver, Ray and the disk are all that works."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from jobs.driving.passes import PASSES, SHARDS, part, shard_specs, work
from raylux import profiling
from raylux.engine.progress import Reporter
from raylux.engine.work import Job, results
from raylux.report.profile import parsed, stage_times
from raylux.store import RunFolder


@dataclass(frozen=True)
class SleeperPlan:
    """What Ray is asked for, for each of them."""

    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class SleeperSpec:
    """What a sleeper is made from: the seconds of a unit."""

    seconds: float
    plan: SleeperPlan = field(default_factory=SleeperPlan)


class Sleeper:
    """In the place of a gradient worker: it has the same methods, and sleeps."""

    def __init__(self, spec: SleeperSpec) -> None:
        self.seconds, self.clock = spec.seconds, profiling.Clock()

    def prepare(self) -> dict[str, Any]:
        return {"pid": 0, "host": "", "weights": "", "numerics": {"torch": "", "device": "sleeper", "threads": 1}}

    def timed(self, method: str, parts: bool, *args: Any) -> Any:
        return profiling.timed(self, self.clock, method, parts, args)

    def score_unit(self, unit: int) -> tuple[str, dict[str, Any]]:
        time.sleep(self.seconds)
        return f"scores/{unit}", {}

    def moment_unit(self, unit: int) -> tuple[Any, ...]:
        time.sleep(self.seconds)
        return (None, *(part(unit, place) for place in range(SHARDS)))


@dataclass(frozen=True)
class Measured:
    """A pass through real actors.

    Attributes:
        kind: of ``PASSES``.
        offered: units a second that the actors could do.
        units: done.
        kinds: the driver's seconds, wall and CPU, by kind.
    """

    kind: str
    offered: float
    units: int
    kinds: dict[str, list[float]]

    @property
    def rate(self) -> float:
        """Units a second."""
        return self.units / sum(wall for wall, _ in self.kinds.values())

    @property
    def cpu(self) -> float:
        """Seconds of the driver's processor for a unit: all its threads, Ray's among them."""
        return sum(cpu for _, cpu in self.kinds.values()) / self.units


def real(actors: int, sleep: float, units: int) -> list[Measured]:
    """Both passes through sleepers, on a Ray of this machine's own."""
    from raylux.engine import session  # before ray, whose environment it sets
    from raylux.engine.remote import RayBackend

    ray = session.ray
    ray.init(address="local", num_cpus=actors, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory(prefix="raylux-driver-") as base:
            folder = RunFolder(base)
            reporter = Reporter(folder, quiet=True)
            started = [0]

            def notify(kind: str, **facts: Any) -> None:
                started[0] += kind == "worker" and facts["state"] == "started"
                reporter.event(kind, **facts)

            spec: Any = SleeperSpec(sleep)
            backend = RayBackend(
                spec, shard_specs(base), actors, 600.0, False, lambda: None, notify, lambda facts: None, Sleeper
            )
            while started[0] < actors:
                for _ in results(backend, "score_unit", (Job(str(unit), (unit,)) for unit in range(actors))):
                    pass
            backend.ask("pid", dict.fromkeys(range(SHARDS), ()))
            for kind in PASSES:
                work(kind, backend, folder, reporter, units, time.monotonic)
            backend.close()
            stages = stage_times(parsed(folder.files.get("progress.jsonl")))
            return [Measured(stage.stage, actors / sleep, units, stage.driver.kinds) for stage in stages]
    finally:
        ray.shutdown()
