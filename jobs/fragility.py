"""Is influence fragile in deep networks? Predicted removals against retrained ones, by depth and weight decay.

Basu et al. 2021 found influence erroneous in deeper networks and better with weight decay; Bae et al. 2022 found no
strong trend with depth. Here tanh MLPs on scikit-learn's digits, exact damped Gauss-Newton influence by raylux's
iterative solver, the points that it names removed one at a time, warm and cold. A report, without a gate.

    python jobs/fragility.py --write
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from jobs import pages
from jobs.digits.depths import COLD, WARM, Cell, Settings, cell

NAME = "fragility"

DEPTHS = (1, 2, 4, 8)
DECAYS = (0.0, 1e-3, 1e-2)


def page(settings: Settings, cells: Sequence[Cell], command: str) -> str:
    """docs/results/fragility.md."""
    grid = list(dict.fromkeys((one.depth, one.decay) for one in cells))
    rows = []
    for depth, decay in grid:
        own = [one for one in cells if (one.depth, one.decay) == (depth, decay)]
        loss, accuracy = (float(np.mean([getattr(one, what) for one in own])) for what in ("loss", "accuracy"))
        rows.append(f"| {depth} | {decay:g} | {loss:.4f} | {accuracy:.3f} | {_cell(own, WARM)} | {_cell(own, COLD)} |")
    sides = [
        f"| {what} {value:g} | {_mean(own, WARM)} | {_mean(own, COLD)} |"
        for what, name in (("depth", "depth"), ("weight decay", "decay"))
        for value in dict.fromkeys(getattr(one, name) for one in cells)
        if (own := [one for one in cells if getattr(one, name) == value])
    ]
    newline = "\n"
    return f"""# Depth, weight decay, and what influence predicts

    {command}

scikit-learn's digits, {settings.train} for training. Tanh MLPs of width {settings.hidden} in float64, trained for
{settings.epochs} epochs of SGD (rate {settings.rate:g}, momentum 0.9, batches of 32). f is log p of the class of each
of the {settings.questions} test points of the largest loss; the {settings.removed} training points of the largest mean
influence on them, whatever its sign, are removed one at a time. Predicted: minus the influence, from `raylux.attribute`
with `curvature.solver=pcg` to a residual of 1e-4, λ = {settings.damping:g} + the weight decay, per example. *Warm*:
{settings.epochs // 2} epochs more without the point, against as many with it, on the same batches. *Cold*: trained anew
from the same start on the same batches, for as long. {settings.seeds} repetition(s), each with its own split, start and
batches.

Spearman's ρ over the removals, mean over questions and repetitions; in brackets the least and the greatest question.

| hidden layers | weight decay | training loss | test accuracy | warm | cold, same seed |
| --: | --: | --: | --: | --- | --- |
{newline.join(rows)}

Means over the rest of the grid:

| | warm | cold, same seed |
| --- | --: | --: |
{newline.join(sides)}
"""


def _mean(cells: Sequence[Cell], truth: str) -> str:
    return f"{np.mean([one.correlation[truth] for one in cells]):.3f}"


def _cell(cells: Sequence[Cell], truth: str) -> str:
    found = np.array([one.correlation[truth] for one in cells])
    return f"{found.mean():.3f} ({found.min():.2f} to {found.max():.2f})"


def measured(options: dict[str, Any], command: str) -> pages.Page:
    """Train, predict, remove, for every network of the grid."""
    settings = Settings(**options)
    pages.require(
        min(settings.seeds, settings.questions, settings.epochs) >= 1 and 3 <= settings.removed <= settings.train,
        "--seeds, --questions and --epochs are at least 1, --removed 3 to --train",
    )
    torch.set_num_threads(1)
    seeds = range(settings.first, settings.first + settings.seeds)
    with tempfile.TemporaryDirectory() as folder:
        cells = [
            cell(settings, depth, decay, seed, Path(folder) / str(place))
            for place, (depth, decay, seed) in enumerate(product(DEPTHS, DECAYS, seeds))
        ]
    return pages.Page(page(settings, cells, command))


def main(arguments: Sequence[str] | None = None) -> int:
    """The study as a program."""
    return pages.run(pages.parser(__doc__, NAME, fields(Settings)), arguments, NAME, measured)


if __name__ == "__main__":
    sys.exit(main())
