"""What a kind that projects gradients costs beside its second moments: what whitens, and the lengths of scored ones."""

from __future__ import annotations

import math

from raylux.cost.costs import Choice, StageCost, Work
from raylux.cost.fit import batch_tokens, model_bytes, model_work, move, shard_room, worker_base
from raylux.cost.machine import Cluster, Device
from raylux.cost.sizes import layer_bytes, projected_bytes
from raylux.cost.workload import Workload


def flops(work: Workload) -> float:
    """Of a formed gradient in all layers: projected from both sides, and put against what whitens it."""
    size = work.projection
    sides = sum(2.0 * size * layer.parameters + 2.0 * size**2 * layer.inputs for layer in work.model.tracked)
    return sides + 2.0 * len(work.model.tracked) * size**4


def held(work: Workload) -> float:
    """Bytes of a worker that scores: 1/√v, and what whitens; 0 for other kinds."""
    if not work.projection:
        return 0.0
    layers = work.model.tracked
    return float(layer_bytes(layers, work.stored) + projected_bytes(len(layers), work.projection))


def lengths(work: Workload, device: Device) -> Work:
    """Of every scored sequence's gradient, formed once more in full precision."""
    return _formed(work, device, "lengths", work.candidates)


def whitening(work: Workload, cluster: Cluster, can: frozenset[str]) -> tuple[StageCost, list[Choice]]:
    """Σ φ φᵀ over the fitted sequences, on their own labels: a pass of its own."""
    device, layers, size = cluster.worker, work.model.tracked, work.projection
    batch = batch_tokens(work)[-1]
    units = max(1, math.ceil(work.fit_tokens / work.unit_tokens))
    sums = float(projected_bytes(len(layers), size, work.stored))
    works = (
        *model_work(work, device, work.fit_tokens, batch, [layers]),
        _formed(work, device, "projecting", work.fit_sequences),
        move(units * sums, cluster),
    )
    stage = StageCost(
        "whitening", works, units, cluster.workers, cluster.devices,
        worker_base(work, device) + model_bytes(work) + batch * work.model.activation_bytes(work.itemsize, layers)
        + held(work), min(shard_room(cluster), float(projected_bytes(len(layers), size))), sums, units * sums,
    )  # fmt: skip
    said = f"{size * size:,} coordinates of each of {len(layers)} layers; {sums / 1e9:,.3g} GB of what whitens them"
    return stage, [Choice("projection", f"{size} × {size} in each layer", said)]


def _formed(work: Workload, device: Device, name: str, sequences: float) -> Work:
    forming = work.tokens * 2.0 * sum(layer.parameters for layer in work.model.tracked)
    total = sequences * (forming + flops(work))
    precision = "float64" if work.dtype == "float64" else "float32"
    return Work(name, total, 0.0, device.seconds(total, precision, min(work.tokens, 64.0)))
