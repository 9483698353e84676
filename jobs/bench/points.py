"""The points that the benchmark is held against: floor, aim, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jobs.bench.figures import ASKED, CPU, FIT, WALL, Spread, cost, job, peak, stage
from jobs.bench.found import Found
from jobs.bench.records import KRONFLUENCE, RAYLUX, Measured
from jobs.bench.rounds import FLOAT32

GB = 1e9


@dataclass(frozen=True)
class Row:
    """One point.

    Attributes:
        title: what is measured.
        floor: with bf16 products; ``floor32``: in float32.
        aim: beyond the floor.
        values: variant -> measured.
        least: the floor is the least that will do, not the most.
        digits: after the decimal point.
    """

    title: str
    floor: float
    floor32: float | None
    aim: float | None
    values: dict[str, Spread]
    least: bool = False
    digits: int = 2

    def verdict(self, variant: str) -> str:
        """``met``, ``aim met``, or by how much the floor is missed; empty where nothing was measured."""
        if variant not in self.values:
            return ""
        floor = self.floor if variant == RAYLUX or self.floor32 is None else self.floor32
        value, sign = self.values[variant].median, -1 if self.least else 1
        if sign * value <= sign * floor:
            return "aim met" if self.aim is not None and sign * value <= sign * self.aim else "met"
        if self.least:
            return f"missed, by {floor - value:.{max(self.digits, 2)}g}"
        return f"missed, {value / floor:.2f} times the floor"


Figure = Callable[[Measured], float]


def _measured(found: Found, workload: str, figure: Figure, purpose: str = "speed", needs: int = 0) -> dict[str, Spread]:
    """Variant -> the figure over the rounds, where the workload was measured with ``needs`` queries."""
    values = {}
    for variant in found.variants(purpose, workload):
        runs = [run for run in found.of(purpose, workload, variant) if not needs or needs in run.spec.sizes]
        spread = Spread.of(figure(run) for run in runs)
        if spread is not None:
            values[variant] = spread
    return values


def rows(found: Found) -> list[Row]:
    """Every point that the benchmark can measure; those of what it did not measure have no values."""

    def whole(workload: str, queries: int, clock: str) -> dict[str, Spread]:
        return _measured(found, workload, lambda run: job(run, queries, clock), needs=queries)

    def one_more(run: Measured) -> float:
        fitted = cost(run, WALL)
        return float("nan") if fitted is None else fitted[1]

    def alone(run: Measured) -> float:
        return stage(run, "score", 128, CPU)

    several = {
        name: spread
        for name, spread in _measured(found, "B", one_more, needs=32).items()
        if spread.median == spread.median
    }
    uss = _measured(found, "B", lambda run: peak(run, 32, "uss") / GB, needs=32)
    return [
        Row("whole job A, Q = 8, CPU in F", 2.5, 3.0, 2.2, whole("A", 8, CPU)),
        Row("whole job B, Q = 32, wall in F", 5.0, 6.0, 4.2, whole("B", 32, WALL)),
        Row("whole job A, Q = 256, CPU in F", 6.0, None, 4.5, whole("A", 256, CPU)),
        Row("one more query on B, wall in F", 0.06, 0.09, 0.045, several, digits=3),
        Row(
            "scoring pass alone, Q = 128, 256 tokens (S), CPU in F",
            1.1,
            None,
            0.9,
            _measured(found, "S", alone, needs=128),
        ),
        *_agreement(found),
        Row("private memory (USS) on B, Q = 32, GB", 1.5, None, None, {k: x for k, x in uss.items() if x.median}),
        *ray_rows(found),
    ]


def _agreement(found: Found) -> list[Row]:
    """Scores in bf16 against those in float32; those in float32 against the peer's, which has float64 eigenbases."""
    pearson: dict[str, Spread] = {}
    top: dict[str, Spread] = {}
    for variant, exact, labels in ((RAYLUX, FLOAT32, "sampled"), (FLOAT32, KRONFLUENCE, "data set")):
        pairs = [x.agreement for x in found.compared if (x.found, x.exact, x.labels) == (variant, exact, labels)]
        for held, values in ((pearson, [x.pearson for x in pairs]), (top, [x.top for x in pairs])):
            spread = Spread.of(values)
            if spread is not None:
                held[variant] = spread
    return [
        Row("scores against exact float32, Pearson", 0.9999, None, None, pearson, least=True, digits=6),
        Row("scores against exact float32, top-10 overlap", 0.99, None, None, top, least=True, digits=3),
    ]


def ray_seconds(run: Measured) -> float:
    """Wall seconds of the stages."""
    (size,) = run.spec.sizes
    return sum(x.wall for x in run.stages if x.name in FIT + ASKED and x.queries in (None, size))


def ray_rows(found: Found) -> list[Row]:
    """Ray against in process, and two workers against one, by precision; ratios within a round."""
    overhead: dict[str, Spread] = {}
    speedup: dict[str, Spread] = {}
    for workload in found.workloads("ray"):
        for precision in (RAYLUX, FLOAT32):
            local, one, two = (
                [ray_seconds(run) for run in found.of("ray", workload, f"{precision}, {place}")]
                for place in ("local 1", "ray 1", "ray 2")
            )
            for held, values in (
                (overhead, [100 * (b / a - 1) for a, b in zip(local, one, strict=False)]),
                (speedup, [a / b for a, b in zip(one, two, strict=False)]),
            ):
                spread = Spread.of(values)
                if spread is not None:
                    held[precision] = spread
    return [
        Row("Ray against in process, stage times, % more", 5.0, None, None, overhead, digits=1),
        Row("2 workers × 1 thread, times as fast as 1", 1.7, None, 1.85, speedup, least=True),
    ]


def judged(point: Row) -> Sequence[str]:
    """The variants of raylux that a point has values of."""
    return [name for name in (RAYLUX, FLOAT32) if name in point.values]


__all__ = ["GB", "KRONFLUENCE", "Row", "judged", "ray_rows", "ray_seconds", "rows"]
