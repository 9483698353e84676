"""Leave-one-out on logistic regression: what raylux predicts of a point's removal against fitting again without it.

Koh and Liang's first case (2017): multinomial logistic regression on 1,000 digits with a penalty on all weights. The
loss is convex and its Hessian is the Gauss-Newton matrix, so an iterative solve with λ = the penalty is the exact
influence, and what is left is the step of a whole point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import raylux
from jobs.digits.data import CLASSES, Digits
from raylux.evaluate.datamodel import pearson

# Name in the page -> what it changes in a run.
ESTIMATORS = {
    "exact (pcg to 1e-8)": ("curvature.solver=pcg", "curvature.tolerance=1e-8", "curvature.iterations=400"),
    "EK-FAC": (),
    "gradient dot product": ("curvature.kind=identity",),
}
_NEWTON = 1e-11


@dataclass(frozen=True)
class Settings:
    """What is fitted, asked and removed.

    Attributes:
        train: N.
        penalty: λ of (λ/2)‖θ‖², bias and all.
        questions: test points of the largest loss.
        removed: points that are removed for each question, those that are predicted to matter most.
        seeds: splits, from ``first`` on.
    """

    train: int = 1000
    penalty: float = 1e-3
    questions: int = 3
    removed: int = 60
    first: int = 100
    seeds: int = 3


@dataclass(frozen=True)
class Removals:
    """Of one split: predicted and measured change of log p by removing a point, in nats.

    Attributes:
        seed: of the split.
        products: with the Hessian, of the solve that took most.
        predicted: estimator -> [questions, removed].
        measured: [questions, removed].
    """

    seed: int
    products: int
    predicted: dict[str, np.ndarray]
    measured: np.ndarray


def study(settings: Settings, seed: int, folder: Path) -> Removals:
    """Fit, predict, and fit again without each point.

    Args:
        settings: of the study.
        seed: of the split.
        folder: for the runs.
    """
    digits = Digits.split(seed, settings.train)
    weights = newton(digits, torch.zeros(CLASSES, digits.x.shape[1] + 1, dtype=torch.float64), settings.penalty)
    model = nn.Linear(digits.x.shape[1], CLASSES).double()
    with torch.no_grad():
        model.weight.copy_(weights[:, :-1])
        model.bias.copy_(weights[:, -1])
        log_p = model(digits.test_x).log_softmax(1)
    hard = log_p[torch.arange(len(log_p)), digits.test_y].argsort()[: settings.questions]
    scores, products = {}, 0
    for place, (name, overrides) in enumerate(ESTIMATORS.items()):
        run = raylux.attribute(
            model, None, digits.pairs(), digits.questions(hard), folder=folder / str(place),
            overrides=[f"curvature.damping={settings.penalty}", f"fit.sequences={settings.train}", *overrides],
        )  # fmt: skip
        scores[name] = run.scores().to_numpy() * (1 if run.unit == "nats" else 1 / settings.train)
        if len(solves := run.solves()):
            products = int(solves["products"].max())
    exact = next(iter(scores.values()))
    chosen = np.argsort(-np.abs(exact), 1)[:, : settings.removed]
    measured = np.zeros(chosen.shape)
    for row in np.unique(chosen):
        without = newton(digits, weights, settings.penalty, leave=int(row))
        places = np.nonzero(chosen == row)
        features = _with_one(digits.test_x[hard])
        after = (features @ without.T).log_softmax(1)[torch.arange(len(hard)), digits.test_y[hard]]
        before = (features @ weights.T).log_softmax(1)[torch.arange(len(hard)), digits.test_y[hard]]
        measured[places] = (after - before).numpy()[places[0]]
    predicted = {name: -np.take_along_axis(found, chosen, 1) for name, found in scores.items()}
    return Removals(seed, products, predicted, measured)


def newton(digits: Digits, start: Tensor, penalty: float, leave: int | None = None) -> Tensor:
    """Weights [classes, 65] at the minimum of (1/N) Σ loss + (penalty/2)‖θ‖², over all points but ``leave``."""
    x, target = _with_one(digits.x), nn.functional.one_hot(digits.y, CLASSES).double()
    counts = torch.ones(len(x), dtype=torch.float64)
    if leave is not None:
        counts[leave] = 0.0
    counts /= len(x)
    weights = start
    for _ in range(50):
        p = (x @ weights.T).softmax(1)
        gradient = ((p - target) * counts[:, None]).T @ x + penalty * weights
        if float(gradient.norm()) < _NEWTON:
            break
        weights = _step(x, target, p, counts, weights, gradient, penalty)
    return weights


def _step(
    x: Tensor, target: Tensor, p: Tensor, counts: Tensor, weights: Tensor, gradient: Tensor, penalty: float
) -> Tensor:
    """One of Newton's method, halved until the objective falls."""
    size = weights.numel()
    hessian = torch.zeros(CLASSES, x.shape[1], CLASSES, x.shape[1], dtype=x.dtype)
    for j in range(CLASSES):
        for k in range(j + 1):
            curved = counts * (p[:, j] * (float(j == k) - p[:, k]))
            hessian[j, :, k] = hessian[k, :, j] = (x * curved[:, None]).T @ x
    damped = hessian.reshape(size, size) + penalty * torch.eye(size, dtype=x.dtype)
    move = torch.cholesky_solve(gradient.reshape(-1, 1), torch.linalg.cholesky(damped)).view_as(weights)

    def objective(at: Tensor) -> float:
        losses = -(target * (x @ at.T).log_softmax(1)).sum(1)
        return float((counts * losses).sum() + penalty / 2 * at.square().sum())

    before, share = objective(weights), 1.0
    while objective(weights - share * move) > before and share > 1e-6:
        share /= 2
    return weights - share * move


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def correlations(found: Sequence[Removals], name: str) -> np.ndarray:
    """Pearson correlation of an estimator with what was measured, for each question of each split."""
    return np.concatenate([pearson(one.predicted[name].T, one.measured.T) for one in found])


def slopes(found: Sequence[Removals], name: str) -> np.ndarray:
    """Measured by predicted, a line through 0, for each question of each split."""
    return np.array(
        [
            float(predicted @ measured / (predicted @ predicted))
            for one in found
            for predicted, measured in zip(one.predicted[name], one.measured, strict=True)
        ]
    )
