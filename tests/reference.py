"""Brute force to hold raylux against: one sequence at a time, weight gradients by autograd, dense matrices.

Nothing here uses raylux. A tracked layer is named by its module path; its parameters are a matrix [P, M]
(outputs, inputs, the bias as last column), and vec() of a matrix goes row by row, so that
vec(Q_S X Q_Aᵀ) = (Q_S ⊗ Q_A) vec(X).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import block_diag
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One sequence: tokens and labels, -100 where no loss is taken; the label at position 0 never counts.

    For a classifier it is the class of the sequence, and the only label.
    """

    tokens: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True)
class Question:
    """A measurement f = Σ weight · log p(labelled tokens)."""

    parts: tuple[tuple[float, Example], ...]


def loss(model: nn.Module, example: Example) -> Tensor:
    """−Σ log p(label) of one sequence, unpadded."""
    logits = model(input_ids=torch.tensor(np.asarray(example.tokens, np.int64))[None]).logits[0]
    total = logits.new_zeros(())
    if logits.dim() == 1:
        return torch.logsumexp(logits, 0) - logits[int(example.labels[0])]
    for position, label in enumerate(example.labels):
        if position and label != IGNORED:
            row = logits[position - 1]
            total = total + torch.logsumexp(row, 0) - row[int(label)]
    return total


def gradients(model: nn.Module, layers: Sequence[str], example: Example) -> dict[str, np.ndarray]:
    """Layer -> gradient of the summed loss with respect to its weight and bias, [P, M]."""
    modules = [model.get_submodule(name) for name in layers]
    parameters: list[Any] = [p for module in modules for p in (module.weight, module.bias) if p is not None]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        found = iter(torch.autograd.grad(loss(model, example), parameters, allow_unused=True))
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    result = {}
    for name, module in zip(layers, modules, strict=True):
        weight = _or_zero(next(found), module.weight)
        weight = weight.T if isinstance(module, Conv1D) else weight
        columns = [weight] if module.bias is None else [weight, _or_zero(next(found), module.bias)[:, None]]
        result[name] = torch.cat(columns, 1).numpy()
    return result


def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """An expert that no token of the sequence went to has no part in its loss."""
    return torch.zeros_like(parameter) if gradient is None else gradient


def token_pairs(model: nn.Module, layers: Sequence[str], example: Example) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Layer -> its inputs a [T, M] (with the 1 of a bias) and the loss's gradients at its outputs g [T, P]."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # A copy that requires a gradient: the layer's own output need not be part of a graph.
            output = output.clone() if output.requires_grad else output.detach().requires_grad_(True)
            calls[name].append((inputs[0].detach(), output))
            return output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        value = loss(model, example)
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for name in layers:
        module = model.get_submodule(name)
        biased = module.bias is not None
        if not calls[name]:
            outputs, inputs = module.weight.shape
            result[name] = np.zeros((0, inputs + biased)), np.zeros((0, outputs))
            continue
        grads = torch.autograd.grad(value, [output for _, output in calls[name]], retain_graph=True)
        a = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in calls[name]]).numpy()
        a = np.hstack([a, np.ones((len(a), 1))]) if biased else a
        result[name] = a, torch.cat([g.reshape(-1, g.shape[-1]) for g in grads]).numpy()
    return result


@dataclass(frozen=True)
class Dense:
    """The curvature of one layer as a dense matrix [PM, PM], and what was found on the way."""

    matrix: np.ndarray
    fisher: np.ndarray
    basis: np.ndarray | None = None

    @property
    def mean(self) -> float:
        """The mean eigenvalue, which is the trace by the size whatever the basis."""
        return float(np.trace(self.matrix)) / len(self.matrix)

    def damping(self, setting: float | str, least: float = 0.0) -> float:
        """0.1 × the mean eigenvalue, or × ``least`` where that is more."""
        return 0.1 * max(self.mean, least) if isinstance(setting, str) else setting

    def solve(self, v: np.ndarray, setting: float | str, least: float = 0.0) -> np.ndarray:
        damped = self.matrix + self.damping(setting, least) * np.eye(len(self.matrix))
        return np.linalg.solve(damped, v.reshape(-1)).reshape(v.shape)


def fisher(grads: Sequence[np.ndarray]) -> np.ndarray:
    """(1/N) Σ_n vec(G_n) vec(G_n)ᵀ."""
    rows = np.stack([g.reshape(-1) for g in grads])
    return rows.T @ rows / len(rows)


def curvature(
    kind: str, grads: Sequence[np.ndarray], pairs: Sequence[tuple[np.ndarray, np.ndarray]] = (), blocks: int = 1
) -> Dense:
    """The dense curvature of one layer from per-sequence gradients and the sequences' tokens (a, g).

    ``blocks``: of A and S only what stands in so many blocks along the diagonal is kept.
    """
    exact = fisher(grads)
    if kind == "diagonal":
        return Dense(np.diag(np.diag(exact)), exact)
    a, g = np.vstack([a for a, _ in pairs]), np.vstack([g for _, g in pairs])
    if kind in ("kfac", "ekfac"):
        rows = max(1, len(a))
        input_covariance, output_covariance = a.T @ a / rows, g.T @ g / rows
        scale = len(a) / len(pairs)
    elif kind in ("tkfac", "tekfac"):
        norms = (a**2).sum(1), (g**2).sum(1)
        input_covariance = sum(size * np.outer(one, one) for one, size in zip(a, norms[1], strict=True)) / len(pairs)
        output_covariance = sum(size * np.outer(one, one) for one, size in zip(g, norms[0], strict=True)) / len(pairs)
        scale = 1 / (norms[0] @ norms[1] / len(pairs))
    else:
        assert kind in ("shampoo", "eshampoo")
        input_covariance = sum(one.T @ one for one in grads) / len(grads)
        output_covariance = sum(one @ one.T for one in grads) / len(grads)
        scale = 1 / (sum(np.sum(one**2) for one in grads) / len(grads))
    sides = [_runs(output_covariance, blocks), _runs(input_covariance, blocks)]
    if not kind.startswith("e") and kind != "tekfac":
        return Dense(scale * np.kron(block_diag(*sides[0]), block_diag(*sides[1])), exact)
    basis = np.kron(*(block_diag(*(np.linalg.eigh(one)[1] for one in side)) for side in sides))
    return Dense(basis @ np.diag(np.diag(basis.T @ exact @ basis)) @ basis.T, exact, basis)


def _runs(matrix: np.ndarray, blocks: int) -> list[np.ndarray]:
    """What stands in each of the blocks, the larger ones first."""
    return [matrix[np.ix_(run, run)] for run in np.array_split(np.arange(len(matrix)), blocks) if len(run)]


def question_gradient(model: nn.Module, layers: Sequence[str], question: Question) -> dict[str, np.ndarray]:
    """Layer -> ∇f [P, M]."""
    parts = [(weight, gradients(model, layers, example)) for weight, example in question.parts]
    return {name: sum(-weight * found[name] for weight, found in parts) for name in layers}  # type: ignore[misc]


def influences(
    model: nn.Module,
    layers: Sequence[str],
    fit: Sequence[Example],
    candidates: Sequence[Example],
    questions: Sequence[Question],
    kind: str,
    damping: float | str,
    pools: Mapping[str, Sequence[str]] | None = None,
    blocks: int = 1,
) -> dict[str, np.ndarray]:
    """Layer -> ∇f(q)ᵀ (G + λI)⁻¹ ∇log p(n), [Q, N]; for "cosine" divided by both norms over all layers.

    ``blocks``: of A and S, as ``curvature``.
    ``pools``: layer -> layers whose mean eigenvalue, over all of them, is the least that its damping goes by.
    """
    asked = [question_gradient(model, layers, question) for question in questions]
    sequences = [gradients(model, layers, example) for example in candidates]
    if kind in ("identity", "cosine"):
        solved = asked
    else:
        fitted = [gradients(model, layers, example) for example in fit]
        pairs = [token_pairs(model, layers, example) for example in fit] if kind != "diagonal" else []
        solved = [{} for _ in asked]
        dense = {
            name: curvature(kind, [g[name] for g in fitted], [p[name] for p in pairs], blocks) for name in layers
        }  # fmt: skip
        for name in layers:
            least = float(np.mean([dense[one].mean for one in (pools or {}).get(name, [name])]))
            for place, query in enumerate(asked):
                solved[place][name] = dense[name].solve(query[name], damping, least)
    scores = {
        name: np.array([[-float((s[name] * g[name]).sum()) for g in sequences] for s in solved]) for name in layers
    }
    if kind == "cosine":
        norms = np.outer([_norm(query) for query in asked], [_norm(g) for g in sequences])
        scores = {name: values / norms for name, values in scores.items()}
    return scores


def _norm(layers: Mapping[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(float((g**2).sum()) for g in layers.values())))


def difference(found: Any, expected: Any) -> float:
    """max|Δ| / RMS(expected)."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.sqrt((expected**2).mean()))
