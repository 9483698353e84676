"""What the driver does: a pass of score units, or of fit units whose sums go to the shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from raylux.engine.pace import Pace
from raylux.engine.progress import Reporter
from raylux.engine.shard import ShardSpec
from raylux.engine.sums import SumPass, Units
from raylux.engine.work import Backend, Job, results
from raylux.layers import TrackedLayer
from raylux.ledger import MOMENTS, SCORE
from raylux.store import RunFolder

SHARDS = 2
LAYERS = tuple(TrackedLayer(f"l{place}", 4, 4, False, False) for place in range(SHARDS))
GROUPS = {layer.name: layer.name for layer in LAYERS}
PASSES = ("score", "sums")


def work(
    kind: str, backend: Backend, folder: RunFolder, reporter: Reporter, units: int, now: Callable[[], float]
) -> None:
    """A pass as a stage would do it: score units, each committed as it comes; or fit units, summed in order."""
    with reporter.task(kind, units, "units") as task:
        if kind == "sums":
            names = [f"f{unit:06d}" for unit in range(units)]
            asked = Units(
                MOMENTS, "moment_unit", "write_moments", names, lambda unit: (unit,), lambda unit: [str(unit)]
            )
            SumPass(backend, folder, asked, Pace("auto", 0, now), reporter).run(task)
            return
        jobs = (Job(f"u{unit:06d}", (unit,), unit) for unit in range(units))
        for result in results(backend, "score_unit", jobs):
            facts = {"key": f"scores/{result.job.name}", "queries": ["q"], "rows": list(range(64)), "layers": False}
            folder.commit(SCORE, result.job.name, {}, **facts, numerics=[dict(result.numerics)])
            task.advance()


def part(unit: int, place: int) -> dict[str, Any]:
    """Sums of a unit for a shard."""
    return {"moments": {LAYERS[place].name: np.full((4, 4), float(unit), np.float32)}, "sequences": 1}


def shard_specs(folder: str) -> list[ShardSpec]:
    """Of the real shards, one for each of ``LAYERS``."""
    return [ShardSpec(folder, (layer,), GROUPS, "ekfac", "auto", "float32", 1, "cpu") for layer in LAYERS]
