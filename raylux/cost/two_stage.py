"""What two-stage scoring costs: estimates of all pairs, exact scores of those that may be among the best of a query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from raylux.cost.contraction import TOKENS, Form, captured_width
from raylux.cost.costs import Choice, Work
from raylux.cost.machine import Cluster, Device
from raylux.cost.sizes import captured_together
from raylux.cost.workload import Workload

# Rows and columns of a layer's block that estimates are taken to see where a run has yet to find out
# (docs/results/two-stage.md); of either side, the fewer on inputs.
_BLOCK = 1024, 12
# Of the fewer of them a share comes first on a CPU, and leaves a share of the pairs open (the same page).
_FIRST, _OPENED = 1 / 2, 0.25
# Sequences of the pilot: a share of all, between two bounds.
_PILOT_SHARE, PILOT_LEAST, _PILOT_MOST = 1 / 128, 128, 512
_PILOT_UNITS = 4
# Fewer sequences than this for each of the best that are wanted are scored as ever.
_WORTH = 8
# Pairs that may be among the best by their estimates, for each that is wanted, beyond the pilot: on workload A of the
# benchmark 2.2 (docs/results/two-stage.md). A run finds out; the plan assumes it.
_REACHED = 2.2
# Passes through memory that was not in use before, by which a worker's queries are laid out for both stages: 7.5 s per
# GB were measured where such a pass took 0.38 (the same page).
_LAYING_PASSES = 20


@dataclass(frozen=True)
class Pace:
    """What a multiplication takes elsewhere, in those of a product of all pairs.

    Attributes:
        gathered: of a pair that is scored by itself.
        narrow: of an estimate, whose products are narrow.
    """

    gathered: float
    narrow: float


COUNTED = Pace(1.0, 1.0)
"""Multiplications alone."""

# Measured on a CPU in float32. In bf16, which neither single pairs nor estimates are taken in, products of all pairs
# take so many times less (AVX512-BF16).
_ALONE = Pace(5.0, 2.5)
_QUICKER = 2.2


def pace(contraction: str) -> Pace:
    """Where products of all pairs are in the precision ``contraction``."""
    quicker = _QUICKER if contraction == "bfloat16" else 1.0
    return Pace(quicker * _ALONE.gathered, quicker * _ALONE.narrow)


def alone(contraction: str) -> str:
    """The precision of single pairs and of estimates."""
    return "float64" if contraction == "float64" else "float32"


def products(contraction: str, gpu: bool) -> str:
    """The precision of what else two stages take products of: on a GPU that of single pairs."""
    return alone(contraction) if gpu else contraction


def pilot(sequences: float, best: int) -> float:
    """Sequences all of whose pairs are scored before any is estimated; 0: there are too few for two stages."""
    if sequences < _WORTH * best or sequences < 2 * PILOT_LEAST:
        return 0.0
    return min(max(sequences * _PILOT_SHARE, PILOT_LEAST), _PILOT_MOST)


def unit_size(most: int, sequences: float, best: int) -> int:
    """Sequences of a unit, of which there may be ``most``: the pilot is of several units where it is large.

    All of a unit is in the pilot or nothing.
    """
    first = pilot(sequences, best)
    return min(most, max(PILOT_LEAST, int(first) // _PILOT_UNITS)) if first else most


def relative_cost(
    shapes: Sequence[tuple[int, int]],
    tokens: float,
    queries: int,
    share: float,
    pace: Pace,
    *,
    estimates: float,
    refined: float = 0.0,
    formed: float | None = None,
) -> float:
    """Multiplications of estimates and chosen pairs, in those of the contraction of all pairs, Σ (T + Q)·P·M.

    Args:
        shapes: (P, M) of each layer.
        tokens: T, of a sequence.
        queries: Q.
        share: of all pairs, that are chosen.
        pace: what they take; ``COUNTED``: each counts for one.
        estimates: multiplications of one sequence's.
        refined: likewise, of those that are taken pair by pair.
        formed: share of the sequences with a chosen pair, whose gradients are formed; None: as if queries chose
            independently.
    """
    entries = sum(outputs * inputs for outputs, inputs in shapes)
    formed = reached(share, queries) if formed is None else formed
    stages = pace.narrow * estimates + pace.gathered * refined
    stages += (formed * tokens + pace.gathered * share * queries) * entries
    return stages / ((tokens + queries) * entries)


@dataclass(frozen=True)
class Seen:
    """What estimates see of a layer.

    Attributes:
        rows: r, directions of the outputs.
        columns: c, of the inputs.
        first: of the fewer of either, how many come first, against every query.
    """

    rows: int
    columns: int
    first: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Seen:
        """Of (r, c) alone, too: all of it came first."""
        rows, columns, *first = numbers
        return cls(rows, columns, *(first or [min(rows, columns)]))

    @property
    def block(self) -> tuple[int, int]:
        """(r, c)."""
        return self.rows, self.columns

    @property
    def before(self) -> int:
        """Entries that come first."""
        return self.first * max(self.rows, self.columns)

    @property
    def after(self) -> int:
        """Those that are looked at where these leave a pair open."""
        return self.rows * self.columns - self.before


def estimates_cost(
    shapes: Sequence[tuple[int, int]], tokens: float, queries: int, seen: Sequence[Seen], refined: float
) -> tuple[float, float]:
    """Multiplications of one sequence's estimates: for every query, and of the rest of the blocks, pair by pair.

    Args:
        shapes: (P, M) of each layer.
        tokens: T.
        queries: Q.
        seen: of each layer.
        refined: share of the pairs that are put against the rest.
    """
    of_each = sum(projecting_cost(shape, tokens, own.block) for shape, own in zip(shapes, seen, strict=True))
    return of_each + queries * sum(own.before for own in seen), refined * queries * sum(own.after for own in seen)


def projecting_cost(shape: tuple[int, int], tokens: float, block: tuple[int, int]) -> float:
    """Multiplications by which the gradient of one sequence is formed in a block (``raylux.influence.leading``).

    Args:
        shape: (P, M).
        tokens: T.
        block: (r, c), rows and columns that are seen.
    """
    (outputs, inputs), (rows, columns) = shape, block
    # A side that is seen whole is not projected.
    along = tokens * inputs * columns if columns < inputs else 0.0
    across = tokens * outputs * rows if rows < outputs else 0.0
    if rows > 2 * columns:
        return along + tokens * outputs * columns + (outputs * rows * columns if rows < outputs else 0.0)
    if columns > 2 * rows:
        return across + tokens * inputs * rows + (inputs * rows * columns if columns < inputs else 0.0)
    return along + across + tokens * rows * columns


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


def assumed_seen(shape: tuple[int, int], gpu: bool) -> Seen:
    """What estimates are taken to see of a layer; on a GPU all of it comes first."""
    rows, columns = min(_BLOCK[0], shape[0]), min(_BLOCK[1], shape[1])
    fewer = min(rows, columns)
    return Seen(rows, columns, fewer if gpu else max(1, round(_FIRST * fewer)))


def _assumed(work: Workload, gpu: bool) -> tuple[float, float]:
    """Multiplications of one sequence's estimates by what is taken for granted, as ``estimates_cost``."""
    shapes = [layer.shape for layer in work.model.tracked]
    seen = [assumed_seen(shape, gpu) for shape in shapes]
    return estimates_cost(shapes, work.tokens, work.queries, seen, _OPENED)


def chosen_share(work: Workload, gpu: bool) -> float | None:
    """Share of the pairs that two stages are taken to score; None: all are scored as ever."""
    if work.best is None:
        return None
    first = pilot(work.candidates, work.best) / work.candidates
    share = first + (1 - first) * min(1.0, _REACHED * work.best / work.candidates)
    shapes, (estimates, refined) = [layer.shape for layer in work.model.tracked], _assumed(work, gpu)
    own = pace(products(work.contraction, gpu))
    cost = relative_cost(shapes, work.tokens, work.queries, share, own, estimates=estimates, refined=refined)
    return share if first and cost < 1 else None


def works(work: Workload, cluster: Cluster, forms: Sequence[Form], meeting: Sequence[Work], share: float) -> list[Work]:
    """What takes the place of products with every query.

    Args:
        work: what is computed.
        cluster: where.
        forms: of each layer's chosen pairs.
        meeting: tokens rotated and gradients formed, of every sequence.
        share: of the pairs, that are chosen.
    """
    device, count, width = cluster.worker, float(work.candidates), dot_width(work, cluster.worker)
    first, refined = (2.0 * count * own for own in _assumed(work, device.gpu))
    formed = reached(share, work.queries)
    low = share * count * sum(form.dots for form in forms if form.name == TOKENS)
    dense = share * count * sum(form.dots for form in forms) - low
    single = alone(work.contraction)
    pairs = device.seconds(_ALONE.gathered * dense, single, width) + device.seconds(low, work.contraction, work.rank)
    return [
        *(Work(one.kind, formed * one.flops, formed * one.bytes, formed * one.seconds) for one in meeting),
        Work(
            "estimates",
            first + refined,
            0.0,
            device.seconds(_ALONE.narrow * first + _ALONE.gathered * refined, single, width),
        ),
        Work("chosen pairs", low + dense, 0.0, pairs),
        _loading(work, cluster, forms, share),
    ]


def unit_of(work: Workload) -> int:
    """Sequences of a score unit."""
    return work.score_unit if work.best is None else unit_size(work.score_unit, work.candidates, work.best)


def dot_width(work: Workload, device: Device) -> float:
    """The smallest dimension of a product of gradients with queries."""
    return max(work.tile, 64) if device.gpu else min(work.tile, work.rows)


def _loading(work: Workload, cluster: Cluster, forms: Sequence[Form], share: float) -> Work:
    """Low-rank queries are read for each sequence that wants them, all for each company of sequences of the pilot.

    On a CPU all are laid out by each worker, and dense ones read for each company of sequences.
    """
    assert work.best is not None
    device = cluster.worker
    low = sum(form.held for form in forms if form.name == TOKENS)
    together, first = min(work.score_unit, company(work, device.gpu, _dense(forms))), pilot(work.candidates, work.best)
    lent = low * (first / together + max(0.0, share * work.candidates - first))
    if device.gpu:
        return Work("queries loaded", 0.0, lent, lent / (device.host_gb_s * 1e9))
    held = sum(form.held for form in forms)
    laid = cluster.workers * held * _LAYING_PASSES
    read = lent + (held - low + _blocks(work)) * work.candidates / together
    return Work("queries loaded", 0.0, laid + read, device.renewing(laid) + device.touching(read))


def company(work: Workload, lent: bool = False, read: float = 0.0) -> float:
    """Sequences that are taken together, as ``captured_together``."""
    shape = work.tokens * work.padding, work.rows, work.operand
    return work.rows * captured_together(work.model.tracked, work.model.groups, *shape, lent, read) / work.padding


def company_bytes(work: Workload, most: float, lent: bool = False, read: float = 0.0) -> float:
    """What a company of sequences captured, of ``most`` at most."""
    widths = sum(captured_width(layer, work.model.groups) for layer in work.model.tracked)
    return min(most, company(work, lent, read)) * work.tokens * work.padding * widths * work.operand


def _dense(forms: Sequence[Form]) -> float:
    """Bytes of the queries that are read for each company of sequences."""
    return sum(form.held for form in forms if form.name != TOKENS)


def held(work: Workload, device: Device, forms: Sequence[Form]) -> float:
    """Bytes of a worker: a layer's queries as they are laid out, and a company; a GPU holds dense ones, and blocks."""
    captured = company_bytes(work, work.score_unit, device.gpu, _dense(forms))
    largest = max(form.held for form in forms)
    if device.gpu:
        return captured + largest + _blocks(work) + _dense(forms)
    return captured + 2 * largest


def _blocks(work: Workload) -> float:
    """Bytes of all queries, cut to the blocks that estimates see; never rounded."""
    return float(
        work.queries
        * max(work.operand, 4)
        * sum(math.prod(assumed_seen(x.shape, True).block) for x in work.model.tracked)
    )


def choice(work: Workload, share: float | None) -> Choice:
    """What the plan says of it."""
    if share is None:
        return Choice("two stages", "all pairs are scored", "too few sequences, or estimates would cost more")
    low, layers = sum(1 for layer in work.model.tracked if work.stored_rank(layer)), len(work.model.tracked)
    how = f"; queries of low rank in {low} of {layers} layers are read where a sequence wants them" if low else ""
    return Choice(
        "two stages",
        f"{share:.2g} of the pairs scored exactly",
        f"assumed, for the {work.best} best of a query and the pilot; estimates are taken to see "
        f"{_BLOCK[0]} rows and {_BLOCK[1]} columns of a layer, the run chooses{how}",
    )
