"""What scoring costs: the form of the contraction in each layer, and how many queries a worker holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from raylux.cost import contraction, costs, projecting, two_stage
from raylux.cost.contraction import Form
from raylux.cost.costs import Choice, StageCost, Work
from raylux.cost.fit import LAYER_OPERATIONS, base_bytes, batch_tokens, model_bytes, reading, rooms, store, worker_base
from raylux.cost.machine import Cluster, Device
from raylux.cost.running import model_work, rotation_flops
from raylux.cost.sizes import captured_together, covariance_bytes, products_together, queries_rest, used_once
from raylux.cost.workload import Workload

# Passes of a formed gradient's entries through memory beside forming and multiplying them: set to zero.
_FORMING_PASSES = 1
# Passes of dense queries through memory until they are ready: read, laid out in tiles.
_LOADING_PASSES = 2
# Forms that put formed gradients against dense queries.
_DENSE = (contraction.DENSE, contraction.EXPANDED, contraction.EIGENBASIS)


@dataclass(frozen=True)
class Scoring:
    """How candidates are scored: a form per layer, and how often the candidates are run."""

    forms: tuple[Form, ...]
    tiles: int
    flops: float
    room: float
    batch: float


def score(work: Workload, cluster: Cluster, can: frozenset[str]) -> tuple[StageCost, list[Choice]]:
    """All queries against all candidates."""
    device, model = cluster.worker, work.model
    share = two_stage.chosen_share(work, cluster.worker.gpu)
    if share is not None:
        work = replace(work, contraction=two_stage.products(work.contraction, device.gpu))
    chosen = choose_scoring(work, device, can) if share is None else _of_pairs(work, device)
    layers, tokens = model.tracked, work.candidates * work.tokens * work.padding
    batch = chosen.batch
    spared = work.fit_tokens * work.kept_share(cluster.workers) if work.scores_fit else 0.0
    works = [
        *model_work(work, device, (tokens - spared * work.padding) * chosen.tiles, batch, [layers]),
        *([reading(work, cluster, spared * chosen.tiles)] if spared else []),
        *(
            _every_pair(work, cluster, chosen, spared / work.tokens)
            if share is None
            else two_stage.works(work, cluster, chosen.forms, _meeting(work, device, chosen, 0.0), share)
        ),
    ]
    if work.self_influence:
        works += _self_influence(work, cluster, tokens - spared * work.padding, batch)
        works += [reading(work, cluster, spared)] if spared else []
    if work.projection:
        works.append(projecting.lengths(work, device))
    # Estimates beside scores.
    disk = float(work.queries * work.candidates * work.stored) * (1 if share is None else 2)
    read = cluster.workers * work.queries * work.query_bytes() / max(1, cluster.workers / cluster.nodes)
    if any(form.name == contraction.EIGENBASIS for form in chosen.forms):
        read += cluster.nodes * covariance_bytes(layers, model.groups, work.stored, work.blocks)
    works.append(store(disk + read + tokens * 4, cluster))
    held = _held(work, device, chosen, spared / work.tokens) / chosen.tiles
    if share is not None:
        held = two_stage.held(work, device, chosen.forms)
    if any(form.name == contraction.EIGENBASIS for form in chosen.forms):
        held += covariance_bytes(layers, model.groups, work.operand, work.blocks)
    units = max(1, math.ceil(work.candidates / two_stage.unit_of(work)))
    stage = StageCost(
        "score", tuple(works), units, cluster.workers, cluster.devices,
        worker_base(work, device) + model_bytes(work) + batch * model.activation_bytes(work.itemsize, layers) + held
        + max(layer.parameters for layer in layers) * work.stored * _sequences(work, batch)
        + projecting.held(work),
        0.0, disk, disk + read,
    )  # fmt: skip
    if share is not None:
        return stage, [two_stage.choice(work, share), *_units(work, cluster, stage)]
    found = [*_score_choices(work, chosen), *_units(work, cluster, stage)]
    return stage, found if work.best is None else [*found, two_stage.choice(work, share)]


def _every_pair(work: Workload, cluster: Cluster, chosen: Scoring, kept: float) -> list[Work]:
    """Products of all queries with all candidates, of which workers keep some."""
    device, batch = cluster.worker, chosen.batch
    tokens = work.candidates * work.tokens * work.padding
    dots = work.candidates * sum(form.dots + form.per_batch / _sequences(work, batch) for form in chosen.forms)
    touched, size = _dot_bytes(work, chosen), two_stage.dot_width(work, device)
    starting = device.starting(tokens / batch * len(work.model.tracked) * LAYER_OPERATIONS)
    return [
        *_meeting(work, device, chosen, kept),
        Work("dots", dots, touched, device.seconds(dots, work.contraction, size, touched) + starting),
        *_loading(work, cluster, chosen, kept),
    ]


def _held(work: Workload, device: Device, chosen: Scoring, kept: float) -> float:
    """Bytes of a worker's queries: on a CPU where they rest on its disk, those of a layer as read and as laid out.

    Beside these are the a and g of the sequences that are put against them together, unless they are kept.
    """
    if device.gpu or not queries_rest(work.model.tracked, work.queries, work.operand):
        return sum(form.held for form in chosen.forms)
    fresh = min(max(0.0, work.candidates - kept), work.score_unit)
    return 2 * max(form.held for form in chosen.forms) + two_stage.company_bytes(work, fresh)


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


def _loading(work: Workload, cluster: Cluster, chosen: Scoring, kept: float) -> list[Work]:
    """On a CPU: queries laid out in tiles, and read for each product from the worker's disk if they are many.

    Args:
        work: what is computed.
        cluster: where.
        chosen: how.
        kept: sequences that workers keep, of which more are taken together.
    """
    if cluster.worker.gpu:
        return []
    layers, device = work.model.tracked, cluster.worker
    held = cluster.workers * sum(form.held for form in chosen.forms if form.name in _DENSE)
    first, again = held * _LOADING_PASSES, 0.0
    if queries_rest(layers, work.queries, work.operand):
        shape = work.tokens * work.padding, work.rows, work.operand
        together = products_together(layers, *shape)
        of_kept = work.rows * together
        of_fresh = work.rows * min(together, captured_together(layers, work.model.groups, *shape))
        of_fresh = min(work.score_unit, of_fresh)
        fresh = work.candidates - min(work.candidates, kept)
        uses = sum(
            math.ceil(count * work.padding / cluster.workers / rows)
            for count, rows in ((work.candidates - fresh, of_kept), (fresh, of_fresh))
        )
        once = all(used_once(layer, work.queries, work.operand) for layer in layers)
        if uses > 1 or not once:
            # Read anew, and written to where they rest; from then on one copy each time.
            first += held * (1 + _LOADING_PASSES * once)
            again = held * max(0, uses - 1 - once)
    return [Work("queries loaded", 0.0, first + again, device.renewing(first) + device.touching(2 * again))]


def choose_scoring(work: Workload, device: Device, can: frozenset[str]) -> Scoring:
    """The cheapest way by FLOPs that fits, with the largest batch that it fits beside."""
    found = [_scoring(work, device, can, float(batch)) for batch in batch_tokens(work)]
    return min(found, key=lambda scoring: scoring.flops * (1 if scoring.room > 0 else math.inf))


def _scoring(work: Workload, device: Device, can: frozenset[str], batch: float) -> Scoring:
    """In one or more tiles of queries, with batches of ``batch`` tokens."""
    room = queries_room(work, device, batch)
    allowed = {contraction.DENSE, contraction.TOKENS}
    allowed |= {contraction.EXPANDED} if costs.EXPANDED_FORM in can else set()
    eigen = work.query_basis == "eigen" or (work.query_basis is None and costs.EIGENBASIS_FORM in can)
    allowed |= {contraction.EIGENBASIS} if eigen and work.basis else set()
    dense = {contraction.EIGENBASIS if work.query_basis == "eigen" and work.basis else contraction.DENSE}
    allowed = dense if work.query_basis is not None and work.max_error <= 0 else allowed
    sequences = _sequences(work, batch)
    all_forms = _forms(work)
    model = work.model
    model_flops = work.tokens * (model.forward_flops(work.tokens) + model.backward_flops(work.tokens))
    options = []
    for names in (dense, allowed, allowed - {contraction.DENSE, contraction.EIGENBASIS} or dense):
        picked = tuple(
            contraction.cheapest(forms, frozenset(names), work.candidates, work.queries, sequences, math.inf)
            for forms in all_forms
        )
        tiles = max(1, math.ceil(sum(form.held for form in picked) / max(room, 1.0)))
        flops = work.candidates * (sum(form.per_sequence(sequences) for form in picked) + tiles * model_flops)
        options.append(Scoring(picked, tiles, flops, room, batch))
    return min(options, key=lambda option: option.flops)


def _of_pairs(work: Workload, device: Device) -> Scoring:
    """Chosen pairs: low-rank queries against tokens, dense ones against gradients; in the largest batch that fits."""
    eigen = work.query_basis == "eigen" and work.basis
    dense = contraction.EIGENBASIS if eigen else contraction.DENSE
    picked = []
    for layer, forms in zip(work.model.tracked, _forms(work), strict=True):
        name = contraction.TOKENS if work.stored_rank(layer) else dense
        picked.append(next(form for form in forms if form.name == name))
    found = []
    for batch in map(float, batch_tokens(work)):
        room = queries_room(work, device, batch) - two_stage.held(work, device, picked)
        found.append(Scoring(tuple(picked), 1, 0.0, room, batch))
    return next((one for one in sorted(found, key=lambda one: -one.batch) if one.room > 0), found[0])


def _forms(work: Workload) -> list[list[Form]]:
    """Of each layer, what its contraction may be."""
    return [
        contraction.forms(
            *layer.shape, work.tokens * layer.share, work.queries, work.stored_rank(layer) or min(layer.shape),
            work.operand, work.blocks,
        )
        for layer in work.model.tracked
    ]  # fmt: skip


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


def _score_choices(work: Workload, chosen: Scoring) -> list[Choice]:
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
    return found


def _units(work: Workload, cluster: Cluster, stage: StageCost) -> list[Choice]:
    """What to set where workers would wait for one another."""
    if stage.idle <= 0.1:
        return []
    wanted = max(1, work.candidates // (4 * cluster.workers))
    return [
        Choice("score unit", f"{two_stage.unit_of(work):,} sequences, {stage.tasks} units",
               f"{stage.idle:.0%} of {cluster.workers} workers' time is idle; set score.unit_size={wanted}")
    ]  # fmt: skip
