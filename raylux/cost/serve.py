"""What queries cost: solving and compressing them, choosing candidates, scoring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raylux.blocks import block_entries
from raylux.cost import contraction, costs, projecting, solving
from raylux.cost.contraction import Form, captured_width
from raylux.cost.costs import Choice, StageCost, Work
from raylux.cost.fit import (
    LAYER_OPERATIONS,
    base_bytes,
    batch_tokens,
    model_bytes,
    reading,
    rooms,
    store,
    worker_base,
)
from raylux.cost.machine import Cluster, Device, eigh_flops
from raylux.cost.running import forming_seconds, model_work, rotation_flops, rotation_work
from raylux.cost.sizes import IN_MEMORY, PROCESS_BYTES, covariance_bytes, layer_bytes, query_block, rank_limit
from raylux.cost.workload import Workload

# Passes of s_test's entries through memory in a solve: formed, widened, its norm, divided by Λ + λ, rounded, written.
_SOLVE_PASSES = 8
# Token rows of a product with a basis in a solve (engine/solve.py).
_SOLVE_ROWS = 256
# Passes of a formed gradient's entries through memory beside forming and multiplying them: set to zero.
_FORMING_PASSES = 1
# Passes of dense queries through memory until they are ready: read, laid out in tiles.
_LOADING_PASSES = 2
# Products with a block of R + 8 vectors in a range finder with two power iterations, and the projection.
_FINDER_PRODUCTS, _OVERSAMPLING = 6, 8
# Tokens that one core turns into a row of the prefilter's matrix per second, and how often the corpus is read.
_PREFILTER_TOKENS = 5e6
_TOKEN_BYTES = 8
# Forms that put formed gradients against dense queries.
_DENSE = (contraction.DENSE, contraction.EXPANDED, contraction.EIGENBASIS)


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


@dataclass(frozen=True)
class Scoring:
    """How candidates are scored: a form per layer, how often the candidates are run, and what is rescored."""

    forms: tuple[Form, ...]
    tiles: int
    rescored: int
    flops: float
    room: float
    batch: float


def score(work: Workload, cluster: Cluster, can: frozenset[str]) -> tuple[StageCost, list[Choice]]:
    """All queries against all candidates."""
    device, model = cluster.worker, work.model
    chosen = choose_scoring(work, device, can)
    layers, tokens = model.tracked, work.candidates * work.tokens * work.padding
    count, batch = float(work.candidates), chosen.batch
    spared = work.fit_tokens * work.kept_share(cluster.workers) if work.scores_fit else 0.0
    dots = count * sum(form.dots + form.per_batch / _sequences(work, batch) for form in chosen.forms)
    starting = device.starting(tokens / batch * len(layers) * LAYER_OPERATIONS)
    works = [
        *model_work(work, device, (tokens - spared * work.padding) * chosen.tiles, batch, [layers]),
        *([reading(work, cluster, spared * chosen.tiles)] if spared else []),
        *_meeting(work, device, chosen, spared / work.tokens),
        Work("dots", dots, _dot_bytes(work, chosen), device.seconds(
            dots, work.contraction, max(work.tile, 64) if device.gpu else min(work.tile, work.rows),
            _dot_bytes(work, chosen)) + starting),
        *_loading(work, cluster, chosen),
    ]  # fmt: skip
    if chosen.rescored:
        works.append(_rescoring(work, device, chosen))
    if work.self_influence:
        works += _self_influence(work, cluster, tokens - spared * work.padding, batch)
        works += [reading(work, cluster, spared)] if spared else []
    if work.projection:
        works.append(projecting.lengths(work, device))
    disk = float(work.queries * work.candidates * work.stored)
    read = cluster.workers * work.queries * work.query_bytes() / max(1, cluster.workers / cluster.nodes)
    if any(form.name == contraction.EIGENBASIS for form in chosen.forms):
        read += cluster.nodes * covariance_bytes(layers, model.groups, work.stored, work.blocks)
    works.append(store(disk + read + tokens * 4, cluster))
    held = sum(form.held for form in chosen.forms) / chosen.tiles
    units = max(1, math.ceil(work.candidates / work.score_unit))
    stage = StageCost(
        "score", tuple(works), units, cluster.workers, cluster.devices,
        worker_base(work, device) + model_bytes(work) + batch * model.activation_bytes(work.itemsize, layers) + held
        + max(layer.parameters for layer in layers) * work.stored * _sequences(work, batch)
        + projecting.held(work),
        0.0, disk, disk + read,
    )  # fmt: skip
    return stage, _score_choices(work, cluster, chosen, stage)


def _meeting(work: Workload, device: Device, chosen: Scoring, kept: float) -> list[Work]:
    """Candidates' tokens rotated, and their gradients formed; of ``kept`` candidates Λ has rotated the inputs."""
    count, flops, seconds, touched = work.candidates * work.padding, [0.0, 0.0], [0.0, 0.0], 0.0
    for form, layer in zip(chosen.forms, work.model.tracked, strict=True):
        flops[1] += count * form.forming
        squares = [side**2 for side in layer.shape]
        early = rotation_flops(layer, work.tokens)[1]
        for place, (side, square) in enumerate(zip(layer.shape, squares, strict=True)):
            turned = kept * work.padding if early and place == 1 else 0.0
            own = max(0.0, count - turned) * form.rotation * square / sum(squares)
            flops[0] += own
            whole = form.name == contraction.EIGENBASIS
            read = count * work.tokens / chosen.batch * work.operand * square / work.blocks if whole else 0.0
            seconds[0] += device.seconds(own, work.contraction, side / work.blocks, read, side % 2 == 1)
        written = 0.0
        if form.name in _DENSE:
            written = _FORMING_PASSES * count * layer.parameters * work.operand
        size = min(work.tokens, *layer.shape)
        seconds[1] += device.forming_seconds(count * form.forming, work.contraction, size, written)
        touched += written
    return [Work("rotation", flops[0], 0.0, seconds[0]), Work("forming", flops[1], touched, seconds[1])]


def _loading(work: Workload, cluster: Cluster, chosen: Scoring) -> list[Work]:
    """On a CPU: queries laid out in tiles, and read once for each product from the worker's disk if they are many.

    Those that are put against sequences which a worker keeps are read less often: counted as if there were none.
    """
    held = sum(form.held for form in chosen.forms if form.name in _DENSE)
    size = cluster.workers * held * _LOADING_PASSES
    if held > IN_MEMORY:
        size += held * (cluster.workers + math.ceil(work.candidates * work.padding / work.rows))
    return [] if cluster.worker.gpu else [Work("queries loaded", 0.0, size, cluster.worker.renewing(size))]


def choose_scoring(work: Workload, device: Device, can: frozenset[str]) -> Scoring:
    """The cheapest way by FLOPs that fits, with the largest batch that it fits beside."""
    found = [_scoring(work, device, can, float(batch)) for batch in batch_tokens(work)]
    return min(found, key=lambda scoring: scoring.flops * (1 if scoring.room > 0 else math.inf))


def _scoring(work: Workload, device: Device, can: frozenset[str], batch: float) -> Scoring:
    """Exact in one or more tiles of queries, or two stages, with batches of ``batch`` tokens."""
    model, layers = work.model, work.model.tracked
    room = queries_room(work, device, batch)
    allowed = {contraction.DENSE, contraction.TOKENS}
    allowed |= {contraction.EXPANDED} if costs.EXPANDED_FORM in can else set()
    eigen = work.query_basis == "eigen" or (work.query_basis is None and costs.EIGENBASIS_FORM in can)
    allowed |= {contraction.EIGENBASIS} if eigen and work.basis else set()
    dense = {contraction.EIGENBASIS if work.query_basis == "eigen" and work.basis else contraction.DENSE}
    allowed = dense if work.query_basis is not None and work.max_error <= 0 else allowed
    bytes_each = work.operand
    sequences = _sequences(work, batch)
    all_forms = [
        contraction.forms(*layer.shape, work.tokens * layer.share, work.queries,
                          work.stored_rank(layer) or min(layer.shape), work.subspace, bytes_each,
                          work.blocks)
        for layer in layers
    ]  # fmt: skip
    model_flops = work.tokens * (model.forward_flops(work.tokens) + model.backward_flops(work.tokens))
    options = []
    for names in (dense, allowed, allowed - {contraction.DENSE, contraction.EIGENBASIS} or dense):
        picked = tuple(
            contraction.cheapest(forms, frozenset(names), work.candidates, work.queries, sequences, math.inf)
            for forms in all_forms
        )
        tiles = max(1, math.ceil(sum(form.held for form in picked) / max(room, 1.0)))
        flops = work.candidates * (sum(form.per_sequence(sequences) for form in picked) + tiles * model_flops)
        options.append(Scoring(picked, tiles, 0, flops, room, batch))
    if costs.SUBSPACE_FORM in can and work.queries * work.rescored < work.queries * work.candidates:
        picked = tuple(forms[-1] for forms in all_forms)
        flops = work.candidates * (sum(form.per_sequence(sequences) for form in picked) + model_flops)
        again = distinct(work.candidates, work.queries, work.rescored)
        flops += again * model_flops + _pair_flops(work) * work.queries * work.rescored
        if sum(form.held for form in picked) <= room:
            options.append(Scoring(picked, 1, again, flops, room, batch))
    return min(options, key=lambda option: option.flops)


def queries_room(work: Workload, device: Device, batch: float) -> float:
    """Bytes that s_test may take of a worker: over several devices by the first that is full."""
    model, placed = work.model, work.model.placement
    memory = device.memory if placed is None else device.memory / len(placed.computing)
    found = rooms(model, work.itemsize, batch, memory, base_bytes(device))
    whole = sum(layer.parameters for layer in model.tracked)
    shares = {
        where: sum(layer.parameters for layer in model.tracked if found.devices[layer.name] == where) / whole
        for where in found.of
    }
    return min(found.of[where] / share for where, share in shares.items() if share)


def distinct(candidates: int, queries: int, each: int) -> int:
    """Expected number of different sequences among ``each`` best of every query, if queries chose independently."""
    share = min(1.0, each / candidates)
    return round(candidates * -math.expm1(queries * math.log1p(-share))) if share < 1 else candidates


def _pair_flops(work: Workload) -> float:
    """One query on one sequence by the cheapest exact form."""
    return sum(
        min(2.0 * work.tokens * rank * (layer.outputs + layer.inputs), 2.0 * (work.tokens + 1) * layer.parameters)
        for layer in work.model.tracked
        for rank in [work.stored_rank(layer) or min(layer.shape)]
    )


def _rescoring(work: Workload, device: Device, chosen: Scoring) -> Work:
    """The best of the first stage once more: forward, backward, exact dots, their queries from host memory."""
    passes = model_work(work, device, chosen.rescored * work.tokens * work.padding, chosen.batch, [work.model.tracked])
    pairs = work.queries * work.rescored
    flops = pairs * _pair_flops(work)
    loaded = pairs * work.query_bytes() * work.operand / work.stored
    seconds = device.seconds(flops, work.contraction, work.rank) + loaded / (device.host_gb_s * 1e9)
    return Work("rescoring", flops + sum(one.flops for one in passes), loaded,
                seconds + sum(one.seconds for one in passes))  # fmt: skip


def _self_influence(work: Workload, cluster: Cluster, tokens: float, batch: float) -> list[Work]:
    """A second pass over the candidates, ``tokens`` of which no worker keeps: their gradients in the eigenbases."""
    device, layers = cluster.worker, work.model.tracked
    turned = sum(rotation_flops(layer, work.tokens)[0] for layer in layers) / work.blocks if work.basis else 0.0
    if work.projection:  # φ, its length and the step that it stands for
        turned += 2 * projecting.flops(work) / work.tokens
    flops = work.candidates * work.tokens * (turned + 2.0 * sum(layer.share * layer.parameters for layer in layers))
    precision = "float64" if work.dtype == "float64" else "float32"
    found = Work("self-influence", flops, 0.0, device.seconds(flops, precision, min(work.tokens, 64.0)))
    return [*model_work(work, device, tokens, batch, [layers]), found]


def _sequences(work: Workload, batch: float) -> float:
    return max(1.0, batch / (work.tokens * work.padding))


def _dot_bytes(work: Workload, chosen: Scoring) -> float:
    """Formed gradients are read once per tile of queries, each tile once per batch."""
    total = 0.0
    tiles = math.ceil(work.queries / work.tile)
    batches = work.candidates / max(work.rows, _sequences(work, chosen.batch))
    for form, layer in zip(chosen.forms, work.model.tracked, strict=True):
        if form.name in _DENSE:
            total += layer.parameters * work.operand * (work.candidates * tiles + batches * tiles * work.tile)
    return total


def _score_choices(work: Workload, cluster: Cluster, chosen: Scoring, stage: StageCost) -> list[Choice]:
    names = [form.name for form in chosen.forms]
    counted = ", ".join(f"{name} in {names.count(name)} layers" for name in dict.fromkeys(names))
    held = sum(form.held for form in chosen.forms) / 1e9
    today = {contraction.DENSE, contraction.TOKENS} | (
        {contraction.EIGENBASIS} if work.query_basis == "eigen" else set()
    )
    engine = set(names) <= today and chosen.tiles == 1
    per_token = sum(form.per_sequence(_sequences(work, chosen.batch)) for form in chosen.forms) / work.tokens
    found = [
        Choice(
            "contraction",
            counted,
            f"{per_token / 1e9:,.3g} GFLOP per token; queries take {held:,.2f} GB of {chosen.room / 1e9:,.2f} GB free",
            engine,
        )
    ]
    if chosen.tiles > 1:
        found.append(
            Choice("query tiles", str(chosen.tiles), "the queries do not fit beside the model at once", in_engine=False)
        )
    if chosen.rescored:
        found.append(
            Choice(
                "rescoring",
                f"{work.rescored} best of each query, about {chosen.rescored:,} sequences",
                f"a subspace of side {work.subspace} ranks all candidates first, exact scores decide among the best",
                in_engine=False,
            )
        )
    if stage.idle > 0.1:
        wanted = max(1, work.candidates // (4 * cluster.workers))
        found.append(
            Choice("score unit", f"{work.score_unit:,} sequences, {stage.tasks} units",
                   f"{stage.idle:.0%} of {cluster.workers} workers' time is idle; set score.unit_size={wanted}")
        )  # fmt: skip
    return found
