"""What iterative solves of queries cost: products with the Gauss-Newton matrix, and the state between two of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from raylux.cost.costs import Choice, StageCost, Work
from raylux.cost.fit import batch_tokens, model_bytes, move, store, worker_base
from raylux.cost.machine import Cluster
from raylux.cost.running import model_work
from raylux.cost.sizes import SOLVE_STATE, layer_bytes, solve_block
from raylux.cost.workload import Workload

# Graphs of a forward and of a backward pass are held beside each other, and attention by plain operations.
_GRAPHS = 3.0
# Arrays of the state that a block's commit writes, for the shards to go on from and for workers to read.
_WRITTEN = 3


@dataclass(frozen=True)
class Solving:
    """The part of the query stage that an iterative solver takes; nothing where queries are solved directly.

    Attributes:
        works: by kind.
        choices: what the plan says of them.
        moved: bytes between workers, shards and the run folder.
        held: of all shards together.
        worker: of a worker beside the model and a query's pass.
    """

    works: tuple[Work, ...] = ()
    choices: tuple[Choice, ...] = ()
    moved: float = 0.0
    held: float = 0.0
    worker: float = 0.0


def solving(work: Workload, cluster: Cluster) -> Solving:
    """All products of all queries, if each takes as many as it may.

    A batch takes a forward pass and a backward pass whatever the queries of a block; each query takes two backward
    passes' work more, and every tracked layer's weights twice for each token.
    """
    if not work.solver_products:
        return Solving()
    # Their graph has a second derivative, and is kept whole.
    work = replace(work, model=replace(work.model, checkpointing=False))
    device, model, count = cluster.worker, work.model, work.queries
    layers, size = model.tracked, layer_bytes(model.tracked, work.stored)
    block = min(count, solve_block(layers, work.stored))
    blocks, batch = math.ceil(count / block), batch_tokens(work)[-1]
    tokens = work.solver_products * work.solver_sequences * work.tokens
    forward, backward, elementwise = model_work(work, device, tokens, batch, [layers])
    times = blocks + 2 * count
    contracted = 4.0 * count * tokens * sum(layer.parameters for layer in layers)
    units = max(1, math.ceil(work.solver_sequences * work.tokens / work.unit_tokens))
    sums = float(work.solver_products * count * units * size)
    state = float(work.solver_products * count * (_WRITTEN + cluster.workers) * size)
    works = (
        Work("products: forward", blocks * forward.flops, 0.0, blocks * forward.seconds),
        Work("products: backward", times * backward.flops, 0.0, times * backward.seconds),
        Work("products: elementwise", 0.0, times * elementwise.bytes, times * elementwise.seconds),
        Work("products: layers", contracted, 0.0, device.seconds(contracted, work.dtype, min(batch, model.hidden))),
        move(sums, cluster),
        store(state, cluster),
    )
    passes = f"{blocks} forward and {times} backward passes over {work.solver_sequences:,} fitted sequences each"
    choice = Choice(
        "solver",
        f"up to {work.solver_products:,} products in {blocks} block{'s' * (blocks > 1)} of {block} queries",
        f"{passes}; {sum(one.seconds for one in works) / 3600:,.3g} device-hours, whatever the number of candidates",
    )
    activations = _GRAPHS * batch * model.activation_bytes(work.itemsize, layers)
    return Solving(works, (choice,), sums + state, float(SOLVE_STATE * block * size), 2.0 * block * size + activations)


def joint(work: Workload, cluster: Cluster, can: frozenset[str]) -> tuple[StageCost, list[Choice]]:
    """The exact matrix over all tracked weights: a product over the fitted sequences for each of them."""
    size = sum(layer.parameters for layer in work.model.tracked)
    every = replace(work, queries=size, solver_products=1, solver_sequences=work.fit_sequences)
    taken = solving(every, cluster)
    matrix = float(size**2)
    units = max(1, math.ceil(work.fit_tokens / work.unit_tokens))
    stage = StageCost(
        "exact matrix", taken.works[:-1], units, cluster.workers, cluster.devices,
        worker_base(work, cluster.worker) + model_bytes(work) + matrix * work.stored + taken.worker, 8 * matrix,
        matrix * work.stored, units * matrix * work.stored,
    )  # fmt: skip
    return stage, [Choice("exact matrix", f"dense, {size:,} × {size:,}", f"{8 * matrix / 1e9:,.2f} GB in float64")]
