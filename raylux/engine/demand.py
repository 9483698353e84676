"""What a run asks of the machines it runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import psutil

from raylux.config import EngineSection
from raylux.cost.costs import Passes
from raylux.cost.passes import MOST_PASSES
from raylux.cost.sizes import layer_bytes, projected_bytes
from raylux.engine.capacity import Demand, settle
from raylux.engine.plan import GIB, shards_bytes, worker_bytes
from raylux.errors import UserError
from raylux.layers import TrackedLayer
from raylux.placement import Placement

# A joint matrix and what is made of it, in float64: a worker sums it, or holds its factor while that is read from it;
# of the shards one sums, one reads it all, makes it symmetric and takes it apart.
_OF_WORKER, _OF_SHARDS = 2, 4


def demand_of(
    engine: EngineSection,
    dtype: str,
    device: str,
    layers: Sequence[TrackedLayer],
    groups: Mapping[str, str],
    parameters: int,
    queries: int,
    iterative: bool = False,
    passes: int | str = 1,
    blocks: int = 1,
    joint: bool = False,
    placement: Placement | None = None,
    projection: int = 0,
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
        passes: ``fit.passes`` of the config.
        blocks: of A and S.
        joint: the curvature is one exact matrix over all tracked weights.
        placement: of the model's parts, where they do not all lie on the one device of a worker.
        projection: K of a kind that projects gradients; 0: it does not.
    """
    if placement is not None:
        parameters = placement.held("cpu", graph=iterative or joint)
    itemsize = 8 if dtype == "float64" else 4
    matrix = 8 * sum(layer.parameters for layer in layers) ** 2 if joint else 0
    beside = _OF_WORKER * matrix, _OF_SHARDS * matrix
    if projection:
        # Of each layer what whitens, beside one that is taken apart; and of a worker that scores 1/√v.
        whitening = projected_bytes(len(layers) + _OF_SHARDS, projection)
        beside = whitening + layer_bytes(layers, itemsize), whitening
    sized = partial(
        _in_passes,
        engine,
        itemsize,
        device,
        tuple(layers),
        dict(groups),
        parameters,
        queries,
        iterative,
        blocks,
        beside,
    )
    if isinstance(passes, int):
        return sized(Passes(passes, passes))
    most = min(MOST_PASSES, len(set(groups.values())))
    return replace(sized(Passes()), most=most, otherwise=sized)


def _in_passes(
    engine: EngineSection,
    itemsize: int,
    device: str,
    layers: Sequence[TrackedLayer],
    groups: Mapping[str, str],
    parameters: int,
    queries: int,
    iterative: bool,
    blocks: int,
    beside: tuple[int, int],
    passes: Passes,
) -> Demand:
    return Demand(
        engine.workers,
        engine.shards,
        engine.threads,
        device == "cuda",
        worker_bytes(layers, groups, parameters, itemsize, queries, iterative, passes, blocks) + beside[0],
        shards_bytes(layers, groups, itemsize, queries, iterative, passes, blocks) + beside[1],
        engine.worker_labels,
        engine.shard_labels,
        passes,
        gpus=engine.gpus_per_worker,
    )


def settled_here(demand: Demand) -> Demand:
    """For the backend in process: the demand in as few layer passes as this machine's free memory allows."""
    return settle(demand, _has_memory)


def _has_memory(demand: Demand) -> bool:
    return demand.worker_bytes + demand.shards_bytes <= psutil.virtual_memory().available


def has_memory_here(demand: Demand) -> bool:
    """For the backend in process: whether this machine's free memory is enough, in as many passes as it takes."""
    return _has_memory(settled_here(demand))


def check_memory_here(demand: Demand) -> None:
    """Raises UserError where it is not."""
    demand = settled_here(demand)
    if not _has_memory(demand):
        need, have = demand.worker_bytes + demand.shards_bytes, psutil.virtual_memory().available
        raise UserError(
            f"not enough memory: this run needs {need / GIB:.1f} GiB in process, {have / GIB:.1f} GiB are free; "
            f"track fewer model.layers, ask fewer queries, or use engine.backend=ray on a larger cluster"
        )
