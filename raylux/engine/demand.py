"""What a run asks of the machines it runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psutil

from raylux.config import EngineSection
from raylux.engine.capacity import Demand
from raylux.engine.plan import GIB, shards_bytes, worker_bytes
from raylux.errors import UserError
from raylux.layers import TrackedLayer


def demand_of(
    engine: EngineSection,
    dtype: str,
    device: str,
    layers: Sequence[TrackedLayer],
    groups: Mapping[str, str],
    parameters: int,
    queries: int,
    iterative: bool = False,
    blocks: int = 1,
) -> Demand:
    """What a run asks for.

    Args:
        engine: workers, shards and threads as the config sets them.
        dtype: of the model.
        device: "cpu" or "cuda".
        layers: tracked.
        groups: layer -> leader of its input group.
        parameters: of the whole model.
        queries: how many are held at once.
        iterative: they are solved by products with the Gauss-Newton matrix.
        blocks: of A and S.
    """
    itemsize = 8 if dtype == "float64" else 4
    return Demand(
        engine.workers,
        engine.shards,
        engine.threads,
        device == "cuda",
        worker_bytes(layers, groups, parameters, itemsize, queries, iterative, blocks),
        shards_bytes(layers, groups, itemsize, queries, iterative, blocks),
        engine.worker_labels,
        engine.shard_labels,
    )


def has_memory_here(demand: Demand) -> bool:
    """For the backend in process: whether this machine's free memory is enough."""
    return demand.worker_bytes + demand.shards_bytes <= psutil.virtual_memory().available


def check_memory_here(demand: Demand) -> None:
    """Raises UserError where it is not."""
    if not has_memory_here(demand):
        need, have = demand.worker_bytes + demand.shards_bytes, psutil.virtual_memory().available
        raise UserError(
            f"not enough memory: this run needs {need / GIB:.1f} GiB in process, {have / GIB:.1f} GiB are free; "
            f"track fewer model.layers, ask fewer queries, or use engine.backend=ray on a larger cluster"
        )
