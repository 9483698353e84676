"""CG and LiSSA on logistic regression, where the Hessian is the Gauss-Newton matrix and its inverse is at hand.

Koh and Liang's own first case (2017): 1,000 handwritten digits, ten classes, a penalty of 1e-3 on all weights. The
solvers are raylux's; the products are written out here, as raylux tracks layers of language models only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from raylux.curvature import Spectral
from raylux.curvature.solvers import SOLVERS, Rule, solve_here

PENALTY = 1e-3


@dataclass(frozen=True)
class Logistic:
    """What was found.

    Attributes:
        seed: of the split and of LiSSA's draws.
        largest: eigenvalue of H + λ; ``scale`` is LiSSA's s.
        cg: products -> relative error of CG, the largest over queries.
        lissa: products -> (relative error, score correlation), the worst over queries.
    """

    seed: int
    parameters: int
    largest: float
    scale: float
    cg: dict[int, float]
    lissa: dict[int, tuple[float, float]]


class _Digits:
    """A fitted model: x [n, 65] with a one, probabilities p [n, 10], gradients of training and test points."""

    def __init__(self, seed: int, train: int = 1000, queries: int = 5) -> None:
        data, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(data))
        x = torch.as_tensor(np.hstack([data / 16.0, np.ones((len(data), 1))])[order])
        y = torch.nn.functional.one_hot(torch.as_tensor(labels[order]).long(), 10).double()
        self.x, target = x[:train], y[:train]
        weights = torch.zeros(10, 65, dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS([weights], max_iter=2000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            value = -(target * (self.x @ weights.T).log_softmax(-1)).sum(1).mean()
            value = value + PENALTY / 2 * weights.square().sum()
            value.backward()
            return value

        search.step(loss)
        w = weights.detach()
        self.p = (self.x @ w.T).softmax(-1)
        self.train = torch.einsum("nk,nd->nkd", self.p - target, self.x)
        p_test = (x[train:] @ w.T).softmax(-1)
        # The test points of the largest loss: those that are asked about.
        hard = (-(y[train:] * p_test.log()).sum(1)).argsort(descending=True)[:queries]
        self.queries = torch.einsum("nk,nd->nkd", p_test[hard] - y[train:][hard], x[train:][hard])

    def product(self, v: Tensor, rows: Tensor) -> Tensor:
        """(1/n) Σ (diag p − p pᵀ) V x xᵀ."""
        x, p = self.x[rows], self.p[rows]
        change = x @ v.T
        curved = p * change - p * (p * change).sum(1, keepdim=True)
        return curved.T @ x / len(rows)

    def dense(self) -> Tensor:
        """The Hessian of the mean loss [650, 650], without the penalty."""
        h = torch.diag_embed(self.p) - torch.einsum("nj,nk->njk", self.p, self.p)
        return torch.einsum("njk,na,nb->jakb", h, self.x, self.x).reshape(650, 650) / len(self.x)


def study(
    seed: int = 0,
    cg: Sequence[int] = (10, 20, 50),
    lissa: Sequence[int] = (1000, 5000),
    factor: float = 6.0,
    batch: int = 64,
    queries: int = 5,
) -> Logistic:
    """Fit, invert, and follow both solvers from their own starts.

    Args:
        seed: of the split into training and test points, and of LiSSA's batches.
        cg: numbers of products after which CG is looked at.
        lissa: the same of LiSSA.
        factor: s of LiSSA, as a multiple of the largest eigenvalue of H + λ.
        batch: points that LiSSA draws for a product.
        queries: test points of the largest loss that are asked about.
    """
    digits = _Digits(seed, queries=queries)
    damped = digits.dense() + PENALTY * torch.eye(650, dtype=torch.float64)
    asked = digits.queries.flatten(1)
    exact = torch.linalg.solve(damped, asked.T).T
    wanted = exact @ digits.train.flatten(1).T
    largest = float(torch.linalg.eigvalsh(damped)[-1])
    scale = factor * largest
    everyone = torch.arange(len(digits.x))

    def follow(name: str, at: Sequence[int]) -> dict[int, tuple[float, float]]:
        solver, found = SOLVERS[name], {}

        def products(iteration: int, vectors: Sequence[dict[str, Tensor]]) -> list[Mapping[str, Tensor]]:
            draw = np.random.default_rng([seed, iteration])
            rows = everyone if solver.krylov else torch.as_tensor(draw.choice(len(everyone), batch, replace=False))
            return [{"head": digits.product(vector["head"], rows)} for vector in vectors]

        def watch(count: int, solutions: list[dict[str, Tensor]]) -> None:
            if count in at:
                x = torch.stack([one["head"].flatten() for one in solutions])
                scores = x @ digits.train.flatten(1).T
                error = float(((x - exact).norm(dim=1) / exact.norm(dim=1)).max())
                found[count] = error, min(float(np.corrcoef(a, b)[0, 1]) for a, b in zip(scores, wanted, strict=True))

        gradients = [{"head": query} for query in digits.queries]
        rule = Rule(solver, max(at), 0.0, 1.0 / scale)
        solve_here(products, gradients, {"head": Spectral()}, {"head": PENALTY}, rule, watch)
        return found

    conjugate = {count: error for count, (error, _) in follow("cg", cg).items()}
    return Logistic(seed, 650, largest, scale, conjugate, follow("lissa", lissa))
