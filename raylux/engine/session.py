"""Ray itself: connecting, and checking demand against supply."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from raylux.engine import auth
from raylux.engine.capacity import Demand, Node, fit, fit_nodes
from raylux.engine.capacity import settled as settled_by
from raylux.errors import RayluxError, UserError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray announces a change of this default at every start of an actor without a GPU.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Read when ray is imported.
auth.switch_on()

import ray  # noqa: E402
from ray.autoscaler.sdk import request_resources  # noqa: E402
from ray.exceptions import RayError  # noqa: E402

from raylux.engine.remote import first_line  # noqa: E402

GROW = "RAYLUX_GROW"
_LOOK_EVERY = 2.0


def connect() -> bool:
    """Join the cluster of RAY_ADDRESS, the one already joined, or start one here; True if one was started."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
            return False
    except (ConnectionError, RayError) as error:
        raise UserError(f"Ray: no cluster at {os.environ['RAY_ADDRESS']} ({first_line(error)})") from None
    try:
        # "local": Ray would otherwise join whatever cluster it finds on this machine.
        ray.init(address="local", include_dashboard=False, num_cpus=os.cpu_count(), **quiet)
    except Exception as error:  # what Ray raises of a process that does not come up has no type of its own
        raise RayluxError(
            f"Ray did not start on this machine ({first_line(error)}); it may be short of CPU or memory for now: "
            "run the same command again, or set engine.backend=local"
        ) from None
    return True


def leave() -> None:
    """Leave the cluster; one that was started here ends."""
    ray.shutdown()


def size(demand: Demand, patience: float = 0.0) -> tuple[int, int]:
    """Workers and shards that fit the cluster.

    With RAYLUX_GROW in the environment (``raylux submit --grow``) the autoscaler is asked for ``engine.workers``
    first, and until this process ends.

    Args:
        demand: of the run.
        patience: seconds to wait for what the autoscaler was asked for.

    Raises:
        UserError: as ``fit`` does, of the cluster as it is now, or at the end of the patience.
    """
    if os.environ.get(GROW, "0") in ("", "0") or not isinstance(demand.workers, int):
        return _fit(demand)
    _ask_for(_bundles(demand), demand.worker_labels)
    atexit.register(_ask_for, [])
    until = time.monotonic() + patience
    while True:
        try:
            return _fit(demand)
        except UserError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"{error} (asked of the autoscaler, which did not bring it in {patience:.0f} s)"
                ) from None
        time.sleep(_LOOK_EVERY)


def settled(demand: Demand) -> Demand:
    """The demand in as few layer passes as the cluster has memory for, as it is now."""
    return settled_by(demand, _fit_as_it_is)


def _fit(demand: Demand) -> tuple[int, int]:
    """Of the cluster as it is now, in as many layer passes as it takes. Raises UserError."""
    return _fit_as_it_is(settled(demand))


def _bundles(demand: Demand) -> list[dict[str, float]]:
    """What Ray places a worker by, once per worker.

    Without memory: not every autoscaler knows the memory of a node that it has not started, and one that does not
    would take the request for one that no node can meet.
    """
    count = demand.workers if isinstance(demand.workers, int) else 1
    return [{"CPU": float(demand.threads)} | ({"GPU": float(demand.gpus)} if demand.gpu else {})] * count


def _ask_for(bundles: list[dict[str, float]], labels: Mapping[str, str] | None = None) -> None:
    """Replaces what was asked for before; nothing lets the autoscaler remove idle nodes again."""
    if ray.is_initialized():
        if labels:
            request_resources(bundles=bundles, bundle_label_selectors=[dict(labels)] * len(bundles))
        else:
            request_resources(bundles=bundles)


def _fit_as_it_is(demand: Demand) -> tuple[int, int]:
    """Of the cluster as it is now, in the passes that the demand says. Raises UserError."""
    if not demand.worker_labels and not demand.shard_labels and demand.gpus == 1:
        return fit(demand, ray.cluster_resources())
    return fit_nodes(demand, living())


def living() -> tuple[Node, ...]:
    """The nodes of the cluster that live now."""
    return tuple(Node(node["Resources"], node.get("Labels") or {}) for node in ray.nodes() if node["Alive"])


def fitting(demand: Demand) -> int:
    """Workers that fit the cluster as it is now; 0: it has too little."""
    try:
        return _fit(demand)[0]
    except UserError:
        return 0


def capacity(demand: Demand) -> int | None:
    """Workers that fit the cluster as it is now; None where their number is set."""
    if demand.workers != "auto":
        return None
    try:
        return size(demand)[0]
    except UserError:
        return 0
