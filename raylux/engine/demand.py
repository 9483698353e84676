"""What a run asks of the machines it runs on."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from raylux.engine.plan import GIB
from raylux.errors import UserError


@dataclass(frozen=True)
class Demand:
    """Workers and shards (a number, or "auto"), what each takes, and memory in bytes."""

    workers: int | str
    shards: int | str
    threads: int
    gpu: bool
    worker_bytes: int
    shards_bytes: int


def check_memory_here(demand: Demand) -> None:
    """For the backend in process: the same check against this machine's free memory."""
    need, have = demand.worker_bytes + demand.shards_bytes, psutil.virtual_memory().available
    if need > have:
        raise UserError(
            f"not enough memory: this run needs {need / GIB:.1f} GiB in process, {have / GIB:.1f} GiB are free; "
            f"track fewer model.layers, ask fewer queries, or use engine.backend=ray on a larger cluster"
        )
