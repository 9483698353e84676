"""Leave-one-out on logistic regression: predicted change of log p against fitting again without a point.

Koh and Liang 2017 on scikit-learn's digits, through ``raylux.attribute``.

    python jobs/leave_one_out.py --write
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))


from jobs import pages
from jobs.digits.removals import ESTIMATORS, Removals, Settings, correlations, slopes, study

NAME = "leave-one-out"

# Pearson correlation of the exact influence with what was measured, at least.
WANTED = 0.99


def page(settings: Settings, found: Sequence[Removals], command: str) -> str:
    """docs/results/leave-one-out.md."""
    rows = []
    for name in ESTIMATORS:
        pearson, slope = correlations(found, name), slopes(found, name)
        rows.append(
            f"| {name} | {pearson.mean():.4f} | {pearson.min():.4f} | {slope.mean():.3f} | {slope.min():.3f} to "
            f"{slope.max():.3f} |"
        )
    exact = correlations(found, next(iter(ESTIMATORS)))
    met = "met" if exact.min() >= WANTED else "met on average" if exact.mean() >= WANTED else "missed"
    removed = sum(one.measured.size for one in found)
    seeds = ", ".join(str(one.seed) for one in found)
    products, newline = max(one.products for one in found), "\n"
    return f"""# Leave-one-out: logistic regression

    {command}

scikit-learn's digits, {settings.train} for training, ten classes, a penalty of {settings.penalty:g}/2 ‖θ‖² on all 650
weights, fitted to a gradient of 1e-11. f is log p of the class of each of {settings.questions} test points, those of
largest loss of a split, {len(found)} splits (seeds {seeds}). For each, {settings.removed} training points,
those with the largest predicted influence, are removed one at a time and the model is fitted again: {removed} pairs.
Predicted: minus the influence, from `raylux.attribute(nn.Linear(64, 10), None, …)` with
`curvature.damping={settings.penalty:g}` and the curvature of all training points.

| estimator | Pearson, mean | least | measured / predicted | from, to |
| --- | --: | --: | --: | --- |
{newline.join(rows)}

Wanted: Pearson ≥ {WANTED} of the exact influence on each test point: **{met}**, least {exact.min():.4f}. Its solve took
up to {products} products with the Hessian. What is left of the slope is second order: a removal is a whole step.
"""


def measured(options: dict[str, Any], command: str) -> pages.Page:
    """Fit, predict, remove."""
    settings = Settings(**options)
    pages.require(
        min(settings.seeds, settings.questions) >= 1 and 2 <= settings.removed < settings.train,
        "--seeds and --questions are at least 1, --removed 2 to less than --train",
    )
    with tempfile.TemporaryDirectory() as folder:
        found = [
            study(settings, seed, Path(folder) / str(seed))
            for seed in range(settings.first, settings.first + settings.seeds)
        ]
    return pages.Page(page(settings, found, command))


def main(arguments: Sequence[str] | None = None) -> int:
    """The study as a program."""
    return pages.run(pages.parser(__doc__, NAME, fields(Settings)), arguments, NAME, measured)


if __name__ == "__main__":
    sys.exit(main())
