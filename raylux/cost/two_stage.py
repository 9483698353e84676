"""What two-stage scoring costs: estimates of all pairs, exact scores of those that may be among the best of a query."""

from __future__ import annotations

from collections.abc import Sequence

from raylux.cost.contraction import Form, captured_width
from raylux.cost.costs import Choice, Work
from raylux.cost.machine import Cluster, Device
from raylux.cost.sizes import captured_together
from raylux.cost.workload import Workload

# Of the largest eigenvalues on a side of a layer, so many directions are scaled; numbers of a folded gradient, about.
DIRECTIONS, FOLDED = 16, 1 << 14
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
    size: int = FOLDED,
) -> float:
    """Multiplications of estimates and chosen pairs, in those of the contraction of all pairs, Σ (T + Q)·P·M.

    Gradients are formed in either stage; they are balanced, and all queries folded put against all of them folded.

    Args:
        shapes: (P, M) of each layer.
        tokens: T, of a sequence.
        queries: Q.
        share: of all pairs, that are chosen.
        gathered: of a pair by itself, in pairs of a matrix product.
        size: numbers of a folded gradient.
    """
    entries = sum(outputs * inputs for outputs, inputs in shapes)
    balanced, folded = _estimating(shapes, tokens, size)
    stages = 2 * tokens * entries + balanced + queries * folded + gathered * share * queries * entries
    return stages / ((tokens + queries) * entries)


def _estimating(shapes: Sequence[tuple[int, int]], tokens: float, size: int = FOLDED) -> tuple[float, float]:
    """Multiplications of a sequence that balance its gradient, and of its folded one with a query's."""
    folded = sum(min(size, outputs * inputs) for outputs, inputs in shapes)
    return 4 * tokens * DIRECTIONS * sum(map(sum, shapes)), float(folded)


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
        meeting: tokens rotated and gradients formed once, which either stage does.
        share: of the pairs, that are chosen.
    """
    device, count = cluster.worker, float(work.candidates)
    shapes = [layer.shape for layer in work.model.tracked]
    balanced, folded = _estimating(shapes, work.tokens)
    entries = sum(outputs * inputs for outputs, inputs in shapes)
    estimates = 2.0 * count * (balanced + work.queries * folded)
    pairs = 2.0 * share * count * work.queries * entries
    alone = device.seconds(GATHERED * pairs, work.contraction, dot_width(work, device))
    return [
        *(Work(one.kind, 2 * one.flops, 2 * one.bytes, 2 * one.seconds) for one in meeting),
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
    """Bytes of a worker: a layer's queries twice as they are laid out, and a company; a GPU holds all, folded too."""
    captured = company_bytes(work, work.score_unit)
    if device.gpu:
        folded = work.queries * work.operand * sum(min(FOLDED, layer.parameters) for layer in work.model.tracked)
        return captured + folded + sum(form.held for form in forms)
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
