"""The study's plot: the dose curves of each way to measure, and predicted against measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jobs.dose.choose import BM25, DOT, EKFAC, PCG, PEER, RANDOM
from jobs.dose.judge import Outcome, in_nats
from jobs.dose.page import NAMES, WAYS
from jobs.dose.study import DOSES
from jobs.plots import pyplot

_COLOURS = {
    EKFAC: "#c44e52", "averaged": "#dd8452", PCG: "#937860", PEER: "#4c72b0", BM25: "#55a868", DOT: "#8172b3",
    RANDOM: "#888888",
}  # fmt: skip


def plot(found: Outcome, path: Path) -> None:
    """Draw it.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    panels = len(found.retrained) + 1
    figure, axes = plt.subplots(1, panels, figsize=(4.7 * panels, 4.6), layout="constrained", squeeze=False)
    axes = axes[0]
    for one, way in zip(axes, found.retrained, strict=False):
        _curves(one, found, way)
    axes[0].legend(fontsize=7, frameon=False)
    _predictions(axes[-1], found)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.axhline(0, color="#333333", linewidth=0.8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curves(axes: Any, found: Outcome, way: str) -> None:
    """A line per method; the methods stand beside each other, so that their intervals can be told apart."""
    for place, name in enumerate(found.rows):
        means = [found.mean(name, way, dose) for dose in DOSES[way]]
        shift = (place - len(found.rows) / 2) * 0.05
        x = [dose + shift for dose in DOSES[way]]
        y = [one.value for one in means]
        sides = [[one.value - one.low for one in means], [one.high - one.value for one in means]]
        axes.errorbar(x, y, yerr=sides, fmt="o", color=_COLOURS[name], markersize=3, elinewidth=1, capsize=2)
        line = sorted([*zip(x, y, strict=True), (shift, 0.0)])
        axes.plot(*zip(*line, strict=True), color=_COLOURS[name], linewidth=1, label=NAMES[name])
    axes.set_title(WAYS[way], fontsize=10)
    axes.set_xlabel("copies added")
    axes.set_ylabel("change of log p of a query by its own set, nats; 90 %")
    axes.set_xticks([0, *DOSES[way]])


def _predictions(axes: Any, found: Outcome) -> None:
    """Each query's own set, by the first method that predicts a size, in nats per copy; dashed: as predicted."""
    sized = in_nats(found.methods)
    if not sized:
        axes.set_axis_off()
        return
    name = sized[0]
    predicted = found.predicted_own(name, 1.0)
    for way, mark in zip(found.ways, "osD", strict=False):
        dose = 1.0 if 1.0 in DOSES[way] else max(DOSES[way])
        measured = found.moved(name, way, dose) / dose
        axes.plot(predicted, measured, mark, markersize=4, alpha=0.7, label=f"{WAYS[way]}, {dose:+g} copies")
    # The line of predictions that come true may be far above the points, and is then not to flatten them.
    low, high = axes.get_ylim()
    ends = np.array([0.0, predicted.max()])
    axes.plot(ends, ends, color="#333333", linewidth=0.8, linestyle="--")
    axes.set_ylim(min(low, 0), max(high, 0))
    axes.set_title(f"predicted by {NAMES[name]}", fontsize=10)
    axes.set_xlabel("predicted, nats per copy")
    axes.set_ylabel("measured, nats per copy")
    axes.legend(fontsize=7, frameon=False)
