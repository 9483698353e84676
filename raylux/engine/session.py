"""Ray itself: connecting, and checking demand against supply."""

from __future__ import annotations

import logging
import os
from typing import Any

from raylux.engine import auth
from raylux.engine.demand import Demand
from raylux.engine.plan import GIB
from raylux.errors import UserError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray announces a change of this default at every start of an actor without a GPU.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Read when ray is imported.
auth.switch_on()

import ray  # noqa: E402
from ray.exceptions import RayError  # noqa: E402

from raylux.engine.remote import first_line  # noqa: E402


def connect() -> bool:
    """Join the cluster of RAY_ADDRESS, the one already joined, or start one here; True if one was started."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
            return False
        # "local": Ray would otherwise join whatever cluster it finds on this machine.
        ray.init(address="local", include_dashboard=False, num_cpus=os.cpu_count(), **quiet)
    except (ConnectionError, RayError) as error:
        where = os.environ.get("RAY_ADDRESS", "this machine")
        raise UserError(f"Ray: no cluster at {where} ({first_line(error)})") from None
    return True


def size(demand: Demand) -> tuple[int, int]:
    """Workers and shards that fit the cluster.

    Raises:
        UserError: what is asked for, or a single worker, does not fit; with demand and supply in numbers.
    """
    supply = ray.cluster_resources()
    cpus, gpus, memory = supply.get("CPU", 0.0), supply.get("GPU", 0.0), supply.get("memory", 0.0)
    by_cpu = int(gpus) if demand.gpu else int(cpus // demand.threads)
    by_memory = int((memory - demand.shards_bytes) // demand.worker_bytes)
    workers = demand.workers if isinstance(demand.workers, int) else max(1, min(by_cpu, by_memory))
    if workers > by_cpu:
        kind, have = ("GPU", f"{gpus:g}") if demand.gpu else ("CPU", f"{cpus:g}")
        need = workers if demand.gpu else workers * demand.threads
        who = f"{workers} worker{'s' * (workers > 1)} need"
        raise UserError(
            f"not enough {kind}s on the cluster: {who} {need}, it has {have}; "
            f"set engine.workers to {by_cpu or 1} or fewer, or engine.threads lower"
        )
    need_bytes = workers * demand.worker_bytes + demand.shards_bytes
    if need_bytes > memory:
        raise UserError(
            f"not enough memory on the cluster: {workers} worker{'s' * (workers > 1)} and the factor shards need "
            f"{need_bytes / GIB:.1f} GiB, it has {memory / GIB:.1f} GiB; use fewer engine.workers, a larger cluster, "
            f"fewer model.layers or fewer queries"
        )
    shards = demand.shards if isinstance(demand.shards, int) else workers
    return workers, shards


def capacity(demand: Demand) -> int | None:
    """Workers that fit the cluster as it is now; None where their number is set."""
    if demand.workers != "auto":
        return None
    try:
        return size(demand)[0]
    except UserError:
        return 0
