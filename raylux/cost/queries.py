"""What queries cost: solving and compressing them, and choosing candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from raylux.blocks import block_entries
from raylux.cost import costs, solving
from raylux.cost.contraction import captured_width
from raylux.cost.costs import Choice, StageCost, Work
from raylux.cost.fit import model_bytes, store, worker_base
from raylux.cost.machine import Cluster, Device, eigh_flops
from raylux.cost.running import forming_seconds, model_work, rotation_work
from raylux.cost.sizes import PROCESS_BYTES, covariance_bytes, layer_bytes, query_block, rank_limit
from raylux.cost.workload import Workload

# Passes of s_test's entries through memory in a solve: formed, widened, its norm, divided by Λ + λ, rounded, written.
_SOLVE_PASSES = 8
# Token rows of a product with a basis in a solve (engine/solve.py).
_SOLVE_ROWS = 256
# Products with a block of R + 8 vectors in a range finder with two power iterations, and the projection.
_FINDER_PRODUCTS, _OVERSAMPLING = 6, 8
# Tokens that one core turns into a row of the prefilter's matrix per second, and how often the corpus is read.
_PREFILTER_TOKENS = 5e6
_TOKEN_BYTES = 8


def query(work: Workload, cluster: Cluster, can: frozenset[str]) -> tuple[StageCost, list[Choice]]:
    """(G + λI)⁻¹ ∇f of every query in every layer, compressed; and what compression is measured on."""
    device, model, count = cluster.worker, work.model, work.queries
    layers, tokens = model.tracked, work.query_tokens
    low = [layer for layer in layers if work.max_error > 0 and rank_limit(work.max_rank, layer) > 0]
    tokenwise, rounding = costs.TOKEN_SOLVE in can, work.contraction
    touched = count * _SOLVE_PASSES * layer_bytes(layers, work.stored)
    finder = costs.RANGE_FINDER in can
    products = sum(_factorise_flops(*layer.shape, rank_limit(work.max_rank, layer), finder) for layer in low)
    side = min(min(layer.shape) for layer in layers)
    precision = "float64" if work.dtype == "float64" else "float32"
    # Layers that may be compressed keep full precision.
    into = replace(work, tokens=tokens, contraction=precision if low and costs.RANGE_FINDER not in can else rounding)
    solve, solving_takes = _solve(into, device, tokenwise, precision)
    forming = 2.0 * tokens * sum(layer.share * layer.parameters for layer in layers)
    written = count * layer_bytes(layers, work.operand)
    taken = count * solving_takes + forming_seconds(into, device, count * tokens)
    works = [
        *model_work(replace(work, tokens=tokens), device, count * tokens, tokens, [layers]),
        Work(
            "solve",
            count * (solve + forming),
            touched,
            max(taken, device.touching(touched))
            if device.gpu
            else taken + device.touching(touched) + device.renewing(written),
        ),
        Work("low rank", count * products, 0.0, device.seconds(count * products, precision, side)),
    ]
    grams = [] if finder else [min(layer.shape) for layer in low]
    works.append(
        Work("eigendecomposition", count * sum(map(eigh_flops, grams)), 0.0,
             count * sum(map(device.eigh_seconds, grams)))
    )  # fmt: skip
    rounded = 2 if work.contraction == "bfloat16" else work.stored
    waiting = 0.0 if low else rounded * tokens * sum(captured_width(layer, model.groups) for layer in layers)
    square = covariance_bytes(layers, model.groups, work.stored, work.blocks) if work.basis else 0
    block = query_block(layers, work.stored, waiting, square)
    blocks = 1 if costs.LAYERWISE in can else math.ceil(count / block)
    if low:
        works += _probes(work, device, blocks)
    iterated = solving.solving(work, cluster)
    works += iterated.works
    disk = count * work.query_bytes()
    bases = blocks * square
    bases += blocks * (layer_bytes(layers, work.stored) if work.moments else 0)
    works.append(store(disk + bases, cluster))
    dense = count * layer_bytes(layers, work.stored)
    held = min(block, count) * (layer_bytes(layers, work.stored) if low else waiting)
    # Per layer Q_A, Q_S and Λ; the block's s_test, its factors, and what the probes are measured with.
    largest = work.stored * max(
        2 * (block_entries(layer.inputs, work.blocks) + block_entries(layer.outputs, work.blocks))
        + (3 if low else 3 + min(block, count)) * layer.parameters
        for layer in layers
    )
    parallel = min(cluster.workers, len(model.leaders))
    stage = StageCost(
        "query", tuple(works), count * parallel, parallel, cluster.devices,
        worker_base(work, device) + model_bytes(work) + tokens * model.activation_bytes(work.itemsize, layers)
        + iterated.worker,
        float(max(held * (2 if low else 1), iterated.held) + largest), disk, disk + bases + iterated.moved,
    )  # fmt: skip
    compressed = sum(1 for layer in layers if work.stored_rank(layer))
    times = "read once" if blocks == 1 else f"read {blocks:,} times"
    found = "by a randomised range finder" if finder else "by Gram matrices and eigh"
    return stage, [
        *iterated.choices,
        Choice(
            "s_test",
            f"rank {work.rank} assumed in {compressed} of {len(layers)} layers" if compressed else "dense",
            f"{disk / 1e9:,.2f} GB at rest, {dense / 1e9:,.2f} GB dense; the run measures the rank",
        ),
        Choice(
            "solve",
            "a layer at a time" if costs.LAYERWISE in can else f"{blocks:,} blocks of {min(block, count)} queries",
            f"bases and probes {times}: {bases / 1e9:,.2f} GB",
            costs.LAYERWISE not in can,
        ),
        *([Choice("compression", found, _why_finder(layers), not finder)] if low else []),
    ]


def _solve(work: Workload, device: Device, tokenwise: bool, precision: str) -> tuple[float, float]:
    """FLOPs and seconds of a query's way into the eigenbasis, by its tokens where that is cheaper, and back.

    Args:
        work: its ``tokens`` are those of a query.
        device: of a shard.
        tokenwise: tokens may be rotated, in the precision of contractions.
        precision: of whatever brings a formed gradient into or out of the eigenbasis.
    """
    if not work.basis:
        return 0.0, 0.0
    layers = work.model.tracked
    ways = [2.0 * layer.parameters * (layer.outputs + layer.inputs) / work.blocks for layer in layers]
    formed = sum(device.seconds(way, precision, min(layer.shape)) for way, layer in zip(ways, layers, strict=True))
    flops, seconds = (0.0, 0.0) if work.query_basis == "eigen" else (sum(ways), formed)
    if not tokenwise:
        return flops + sum(ways), seconds + formed
    per_token, rotating = rotation_work(work, device, work.tokens, _SOLVE_ROWS)
    return flops + work.tokens * per_token, seconds + rotating


def _factorise_flops(outputs: int, inputs: int, rank: int, finder: bool) -> float:
    if finder:
        return 2.0 * outputs * inputs * (rank + _OVERSAMPLING) * _FINDER_PRODUCTS
    return 2.0 * outputs * inputs * (min(outputs, inputs) + rank)


def _why_finder(layers: Sequence[object]) -> str:
    return f"one decomposition per query and layer, {len(layers)} layers"


def _probes(work: Workload, device: Device, blocks: int) -> list[Work]:
    """Every block of queries is scored on the probes, dense and by component."""
    layers = work.model.tracked
    tokens = blocks * work.probes * work.tokens
    ranks = [rank_limit(work.max_rank, layer) for layer in layers]
    parts = sum(rank * (layer.outputs + layer.inputs) for rank, layer in zip(ranks, layers, strict=True))
    flops = 2.0 * tokens * sum(layer.parameters for layer in layers)
    flops += 2.0 * work.probes * work.queries * work.tokens * parts
    touched = work.probes * work.queries * 2.0 * layer_bytes(layers, work.stored)
    passes = model_work(work, device, tokens, work.tokens, [layers])
    precision = "float64" if work.dtype == "float64" else "float32"
    seconds = device.seconds(flops, precision, min(ranks), touched) + sum(one.seconds for one in passes)
    return [Work("probes", flops + sum(one.flops for one in passes), touched, seconds)]


def prefilter(work: Workload, cluster: Cluster, can: frozenset[str]) -> tuple[StageCost, list[Choice]]:
    """TF-IDF on the driver's CPU: no device is held."""
    tokens = work.corpus * work.tokens if work.prefilter else 0.0
    size = tokens * _TOKEN_BYTES
    seconds = tokens / _PREFILTER_TOKENS + size / (cluster.disk_gb_s * 1e9)
    scores = work.queries * min(work.corpus, work.candidates) * 16.0 if work.prefilter else 0.0
    stage = StageCost(
        "prefilter", (Work("term counts", 0.0, size, seconds),), 1, 1, 0, PROCESS_BYTES + size, 0.0, scores, size
    )
    return stage, []
