"""docs/results/solvers.md and its figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.plots import pyplot
from jobs.solving.cost import Cost
from jobs.solving.language_model import Found, Setting
from jobs.solving.logistic import Logistic

# The gates that the page is held against.
LEAST_SCORE, LARGEST_CG, LEAST_LISSA = 0.98, 1e-5, 0.99


def page(found: Sequence[Found], regressions: Sequence[Logistic], costs: Sequence[Cost], command: str) -> str:
    """The page as Markdown."""
    setting = Setting()
    model = setting.model
    return f"""# How well the solvers solve

    {command}

One core; everything but the costs in float64.

## A small language model

The character GPT-2 of [proximal-optimum.md](proximal-optimum.md) ({model.layers} layers, width {model.width}, trained
on {model.train} texts of {model.length} characters; {found[0].parameters:,} tracked weights), its factors and G fitted
on {setting.fitted} of them, {setting.queries} queries. x* = (G + λ)⁻¹ ∇f comes from the dense Gauss-Newton matrix over
all tracked layers together, made of Jacobians that share no code with raylux's products; λ of each layer is the run's
own (0.1 × mean Λ). The seed draws texts, queries and initial weights. Scores are those of all {model.train} sequences;
the correlation is Pearson's, within a query.

Whole runs (`curvature.solver`) against the dense solve:

{_runs(found)}

Wanted: pcg's least correlation ≥ {LEAST_SCORE} with at most 30 products: **{_verdict(found)}**.

`slope` is the multiple of the direct solution that is nearest to x* in the norm of G + λ (`Run.solves()`): by so much
EK-FAC overstates there, and one product tells.

![Relative error and score correlation after each product](solvers.png)

{_curves(found)}

The error is ‖x − x*‖/‖x*‖, the mean over queries; the correlation that of the worst query. The products of `astra` are
over {setting.batch} drawn sequences, a quarter of those of the others. With the step of its paper it improves the order
of scores soon, and their size slowly.

## Logistic regression

1,000 handwritten digits, ten classes, 650 weights with a penalty of 1e-3 (which is λ), the five test points of the
largest loss as queries. The Hessian is the Gauss-Newton matrix. raylux tracks layers of language models only so far:
the iterations are raylux's, the products written out in `jobs/solving/logistic.py`. LiSSA draws 64 points a product
and has s = 6 × the largest eigenvalue.

{_regressions(regressions)}

Wanted: CG's error ≤ {LARGEST_CG:g} after 50 products, LiSSA's correlation ≥ {LEAST_LISSA} after 5,000, each for the
worst query: **{_regression_verdict(regressions)}**. LiSSA's last iterate carries the noise of its batches: with 32
points a product and s = 2 × the largest eigenvalue the worst correlation of seed 0 was 0.89, with s = 10 × it 0.98.

## What a product costs

CPU seconds of one core, float32, in forward passes of the model over the same tokens. A batch is made linear once for
all queries of a block; each query adds a pass through that and one backward pass, with the contractions of tracked
layers in both.

{_costs(costs)}
"""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _runs(found: Sequence[Found]) -> str:
    rows = [
        [
            str(one.seed), solver, str(one.products.get(solver, 0)), f"{least:.4f}", f"{mean:.4f}",
            f"{min(one.slopes):.2f}–{max(one.slopes):.2f}" if solver == "pcg" else "",
        ]
        for one in found
        for solver, (least, mean) in one.runs.items()
    ]  # fmt: skip
    return _table(["seed", "solver", "products", "least correlation", "mean", "slope"], rows)


def _verdict(found: Sequence[Found]) -> str:
    least = min(one.runs["pcg"][0] for one in found)
    return f"{least:.4f}, {'met' if least >= LEAST_SCORE else 'missed'}"


def _curves(found: Sequence[Found]) -> str:
    rows = []
    for one in found:
        for curve in one.curves:
            points = list(zip(curve.counts, curve.error, curve.score, strict=True))
            # Those next to some round numbers.
            for wanted in (1, 6, 11, 16, 21, 26, 30, 41, 51, 101, 151, 196):
                count, error, score = min(points, key=lambda point, wanted=wanted: abs(point[0] - wanted))
                row = [str(one.seed), curve.solver, str(count), f"{error:.3f}", f"{score:.4f}"]
                if row not in rows:
                    rows.append(row)
    return _table(["seed", "solver", "products", "relative error", "least correlation"], rows)


def _regressions(regressions: Sequence[Logistic]) -> str:
    rows = []
    for one in regressions:
        rows += [[str(one.seed), "cg", str(count), f"{error:.1e}", ""] for count, error in one.cg.items()]
        rows += [
            [str(one.seed), "lissa", str(count), f"{error:.2f}", f"{score:.4f}"]
            for count, (error, score) in one.lissa.items()
        ]
    return _table(["seed", "solver", "products", "relative error", "score correlation"], rows)


def _regression_verdict(regressions: Sequence[Logistic]) -> str:
    error, score = max(one.cg[50] for one in regressions), min(one.lissa[5000][1] for one in regressions)
    met = error <= LARGEST_CG and score >= LEAST_LISSA
    return f"{error:.1e} and {score:.4f}, {'met' if met else 'missed'}"


def _costs(costs: Sequence[Cost]) -> str:
    rows = [
        [
            one.name, f"{one.tracked:,}", f"{1e3 * one.forward:.2f} ms", f"{one.base / one.forward:.1f} F",
            f"{one.query / one.forward:.1f} F",
        ]
        for one in costs
    ]  # fmt: skip
    header = ["model", "tracked weights", "F: a forward pass", "a batch, whatever the queries", "each query"]
    return _table(header, rows)


def figure(found: Sequence[Found], path: Path) -> None:
    """Relative error and score correlation by products, a line per solver and seed."""
    plt = pyplot()

    plot, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    colours = {curve.solver: f"C{place}" for place, curve in enumerate(found[0].curves)}
    for one in found:
        for curve in one.curves:
            label = curve.solver if one is found[0] else None
            left.plot(curve.counts, curve.error, colours[curve.solver], label=label)
            right.plot(curve.counts, [1 - score for score in curve.score], colours[curve.solver], label=label)
        right.axhline(1 - one.direct[1.0][1], color="grey", linestyle=":")
        left.axhline(one.direct[1.0][0], color="grey", linestyle=":")
    left.set_ylabel("‖x − x*‖ / ‖x*‖, mean over queries")
    right.set_ylabel("1 − score correlation, worst query")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xscale("log")
        axes.set_xlabel("products with G (dotted: the direct solve)")
        axes.legend()
    plot.tight_layout()
    plot.savefig(path, dpi=110)
    plt.close(plot)
