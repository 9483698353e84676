"""What two-stage scoring costs: estimates of all pairs, exact scores of those that may be among the best of a query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from raylux.cost.contraction import Form, captured_width
from raylux.cost.costs import Choice, Work
from raylux.cost.machine import Cluster, Device
from raylux.cost.sizes import captured_together
from raylux.cost.workload import Workload
from raylux.layers import TrackedLayer

# Rows and columns of a layer's block that estimates are taken to see where a run has yet to find out
# (docs/results/two-stage.md); of either side, the fewer on inputs.
_BLOCK = 256, 16
# A pair that is scored by itself, in pairs of a matrix product: measured on a CPU in float32.
GATHERED = 5.0
# Sequences of the pilot: a share of all, between two bounds.
_PILOT_SHARE, PILOT_LEAST, _PILOT_MOST = 1 / 64, 128, 2048
# Fewer sequences than this for each of the best that are wanted are scored as ever.
_WORTH = 8
# Pairs that may be among the best by their estimates, for each that is wanted, beyond the pilot: on workload A of the
# benchmark 3.2 (docs/results/two-stage.md). A run finds out; the plan assumes it.
_REACHED = 3.2
# Passes through memory that was not in use before, by which a worker's queries are laid out for both stages: 7.5 s per
# GB were measured where such a pass took 0.38 (the same page).
_LAYING_PASSES = 20


def pilot(sequences: float, best: int) -> float:
    """Sequences all of whose pairs are scored before any is estimated; 0: there are too few for two stages."""
    if sequences < _WORTH * best or sequences < 2 * PILOT_LEAST:
        return 0.0
    return min(max(sequences * _PILOT_SHARE, PILOT_LEAST), _PILOT_MOST)


def relative_cost(
    shapes: Sequence[tuple[int, int]],
    tokens: float,
    queries: int,
    share: float,
    gathered: float = GATHERED,
    estimates: float | None = None,
    formed: float | None = None,
) -> float:
    """Multiplications of estimates and chosen pairs, in those of the contraction of all pairs, Σ (T + Q)·P·M.

    Args:
        shapes: (P, M) of each layer.
        tokens: T, of a sequence.
        queries: Q.
        share: of all pairs, that are chosen.
        gathered: of a pair by itself, in pairs of a matrix product.
        estimates: multiplications of one sequence's; None: of the blocks that are taken for granted.
        formed: share of the sequences with a chosen pair, whose gradients are formed; None: as if queries chose
            independently.
    """
    entries = sum(outputs * inputs for outputs, inputs in shapes)
    estimates = _estimating(shapes, tokens, queries) if estimates is None else estimates
    formed = reached(share, queries) if formed is None else formed
    stages = estimates + (formed * tokens + gathered * share * queries) * entries
    return stages / ((tokens + queries) * entries)


def block_cost(shape: tuple[int, int], tokens: float, queries: int, block: tuple[int, int]) -> float:
    """Multiplications of one sequence's estimates in a layer (``raylux.influence.leading``).

    Args:
        shape: (P, M).
        tokens: T.
        queries: Q.
        block: (r, c), rows and columns that are seen.
    """
    (outputs, inputs), (rows, columns) = shape, block
    both = tokens * (outputs * rows + inputs * columns + rows * columns)
    few = tokens * (inputs * columns + outputs * columns) + outputs * rows * columns
    other = tokens * (outputs * rows + inputs * rows) + inputs * rows * columns
    forming = few if rows > 2 * columns else other if columns > 2 * rows else both
    return forming + queries * rows * columns


def share_within(wanted: float, room: float) -> float:
    """Share of a query's scores, were they normal, that are at most ``room`` spreads below its best ones.

    Args:
        wanted: share of the best.
        room: spreads.
    """
    if wanted >= 1:
        return 1.0
    normal = NormalDist()
    return normal.cdf(normal.inv_cdf(wanted) + room)


def reached(share: float, queries: int) -> float:
    """Share of the sequences that some query wants, if each wants this share on its own."""
    return -math.expm1(queries * math.log1p(-share)) if share < 1 else 1.0


def _estimating(shapes: Sequence[tuple[int, int]], tokens: float, queries: int) -> float:
    """Multiplications of one sequence's estimates by the blocks that are taken for granted."""
    return sum(block_cost(shape, tokens, queries, assumed_block(shape)) for shape in shapes)


def _block_entries(layer: TrackedLayer) -> int:
    return math.prod(assumed_block(layer.shape))


def assumed_block(shape: tuple[int, int]) -> tuple[int, int]:
    """(r, c) that estimates are taken to see of a layer."""
    return min(_BLOCK[0], shape[0]), min(_BLOCK[1], shape[1])


def chosen_share(work: Workload) -> float | None:
    """Share of the pairs that two stages are taken to score; None: all are scored as ever."""
    if work.best is None:
        return None
    first = pilot(work.candidates, work.best) / work.candidates
    share = first + (1 - first) * min(1.0, _REACHED * work.best / work.candidates)
    shapes = [layer.shape for layer in work.model.tracked]
    pays = relative_cost(shapes, work.tokens, work.queries, share) < 1
    return share if first and pays else None


def works(work: Workload, cluster: Cluster, forms: Sequence[Form], meeting: Sequence[Work], share: float) -> list[Work]:
    """What takes the place of products with every query.

    Args:
        work: what is computed.
        cluster: where.
        forms: of the contraction of all pairs.
        meeting: tokens rotated and gradients formed, of every sequence.
        share: of the pairs, that are chosen.
    """
    device, count = cluster.worker, float(work.candidates)
    shapes = [layer.shape for layer in work.model.tracked]
    entries = sum(outputs * inputs for outputs, inputs in shapes)
    estimates, formed = 2.0 * count * _estimating(shapes, work.tokens, work.queries), reached(share, work.queries)
    pairs = 2.0 * share * count * work.queries * entries
    alone = device.seconds(GATHERED * pairs, work.contraction, dot_width(work, device))
    return [
        *(Work(one.kind, formed * one.flops, formed * one.bytes, formed * one.seconds) for one in meeting),
        Work("estimates", estimates, 0.0, device.seconds(estimates, work.contraction, dot_width(work, device))),
        Work("chosen pairs", pairs, 0.0, alone),
        *_laying(work, cluster, sum(form.held for form in forms)),
    ]


def dot_width(work: Workload, device: Device) -> float:
    """The smallest dimension of a product of gradients with queries."""
    return max(work.tile, 64) if device.gpu else min(work.tile, work.rows)


def _laying(work: Workload, cluster: Cluster, held: float) -> list[Work]:
    """On a CPU queries are laid out by each worker, and read for each company of sequences."""
    device = cluster.worker
    if device.gpu:
        return []
    laid = cluster.workers * held * _LAYING_PASSES
    read = 2 * held * work.candidates / min(work.score_unit, company(work))
    return [Work("queries loaded", 0.0, laid + read, device.renewing(laid) + device.touching(read))]


def company(work: Workload) -> float:
    """Sequences that are taken together."""
    shape = work.tokens * work.padding, work.rows, work.operand
    return work.rows * captured_together(work.model.tracked, work.model.groups, *shape) / work.padding


def company_bytes(work: Workload, most: float) -> float:
    """What a company of sequences captured, of ``most`` at most."""
    widths = sum(captured_width(layer, work.model.groups) for layer in work.model.tracked)
    return min(most, company(work)) * work.tokens * work.padding * widths * work.operand


def held(work: Workload, device: Device, forms: Sequence[Form]) -> float:
    """Bytes of a worker: a layer's queries twice as they are laid out, and a company; a GPU holds all, and blocks."""
    captured = company_bytes(work, work.score_unit)
    if device.gpu:
        blocks = work.queries * work.operand * sum(map(_block_entries, work.model.tracked))
        return captured + blocks + sum(form.held for form in forms)
    return captured + 2 * max(form.held for form in forms)


def choice(work: Workload, share: float | None) -> Choice:
    """What the plan says of it."""
    if share is None:
        return Choice("two stages", "all pairs are scored", "too few sequences, or estimates would cost more")
    return Choice(
        "two stages",
        f"{share:.0%} of the pairs scored exactly",
        f"assumed, for the {work.best} best of a query and the pilot; the run measures how far estimates reach",
    )
