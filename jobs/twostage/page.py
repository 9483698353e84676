"""docs/results/two-stage.md and its plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.plots import pyplot
from jobs.twostage.cases import CASES
from jobs.twostage.measured import WANTED
from raylux.cost.two_stage import pace

Figures = Mapping[str, dict[str, Any]]
_FLOOR = 0.15


def text(figures: Figures, command: str) -> str:
    """The page."""
    sections = "\n".join(_section(name, case) for name, case in figures.items())
    usual, halved = pace("float32"), pace("bfloat16")
    return f"""# Two-stage scoring: the best of each query at a part of the cost

    {command}

With `score.best=K` a run estimates every pair of a query and a sequence, and scores those exactly that may be among the
K best of their query ([scores](../scores.md#two-stages)). Here both ways were run by the same engine on the same
factors and queries: recall is the share of the pairs that are truly among their query's best that have their score.

{_points(figures)}
![Recall against cost](two-stage.png)

*Multiplications*: of the contraction Σ (T + Q)·P·M of all pairs, forward and backward passes and the query stage apart;
in two stages tokens are projected and put against all queries in the first part of a block of each layer, what that
leaves open against the rest of it, gradients with a chosen pair are formed, and put against the chosen queries. *By
time*: a pair by itself at {usual.gathered:g} pairs of a matrix product and an estimate's multiplications at
{usual.narrow:g} ({halved.gathered:g} and {halved.narrow:g} where matrix products are in bf16, which neither knows), by
which a run decides whether two stages pay. *CPU*: measured, of the same stages, laying out queries among it. The curve
is that of the estimates by the whole block, of the pairs that the run's first part had left open; the run itself has a
pilot beside, whose pairs are all scored, and what its thresholds leave for safety.
{sections}"""


def _points(figures: Figures) -> str:
    lines = [
        "| case | wanted | recall of the run | as it told | pairs scored | CPU of the contraction, of all pairs' | "
        "multiplications of the run (≤ 15 %, recall ≥ 0.99) | of the curve at recall 0.99 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, case in figures.items():
        point = _least(case)
        cost = "not reached" if point is None else f"{point['cost']:.1%}"
        told = "–" if case["promised"] is None else f"{case['promised']:.3f}"
        own = "–" if case["plain"] else f"{case['cost']:.1%}{_verdict(case)}"
        seconds = case["seconds"]
        share = seconds["two"]["contraction"] / seconds["every"]["contraction"]
        lines.append(
            f"| {name} | the best {case['best']} of {case['sequences']:,}, {case['queries']:,} queries | "
            f"{case['recall']:.4f} | {told} | {case['share']:.1%} | {share:.0%} | {own} | "
            f"{cost}{'' if point is None else _verdict(point)} |"
        )
    return "\n".join(lines) + "\n"


def _verdict(found: Mapping[str, Any]) -> str:
    """Of a run, or of a point of the curve."""
    return ": met" if found["recall"] >= WANTED and found["cost"] <= _FLOOR else ": missed"


def _least(case: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first point of the curve with the recall that is wanted."""
    return next((point for point in case["curve"] if point["recall"] >= WANTED), None)


def _section(name: str, case: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"| {x['margin']:.2f} | {x['recall']:.4f} | "
        + " | ".join(f"{x[key]:.1%}" for key in ("share", "formed", "cost", "time"))
        + " |"
        for x in case["curve"]
    )
    kinds = sorted({kind for own in case["seconds"].values() for kind, x in own.items() if x >= 1})
    spent = "\n".join(
        f"| {way} | " + " | ".join(f"{case['seconds'][key].get(kind, 0):.0f}" for kind in kinds) + " |"
        for way, key in (("all pairs", "every"), ("two stages", "two"))
    )
    gave_up = " The run itself gave two stages up after its pilot, and scored all pairs." if case["plain"] else ""
    return f"""
## {CASES[name.partition(":")[0]]}

{case["sequences"]:,} candidates of {case["tokens"]:.0f} tokens, {case["queries"]:,} queries; {case["layers"]} layers
with {case["entries"]:,} entries; curvature of {case["fitted"]:,} sequences. Least recall of a query
{case["least"]:.2f}; scores of the pairs scored differ from those of the other run by {case["off"]:.1e} of their RMS
at most.{gave_up}

Estimates see {_seen(case)} of its layers (rows × columns, of the fewer in brackets how many come first): these left
{case["opened"]:.1%} of the pairs open.

| standard errors | recall | pairs | gradients | multiplications | by time |
| --- | --- | --- | --- | --- | --- |
{rows}

Seconds of CPU, one thread:

| | {" | ".join(kinds)} |
| --- {"| --- " * len(kinds)}|
{spent}
"""


def _seen(case: Mapping[str, Any]) -> str:
    """Blocks of all layers."""
    return ", ".join(f"{rows} × {columns} ({first})" for rows, columns, first in case["seen"].values())


def plot(figures: Figures, path: Path) -> None:
    """Recall against multiplications."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, case in figures.items():
        costs = [100 * point["cost"] for point in case["curve"]]
        axis.plot(costs, [point["recall"] for point in case["curve"]], "o-", label=name)
    axis.axhline(WANTED, color="black", linewidth=0.8, linestyle="--")
    axis.axvline(100 * _FLOOR, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="multiplications, % of all pairs' contraction", ylabel="recall of each query's best")
    axis.set_xlim(left=0)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
