"""What the fit costs: covariances, their eigendecompositions, Λ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from raylux.blocks import block_sizes
from raylux.cost import costs
from raylux.cost.costs import Choice, StageCost, Work
from raylux.cost.machine import Cluster, Device, eigh_flops
from raylux.cost.model import ModelShape
from raylux.cost.passes import Held, Layers, Rooms, covariance_held, cut, moments_held, split
from raylux.cost.running import backward_work, forming_seconds, model_work, rotation_flops, rotation_work
from raylux.cost.sizes import (
    PROCESS_BYTES,
    covariance_bytes,
    covariance_products,
    covariance_sides,
    layer_bytes,
    triangle_bytes,
)
from raylux.cost.workload import Workload
from raylux.errors import UserError

_BATCHES = (16_384, 8_192, 4_096, 2_048, 1_024)
# A context of CUDA with its libraries, beside the process's own memory on the host.
GPU_BASE = 1.5e9
# Passes of the squared gradient's entries through memory: formed, squared in place, summed.
_SQUARING_PASSES = 4
# Λ is taken from this many bytes of formed gradients at once (curvature/moments.py), twice with the rotated ones.
_MOMENT_CHUNK = 2 * (1 << 28)
# Passes over a unit's sums on their way into a CPU's shard: one triangle taken out, widened, added.
_SUMS_PASSES = 3
# From this size on (curvature/eigenbases.py) the leading vectors of a matrix are found in float64, the rest in float32.
QUICK_EIGH = 512
# FLOPs for each entry of such a matrix: 8 iterations with 64 vectors, reflections of what is left, a check. Copies of a
# matrix on its way.
_LEADING_FLOPS, _EIGH_COPIES = 13 * 2 * 64, 5
# Of captured a, g and g on true labels, about what one use reads.
_ONE_OF_TWO = 0.7

# Operations that start with each tracked layer beside its products.
LAYER_OPERATIONS = 6
# Of a node's host memory, what factor shards may take: object store, workers and page cache need the rest.
SHARD_SHARE = 0.5


def shard_room(cluster: Cluster) -> float:
    """Bytes that all factor shards may hold together."""
    return cluster.nodes * cluster.host_memory_gb * 1e9 * SHARD_SHARE


def base_bytes(device: Device) -> float:
    """A worker before its model."""
    return GPU_BASE if device.gpu else float(PROCESS_BYTES)


def model_bytes(work: Workload) -> float:
    """The weights, as a worker holds them on all its devices."""
    placed = work.model.placement
    held = work.model.parameters if placed is None else sum(map(placed.held, placed.computing))
    return float(held * work.itemsize)


def worker_base(work: Workload, device: Device) -> float:
    """A worker before its model, on all its devices."""
    placed = work.model.placement
    return base_bytes(device) * (1 if placed is None else len(placed.computing))


def fullest(work: Workload, device: Device, batch: float, blocks: Sequence[Layers], held: Held) -> float:
    """Bytes of the fullest device of a worker at the peak of its passes; 0 where it has one."""
    placed = work.model.placement
    if placed is None or len(placed.computing) == 1:
        return 0.0
    # What is short of no memory at all is all that is taken.
    return rooms(work.model, work.itemsize, batch, 0.0, base_bytes(device)).short(blocks, held)


def batch_tokens(work: Workload, wanted: Layers | None = None) -> tuple[int, ...]:
    """Batches that may be chosen, none smaller than one sequence."""
    if work.batch_tokens is not None:
        return (max(work.batch_tokens, math.ceil(work.tokens)),)
    return tuple(max(size, math.ceil(work.tokens)) for size in _BATCHES)


def rooms(model: ModelShape, itemsize: int, batch: float, memory: float, base: float) -> Rooms:
    """Bytes of each device of a worker that a pass's sums and bases may take beside the model and a batch.

    Args:
        model: its shapes.
        itemsize: bytes of a number in it.
        batch: tokens.
        memory: of one device, usable bytes.
        base: what it holds before the model.
    """
    placed, tracked = model.placement, model.tracked
    if placed is None:
        taken = base + model.parameters * itemsize + batch * model.activation_bytes(itemsize, tracked)
        return Rooms.one(float(memory - taken), tracked)
    found, devices = {}, {layer.name: placed.runs_on(layer.name) for layer in tracked}
    for where in placed.computing:
        own = [layer for layer in tracked if devices[layer.name] == where]
        batches = batch * model.activation_bytes(itemsize, own, placed.blocks_on(where), where == placed.main)
        found[where] = float(memory - base - placed.held(where) * itemsize - batches)
    return Rooms(found, devices)


def passes(work: Workload, cluster: Cluster, held: Held, sums: float) -> tuple[list[Layers], int]:
    """Layers of each pass, the last of the model first, and the batch that makes the passes fewest.

    Args:
        work: what is computed; where it says how many passes, so many.
        cluster: its workers hold the model, a batch and what ``held`` says; its shards the sums.
        held: bytes of a worker for a layer of the pass.
        sums: bytes of all shards for all layers in one pass.

    Raises:
        UserError: not even one layer fits beside the model, or the passes that the config sets are too few.
    """
    layers, groups, device = work.model.tracked, work.model.groups, cluster.worker
    wanted = work.passes and min(work.passes, len(work.model.leaders))
    least = wanted or math.ceil(sums / shard_room(cluster))
    best: tuple[list[Layers], int] | None = None
    short = math.inf
    memory = (cluster.device if work.model.placement else device).memory
    for batch in batch_tokens(work):
        beside = rooms(work.model, work.itemsize, batch, memory, base_bytes(device))
        blocks = cut(layers, groups, held, beside, least)
        if blocks is None:
            short = min(short, beside.short(split(layers, groups, len(groups), beside.devices), held))
        elif best is None or len(blocks) < len(best[0]):
            best = blocks, batch
    if best is None:
        need, there = (memory + short) / 0.9e9, memory / 0.9e9
        raise UserError(
            f"a pass does not fit: the model, one batch and the sums of one layer need a device of {need:,.1f} GB, "
            f"there are {there:,.1f} GB; set engine.batch_tokens lower, or take devices of that size"
        )
    if wanted and len(best[0]) > wanted:
        raise UserError(
            f"fit.passes={work.passes} is too few: the sums do not fit a device of {device.memory_gb:,.1f} GB; set it "
            f"to {len(best[0])}, or to auto"
        )
    return best


def covariance(work: Workload, cluster: Cluster, can: frozenset[str]) -> tuple[StageCost, list[Choice]]:
    """Σ a aᵀ and Σ g gᵀ over the fit's tokens, or over those of its first sequences."""
    work = work.summed()
    device, model, groups = cluster.worker, work.model, work.model.groups
    itemsize = work.stored
    held = covariance_held(groups, itemsize, work.blocks)
    blocks, batch = passes(work, cluster, held, triangle_bytes(model.tracked, groups, 8, work.blocks))
    share = 0.5 if costs.SYMMETRIC in can else 1.0
    size = min(batch, model.hidden)
    flops = work.fit_tokens * 2.0 * covariance_products(model.tracked, groups, work.blocks) * share
    if work.sequence_products:
        flops = _sequence_flops(work, share)
    touched = work.fit_tokens / batch * 2 * covariance_bytes(model.tracked, groups, itemsize, work.blocks)
    units = max(1, math.ceil(work.fit_tokens / work.unit_tokens))
    disk = covariance_bytes(model.tracked, groups, itemsize, work.blocks)
    sums = triangle_bytes(model.tracked, groups, itemsize, work.blocks)
    works = [
        *model_work(work, device, work.fit_tokens, batch, blocks, drawn=True),
        Work("covariance products", flops, touched, _covariance_seconds(work, device, flops, size, touched)),
        *_keeping(work, cluster, batch, blocks),
        *_widening(work, device),
        move(units * sums, cluster, _SUMS_PASSES),
        store(disk, cluster),
    ]
    worker = resident(work, device, batch, blocks, held)
    stage = StageCost(
        "covariance", tuple(works), units * len(blocks), cluster.workers, cluster.devices, worker,
        min(shard_room(cluster), triangle_bytes(model.tracked, groups, 8, work.blocks)), disk, units * sums,
        device_bytes=fullest(work, device, batch, blocks, held),
    )  # fmt: skip
    return stage, [
        Choice(
            "covariance products",
            "symmetric rank-k" if share < 1 else "full",
            f"{flops / work.fit_tokens / 1e9:,.3g} GFLOP per token for {len(model.leaders)} A and "
            f"{len(model.tracked)} S",
            share == 1 or not device.gpu,
        ),
        *([_block_choice(work)] if work.blocks > 1 else []),
        _pass_choice("covariance passes", blocks, sum(map(held, model.tracked)), work, device, batch),
        Choice(
            "fit unit",
            f"{work.unit_tokens:,} tokens, {units} units"
            + (f"; {stage.idle:.0%} of the workers' time is idle" if stage.idle > 0.1 else ""),
            f"one set of sums is {sums / 1e9:,.2f} GB; moving it costs "
            f"{move(sums, cluster).seconds / max(1e-12, stage.work_seconds / units):.1%} of a unit's time",
        ),
    ]


def _covariance_seconds(work: Workload, device: Device, flops: float, size: float, touched: float) -> float:
    """Products of a and g: in the precision of the sums, but for bf16 on a GPU, which multiplies it exactly."""
    if device.gpu and work.dtype == "bfloat16" and not work.sequence_products:
        return device.seconds(flops, "bfloat16", size, touched)
    precision = "float64" if work.dtype == "float64" else "float32"
    return device.symmetric_seconds(flops, precision, size, touched)


def _widening(work: Workload, device: Device) -> list[Work]:
    """On a CPU a of every token is written anew, with the bias's coordinate beside it."""
    leading = [layer for layer in work.model.tracked if layer.name in work.model.leaders]
    size = work.fit_tokens * work.stored * sum(layer.share * layer.inputs for layer in leading)
    return [] if device.gpu else [Work("inputs written", 0.0, size, device.renewing(size))]


def _sequence_flops(work: Workload, share: float) -> float:
    """G of every sequence, GᵀG and GGᵀ; ``share`` of a product that is computed where it is symmetric."""
    forming = work.fit_tokens * 2.0 * sum(layer.share * layer.parameters for layer in work.model.tracked)
    sides = sum(layer.parameters * (layer.outputs + layer.inputs) for layer in work.model.tracked)
    return forming + work.fit_sequences * 2.0 * sides / work.blocks * share


def eigenbases(work: Workload, cluster: Cluster, can: frozenset[str]) -> tuple[StageCost, list[Choice]]:
    """One decomposition per A and S, spread over the devices of the shards."""
    device, model = cluster.device, work.model
    whole = covariance_sides(model.tracked, model.groups)
    sides = sorted((size for side in whole for size in block_sizes(side, work.blocks)), reverse=True)
    of = [eigh_precision(work, device, n) for n in sides]
    seconds = [_decomposing(device, n, precision) for n, precision in zip(sides, of, strict=True)]
    parallel = min(cluster.devices, len(model.leaders))
    loads = [0.0] * parallel
    for one in seconds:  # the longest first, to whoever is free
        loads[loads.index(min(loads))] += one
    disk = covariance_bytes(model.tracked, model.groups, work.stored, work.blocks)
    worker = base_bytes(device) + 3 * 8 * sides[0] ** 2
    works = (
        Work("eigendecomposition", sum(map(eigh_flops, sides)), 0.0, sum(seconds)),
        store(2 * disk, cluster, alone=True),
    )
    stage = StageCost(
        "eigenbases", works, len(sides), parallel, cluster.devices, worker, 0.0, disk, 2 * disk, max(loads)
    )
    return stage, [
        Choice(
            "eigh",
            f"float32 but for the leading vectors in {of.count('float32')}, float64 in {of.count('float64')}"
            if "float32" in of
            else "float64",
            f"{len(sides)} matrices up to n = {sides[0]:,}, {max(seconds):,.2f} s the largest; "
            f"all of them {sum(seconds) / 3600:.3f} device-hours"
            + (", so a lower precision would save little" if device.gpu else ""),
        )
    ]


def eigh_precision(work: Workload, device: Device, n: int) -> str:
    """Of a matrix's vectors but for the leading ones: the engine's choice where ``fit.eigh`` leaves it to it."""
    quick = work.eigh == "float32" or (work.eigh == "auto" and work.moments and not device.gpu)
    return "float32" if quick and n >= QUICK_EIGH else "float64"


def _decomposing(device: Device, n: int, precision: str) -> float:
    """Seconds of a matrix: its leading vectors by products in float64 where the rest is decomposed in float32."""
    leading = device.seconds(_LEADING_FLOPS * n**2, "float64") if precision == "float32" else 0.0
    return leading + device.eigh_seconds(n, precision) + device.renewing(_EIGH_COPIES * 8.0 * n**2)


def moments(work: Workload, cluster: Cluster, can: frozenset[str]) -> tuple[StageCost, list[Choice]]:
    """Λ: tokens or gradients rotated, gradients formed, squared, summed."""
    device, model = cluster.worker, work.model
    held = moments_held(model.groups, work.operand if work.basis else 0, work.stored, work.blocks)
    blocks, batch = passes(work, cluster, held, layer_bytes(model.tracked, 8))
    shared, first = costs.SHARED_ROTATION in can, work.summed()
    kept, beyond = first.fit_tokens * first.kept_share(cluster.workers), work.beyond(cluster.workers)
    tokens, sequences = work.fit_tokens, work.fit_sequences
    rotation, rotating = rotation_work(work, device, tokens, batch, shared)
    forming = 2.0 * sum(layer.share * layer.parameters for layer in model.tracked)
    # An expert's gradient is formed of the sequences that have a token there.
    reached = work.stored * sum(min(1.0, layer.share * work.tokens) * layer.parameters for layer in model.tracked)
    squared = sequences * _SQUARING_PASSES * reached
    starting = device.starting(sequences * len(model.tracked) * LAYER_OPERATIONS)
    units = max(1, math.ceil(tokens / work.unit_tokens))
    sums = layer_bytes(model.tracked, work.stored)
    bases = covariance_bytes(model.tracked, model.groups, work.stored, work.blocks) if work.basis else 0
    works = [
        *model_work(work, device, tokens - kept, batch, blocks),
        *([reading(work, cluster, kept)] if kept else []),
        *(_keeping(beyond, cluster, batch, blocks) if beyond and work.scores_fit else []),
        Work("rotation", tokens * rotation, 0.0, rotating),
        Work("forming", tokens * forming, 0.0, forming_seconds(work, device, tokens)),
        Work("squaring", 0.0, squared, device.touching(squared) + starting),
        move(units * sums, cluster),
        # Every node reads all bases.
        store(sums + cluster.nodes * bases, cluster),
    ]
    worker = resident(work, device, batch, blocks, held) + min(_MOMENT_CHUNK, 2.0 * sums)
    stage = StageCost(
        "lambda", tuple(works), units * len(blocks), cluster.workers, cluster.devices, worker,
        min(shard_room(cluster), layer_bytes(model.tracked, 8)), sums, units * sums,
        device_bytes=fullest(work, device, batch, blocks, held),
    )  # fmt: skip
    early = sum(rotation_flops(layer, work.tokens)[1] for layer in model.tracked)
    return stage, [
        _kept_choice(work, cluster),
        _pass_choice("Λ passes", blocks, sum(map(held, model.tracked)), work, device, batch),
        Choice(
            "Λ rotation",
            f"tokens first in {early} of {len(model.tracked)} layers"
            + (f", inputs once for each of {len(model.leaders)} groups" if shared else ""),
            f"{(rotation + forming) / 1e9:,.3g} GFLOP per token with forming, "
            f"{_formed_first(work) / 1e9:,.3g} if gradients were rotated",
        ),
    ]


def _keeping(work: Workload, cluster: Cluster, batch: float, blocks: Sequence[Layers]) -> list[Work]:
    """Captured tensors to the workers' disks, and the backward pass on true labels that spares scoring its own."""
    share = work.kept_share(cluster.workers)
    if not share:
        return []
    size = share * work.captured_bytes
    found = [Work("keeping captured", 0.0, size, size / (cluster.worker.host_gb_s * 1e9))]
    if work.scores_fit:
        device, model, tokens = cluster.worker, work.model, work.fit_tokens
        second = backward_work("backward, true labels", work, device, tokens, batch, blocks, second=True)
        touched = tokens * model.again_bytes(work.itemsize) * len(blocks)
        activating = device.activation_seconds(model.activation, tokens * model.activated * len(blocks)) / 2
        found.append(replace(second, bytes=touched, seconds=second.seconds + device.touching(touched) + activating))
    return found


def reading(work: Workload, cluster: Cluster, tokens: float) -> Work:
    """Captured tensors of so many tokens from the workers' disks: written shortly before, from the page cache."""
    size = tokens / work.fit_tokens * work.captured_bytes * (_ONE_OF_TWO if work.scores_fit else 1.0)
    return Work("reading captured", 0.0, size, size / (cluster.worker.host_gb_s * 1e9))


def _kept_choice(work: Workload, cluster: Cluster) -> Choice:
    share = work.kept_share(cluster.workers)
    return Choice(
        "captured tensors",
        f"{share:.0%} kept on local disk" if share else "not kept",
        f"{work.captured_bytes / 1e9:,.2f} GB in all, {work.captured_bytes / work.fit_tokens / 1e3:,.1f} kB per token; "
        f"{work.keep_bytes * cluster.workers / 1e9:,.2f} GB of disk may be taken; Λ runs the model for the rest",
    )


def _formed_first(work: Workload) -> float:
    """GFLOP per token of forming and rotating every gradient."""
    return sum(
        2.0 * layer.parameters * ((layer.outputs + layer.inputs) / (work.tokens * work.blocks) + layer.share)
        for layer in work.model.tracked
    )


def resident(work: Workload, device: Device, batch: float, blocks: Sequence[Layers], held: Held) -> float:
    """Bytes of a worker at the peak of its largest pass."""
    most = max(sum(map(held, block)) + batch * work.model.activation_bytes(work.itemsize, block) for block in blocks)
    return worker_base(work, device) + model_bytes(work) + most


def move(size: float, cluster: Cluster, passes: int = 1) -> Work:
    """Bytes from workers to shards: through host memory, and over the network where there are several nodes.

    ``passes``: over them on a CPU, which are work of its own.
    """
    share = (cluster.nodes - 1) / cluster.nodes
    network = size * share / (cluster.network_gb_s * 1e9) * _sharing(cluster)
    through = size * (1 if cluster.worker.gpu else passes)
    return Work("moving sums", 0.0, size, through / (cluster.worker.host_gb_s * 1e9) + network)


def store(size: float, cluster: Cluster, alone: bool = False) -> Work:
    """Bytes to and from the run folder: what a node's workers share, or (``alone``) its devices, each with its task."""
    held = min(cluster.per_node, cluster.devices) if alone else _sharing(cluster)
    return Work("run folder", 0.0, size, size / (cluster.disk_gb_s * 1e9) * held)


def _sharing(cluster: Cluster) -> int:
    """Workers of a node."""
    return max(1, min(cluster.per_node, cluster.devices) // cluster.devices_per_worker)


def _block_choice(work: Workload) -> Choice:
    layers, groups = work.model.tracked, work.model.groups
    cut, whole = (covariance_bytes(layers, groups, work.stored, blocks) for blocks in (work.blocks, 1))
    return Choice(
        "blocks",
        f"{work.blocks} of inputs and outputs",
        f"A and S take {cut / 1e9:,.2f} GB, {whole / 1e9:,.2f} GB whole; scores change (curvature.blocks)",
    )


def _pass_choice(
    name: str, blocks: Sequence[Layers], whole: float, work: Workload, device: Device, batch: int
) -> Choice:
    count = len(blocks)
    beside = (worker_base(work, device) + model_bytes(work)) / 1e9
    return Choice(
        name,
        f"{count}, batches of {batch:,} tokens",
        f"{whole / 1e9:,.2f} GB of sums and bases beside {beside:,.2f} GB of model and a batch in "
        f"{device.memory / 1e9:,.1f} GB",
    )
