"""What does influence predict? A point's removal measured at the proximal optimum, warm, cold, and from other starts.

Bae et al. 2022 on scikit-learn's digits: a tanh MLP that was not trained to the end, exact damped Gauss-Newton
influence by raylux's iterative solver, and networks that were trained without each of some points.

    python jobs/pbrf.py --write
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from jobs import pages
from jobs.digits.gaps import GAPS, TRUTHS, Gaps, Settings, study

NAME = "pbrf"

# Spearman at the proximal optimum at least, and with another seed at most, for the claim to have reproduced.
FOLLOWS, FORGETS = 0.95, 0.2
# The last two gaps, as a share of the first three, at most.
SMALL = 0.2


def repetition(settings: Settings, seed: int) -> Gaps:
    """One of them, on one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return study(settings, seed, Path(folder))


def verdicts(found: Sequence[Gaps]) -> list[str]:
    """What was wanted, and whether it was met."""
    spearman = {truth: float(np.mean([one.correlation(truth)[1] for one in found])) for truth in TRUTHS}
    order = [spearman[truth] for truth in TRUTHS[:4]]
    last, first = shares(found)
    wanted = [
        (f"Spearman at the proximal optimum ≥ {FOLLOWS}", spearman[TRUTHS[0]], spearman[TRUTHS[0]] >= FOLLOWS),
        (f"Spearman, cold with another seed ≤ {FORGETS}", spearman[TRUTHS[3]], spearman[TRUTHS[3]] <= FORGETS),
        (
            "the order proximal optimum > warm > cold with the same seed > cold with another",
            float(np.min(-np.diff(order))), bool((np.diff(order) < 0).all()),
        ),
        (f"gaps 4 and 5 < {SMALL} of gaps 1 to 3", last / first, last < SMALL * first),
    ]  # fmt: skip
    return [f"| {what} | {value:.3f} | {'met' if met else '**missed**'} |" for what, value, met in wanted]


def shares(found: Sequence[Gaps]) -> tuple[float, float]:
    """The last two gaps together, and the first three."""
    means = [float(np.mean([one.distances[gap] for one in found])) for gap in GAPS]
    return sum(means[3:]), sum(means[:3])


def page(settings: Settings, found: Sequence[Gaps], command: str) -> str:
    """docs/results/pbrf.md."""
    rows = []
    for truth in TRUTHS:
        own, pooled = (np.array([getattr(one, how)(truth) for one in found]) for how in ("correlation", "pooled"))
        each = ", ".join(f"{value:.3f}" for value in own[:, 1])
        rows.append(
            f"| {truth} | {own[:, 1].mean():.3f} | {each} | {own[:, 0].mean():.3f} | {pooled[:, 1].mean():.3f} | "
            f"{pooled[:, 0].mean():.3f} |"
        )
    gaps = [
        f"| {number} | {gap} | {np.mean([one.distances[gap] for one in found]):.4g} |"
        for number, gap in enumerate(GAPS, 1)
    ]
    states = "; ".join(f"seed {one.seed}: loss {one.loss:.4f}, test accuracy {one.accuracy:.3f}" for one in found)
    left, newline = max(one.optima for one in found), "\n"
    return f"""# What influence predicts: the proximal optimum, and not retraining

    {command}

scikit-learn's digits, {settings.train} for training. A tanh MLP 64-{settings.hidden}-{settings.hidden}-10 in float64 is
trained for {settings.epochs} epochs of SGD (rate {settings.rate:g}, momentum 0.9, batches of 32), not to the end
({states}).
{settings.removed} training points, drawn at random, are removed one at a time; f is log p of the class of each of
{settings.questions} test points, drawn at random. Predicted: minus the influence, from `raylux.attribute` with
`curvature.solver=pcg` to a residual of 1e-6 and λ = {settings.damping:g} per example. {len(found)} repetition(s), each
with its own split, start, batches and draws.

| measured | Spearman | by seed | Pearson | pooled Spearman | pooled Pearson |
| --- | --: | --- | --: | --: | --: |
{newline.join(rows)}

The first columns are means over the test points of correlations over the removals; pooled ones are over all pairs.

| wanted | value | |
| --- | --: | --- |
{newline.join(verdicts(found))}

- *Proximal optimum*: argmin of the mean KL divergence to the network's own predictions, plus λ/2 ‖θ − θ_s‖², less the
  point's loss over N; by L-BFGS (the largest gradient at the end of a search was {left:.1e} of that at its start).
- *Warm*: {settings.epochs // 2} epochs more without the point, against as many with it, on the same batches.
- *Cold, same seed*: trained anew without it from the same start on the same batches, for as long; against the same
  with it.
- *Cold, another seed*: the same from one other start on other batches, against its own network with all points.
- *Cold, seeds of their own*: each removal from a start of its own, against the one with all points from the first
  start: what a single retraining tells.

## Where the difference comes from

Mean distance of logits over the training set, from each network to the next, over the removals:

| gap | from one to the next | distance |
| --: | --- | --: |
{newline.join(gaps)}

Proximity: as warm, with λ/2 ‖θ − θ_s‖² in the loss. Linearisation: θ_s − (G + λ)⁻¹ ∇log p / N, exact; truncated: 20
products of conjugate gradients; these two for {settings.linearised} of the removals.
"""


def measured(options: dict[str, Any], command: str) -> pages.Page:
    """Train, predict, remove."""
    processes = max(1, options.pop("processes"))
    settings = Settings(**options)
    pages.require(
        min(settings.seeds, settings.questions, settings.epochs) >= 1 and 3 <= settings.removed <= settings.train,
        "--seeds, --questions and --epochs are at least 1, --removed 3 to --train",
    )
    seeds = range(settings.first, settings.first + settings.seeds)
    if processes == 1:
        found = [repetition(settings, seed) for seed in seeds]
    else:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(partial(repetition, settings), seeds))
    return pages.Page(page(settings, found, command))


def main(arguments: Sequence[str] | None = None) -> int:
    """The study as a program."""
    parser = pages.parser(__doc__, NAME, fields(Settings))
    parser.add_argument("--processes", type=int, default=1, help="repetitions at a time; changes no number")
    return pages.run(parser, arguments, NAME, measured)


if __name__ == "__main__":
    sys.exit(main())
