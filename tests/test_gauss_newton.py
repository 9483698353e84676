"""Products of the Gauss-Newton matrix against the dense matrix, float64, Jacobians by autograd a token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from raylux.batches import IGNORED, TokenRow, fit_batches
from raylux.capture import Capture
from raylux.curvature.gauss_newton import add_products
from raylux.layers import TrackedLayer, coverage
from tests.architectures import NAMES, build

VOCAB = 13
# The RMS norms of transformers compute in float32, whatever the model's dtype.
TOLERANCE = dict.fromkeys(NAMES, 1e-10) | dict.fromkeys(("llama", "qwen2", "qwen3"), 2e-6)


def rows(count: int = 3, seed: int = 0) -> list[TokenRow]:
    """Sequences of several lengths; the first tokens of some have no loss."""
    draw = np.random.default_rng(seed)
    found = []
    for place in range(count):
        tokens = draw.integers(2, VOCAB, 3 + place % 3)
        labels = np.where(np.arange(len(tokens)) < place % 2 + 1, IGNORED, tokens)
        found.append(TokenRow(tokens, labels, place))
    return found


def dense(model: nn.Module, layers: Sequence[TrackedLayer], given: Sequence[TokenRow]) -> Tensor:
    """Σ_it J'HJ over all tracked layers together, [D, D], parameters in the order of the layers' [P, M]."""
    modules = [model.get_submodule(layer.name) for layer in layers]
    weights: list[Any] = [p for module in modules for p in (module.weight, module.bias) if p is not None]
    total: Any = 0.0
    for weight in weights:
        weight.requires_grad_(True)
    for row in given:
        logits = model(input_ids=torch.tensor(np.asarray(row.tokens, np.int64))[None]).logits[0]
        for place in range(1, len(row.tokens)):
            if row.labels[place] == IGNORED:
                continue
            own = logits[place - 1]
            grads = torch.autograd.grad(
                own, weights, torch.eye(len(own)).to(own), retain_graph=True, is_grads_batched=True
            )
            jacobian = torch.stack([_flat(modules, [grad[logit] for grad in grads]) for logit in range(len(own))])
            p = own.detach().softmax(0)
            total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    for weight in weights:
        weight.requires_grad_(False)
    return total


def _flat(modules: Sequence[nn.Module], grads: Sequence[Tensor]) -> Tensor:
    left, parts = iter(grads), []
    for module in modules:
        weight = next(left)
        weight = weight.T if isinstance(module, Conv1D) else weight
        parts.append(weight if module.bias is None else torch.cat([weight, next(left)[:, None]], 1))
    return torch.cat([part.reshape(-1) for part in parts])


def split(layers: Sequence[TrackedLayer], flat: Tensor) -> dict[str, Tensor]:
    parts = flat.split([layer.parameters for layer in layers])
    return {layer.name: part.view(layer.shape) for layer, part in zip(layers, parts, strict=True)}


def joined(vector: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in vector.values()])


@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_dense_matrix(name: str) -> None:
    model = build(name, torch.float64, VOCAB)
    layers = coverage(model).tracked
    given = rows()
    expected = dense(model, layers, given)
    size = len(expected)
    vectors = [
        split(layers, torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))
        for n in (0, 1)
    ]
    totals = [{layer.name: torch.zeros(layer.shape, dtype=torch.float64) for layer in layers} for _ in vectors]
    capture = Capture(model, layers)
    for batch in fit_batches(given, 12):
        add_products(capture, batch, vectors, totals)
    for vector, total in zip(vectors, totals, strict=True):
        wanted = expected @ joined(vector)
        assert float((joined(total) - wanted).abs().max() / wanted.abs().max()) < TOLERANCE[name]
