"""A plan of a whole run: every stage, the choices, and refusals in one line that name the smallest change."""

from __future__ import annotations

import math

from raylux.cost import costs, fit, projecting, queries, scoring, solving
from raylux.cost.costs import Choice, RunPlan
from raylux.cost.machine import USABLE, Cluster
from raylux.cost.passes import largest, moments_held, split, triangles_held
from raylux.cost.sizes import layer_bytes, triangle_bytes
from raylux.cost.workload import Workload
from raylux.errors import UserError

# That curvature.blocks may be set to.
_BLOCKS = (1, 2, 4)


def plan_run(work: Workload, cluster: Cluster, can: frozenset[str] = costs.ENGINE) -> RunPlan:
    """What a run costs on a cluster.

    Args:
        work: what is to be computed.
        cluster: where.
        can: what may be chosen beyond what the engine does today (``costs.AHEAD``: everything).

    Raises:
        UserError: it cannot work; the line names the smallest change that would help.
    """
    _check_model(work, cluster, can)
    choices = _devices(work) + ([_shards(work, cluster)] if work.basis or work.moments or work.projection else [])
    if work.model.placement is None and cluster.devices_per_worker > 1:
        count = cluster.devices_per_worker
        choices.append(
            Choice("devices", f"{count} for a worker, all at work at once", "as the cluster file says", False)
        )
    makers = [fit.covariance, fit.eigenbases] if work.basis else []
    makers += [solving.joint] if work.joint else [fit.moments] if work.moments else []
    makers += [projecting.whitening] if work.projection else []
    stages = []
    for make in (*makers, queries.query, queries.prefilter, scoring.score):
        stage, chosen = make(work, cluster, can)
        stages.append(stage)
        choices += chosen
    plan = RunPlan(tuple(stages), tuple(choices), cluster.price_per_device_hour)
    _check_disk(plan, cluster)
    return plan


def _check_model(work: Workload, cluster: Cluster, can: frozenset[str]) -> None:
    if work.model.placement is not None:
        return _check_devices(work, cluster)
    device = cluster.worker
    sequence = work.tokens * work.model.activation_bytes(work.itemsize, work.model.tracked)
    need = fit.base_bytes(device) + fit.model_bytes(work) + sequence
    if need <= device.memory:
        return
    per = 1
    while fit.base_bytes(device) + fit.model_bytes(work) + sequence > cluster.device.memory * per:
        per *= 2
    change = "devices of that size"
    half = fit.base_bytes(device) + fit.model_bytes(work) * 2 / work.itemsize + sequence
    if work.itemsize > 2 and half <= device.memory:
        change = "model.dtype=bfloat16"
    elif per <= cluster.per_node:
        change = f"engine.gpus_per_worker={per} with model.device_map=balanced"
    raise UserError(
        f"the model does not fit: weights and one sequence need {need / USABLE / 1e9:,.1f} GB, a worker has "
        f"{device.memory_gb:,.1f} GB; take {change}"
    )


def _check_devices(work: Workload, cluster: Cluster) -> None:
    """The same of a model over several devices, or of one that is read from disk: by the fullest of them."""
    placed = work.model.placement
    assert placed is not None
    if len(placed.computing) > cluster.per_node:
        raise UserError(
            f"a worker needs {len(placed.computing)} devices of one node, a node has {cluster.per_node}: set "
            "engine.gpus_per_worker lower"
        )
    memory = cluster.device.memory
    left = fit.rooms(work.model, work.itemsize, work.tokens, memory, fit.base_bytes(cluster.device)).of
    where = min(left, key=lambda device: left[device])
    if left[where] < 0:
        raise UserError(
            f"the model does not fit: weights and one sequence need {(memory - left[where]) / USABLE / 1e9:,.1f} GB on "
            f"{where}, which has {cluster.device.memory_gb:,.1f} GB; take more engine.gpus_per_worker, or give blocks "
            "to disk in model.device_map"
        )


def _devices(work: Workload) -> list[Choice]:
    """What lies where, if not all of the model on one device."""
    placed = work.model.placement
    if placed is None:
        return []
    held = [placed.held(device) * work.itemsize / 1e9 for device in placed.computing]
    blocks = [placed.blocks_on(device) for device in placed.computing]
    pairs = zip(placed.computing, held, blocks, strict=True)
    each = ", ".join(f"{device}: {size:,.2f} GB of weights, {count} blocks" for device, size, count in pairs)
    read = sum(part.parameters for part in placed.reads) * work.itemsize / 1e9
    away = f"; {read:,.2f} GB are read each time they run" if placed.reads else ""
    count = len(placed.computing)
    value = f"{count} for a worker, which take turns" if count > 1 else "1 for a worker"
    return [Choice("devices", value, f"{each}{away}")]


def _shards(work: Workload, cluster: Cluster) -> Choice:
    """As many shards as workers, at most one per input group; they live in host memory."""
    layers, groups = work.model.tracked, work.model.groups
    room, nodes = fit.shard_room(cluster), cluster.nodes

    def least_in(blocks: int) -> int:
        """What they must hold at once: in layer passes the sums of one pass."""
        least = split(layers, groups, len(groups))
        covariances = largest(least, triangles_held(groups, 8, blocks)) if work.basis else 0.0
        return int(max(covariances, largest(least, moments_held(groups, 0, 8)) if work.moments else 0.0))

    least = least_in(work.blocks)
    if least > room:
        cut = [blocks for blocks in _BLOCKS if work.basis and blocks > work.blocks and least_in(blocks) <= room]
        instead = f"set curvature.blocks={cut[0]}, or " if cut else ""
        more = math.ceil(least / (room / nodes))
        raise UserError(
            f"the factors do not fit: their sums take {least / 1e9:,.1f} GB, the shards of {nodes} "
            f"node{'s' * (nodes > 1)} have {room / 1e9:,.1f} GB; {instead}take {more} nodes, or "
            f"host_memory_gb: {math.ceil(least / fit.SHARD_SHARE / nodes / 1e7) / 100:,}"
        )
    count = min(cluster.workers, len(work.model.leaders))
    return Choice(
        "shards",
        str(count),
        f"{_sums(work, work.blocks) / count / 1e9:,.2f} GB of sums in float64 each; one per worker, at most one per "
        f"input group ({len(work.model.leaders)})",
    )


def _sums(work: Workload, blocks: int) -> int:
    """Bytes of the larger of the two sets of sums, in float64."""
    layers = work.model.tracked
    covariances = triangle_bytes(layers, work.model.groups, 8, blocks) if work.basis else 0
    return max(covariances, layer_bytes(layers, 8) if work.moments else 0)


def _check_disk(plan: RunPlan, cluster: Cluster) -> None:
    room = cluster.disk_tb * 1e12
    if plan.disk_bytes > room:
        largest = max(plan.stages, key=lambda stage: stage.disk_bytes)
        advice = {
            "score": "ask fewer queries, or lower prefilter.top",
            "query": "ask fewer queries, or allow a lower rank (query.max_rank)",
        }.get(largest.name, "track fewer model.layers")
        raise UserError(
            f"the disk is too small: the run leaves {plan.disk_bytes / 1e9:,.1f} GB ({largest.name} "
            f"{largest.disk_bytes / 1e9:,.1f} GB of it), there are {room / 1e9:,.1f} GB; {advice}, "
            f"or take disk_tb: {math.ceil(plan.disk_bytes / 1e10) / 100}"
        )
