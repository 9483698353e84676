"""TrackStar's score (Chang et al. 2024) of a model that fits in memory: an estimator of this study, not of raylux.

The gradient G of a sequence in a layer is divided by the root of the optimizer's second moments, elementwise, and
projected from both sides by random matrices to [K, K]; layers stand side by side in φ. With R the second moment of the
training sequences' φ, each layer for itself, R^(-1/2) φ is taken to unit length: a score is the product of two of
these. R gets a tenth of its mean eigenvalue added, as every kind of curvature here. The paper's R may mix in the
queries' own; here queries are texts of the same kind, and it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from raylux.batches import TokenRow, collate
from raylux.capture import Capture
from raylux.curvature.spectral import DAMPING_SHARE
from raylux.influence.dots import sequence_gradients
from raylux.layers import coverage

# Rows and columns that a layer's gradient is projected to: what is compared.
SIZES = (16, 32)
_SEED = 0
# Of Adam, which keeps it from dividing by nothing.
_EPSILON = 1e-8


def scores(
    model: PreTrainedModel,
    moments: Mapping[str, Tensor],
    rows: Sequence[TokenRow],
    asked: Sequence[TokenRow],
    projected: int,
) -> np.ndarray:
    """Of every sequence for every query [Q, N], cosines.

    Args:
        model: a causal LM.
        moments: tracked layer -> the optimizer's second moment of each weight [P, M].
        rows: [N] training sequences.
        asked: [Q] queries, whose measurement is their log-probability.
        projected: K.
    """
    train, queries = (features(model, moments, some, projected) for some in (rows, asked))
    whitened = [whiten(queries[name], train[name], train[name]) for name in train]
    sides = [torch.cat([pair[side] for pair in whitened], 1) for side in range(2)]
    units = [side / side.norm(dim=1, keepdim=True) for side in sides]
    return (units[0] @ units[1].T).numpy()


def features(
    model: PreTrainedModel, moments: Mapping[str, Tensor], rows: Sequence[TokenRow], projected: int
) -> dict[str, Tensor]:
    """Layer -> φ of each sequence before it is whitened [N, K·K] float64: of the gradient of its log-probability."""
    layers = coverage(model).tracked
    capture, sides = Capture(model, layers), projections({layer.name: layer.shape for layer in layers}, projected)
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    for row in rows:
        captured = capture.run(collate([row], [0], len(row.tokens)))
        for layer in layers:
            gradient = -sequence_gradients(captured.inputs[layer.name], captured.grads[layer.name])[0].double()
            left, right = sides[layer.name]
            scaled = gradient / (moments[layer.name].double().sqrt() + _EPSILON)
            found[layer.name].append((left @ scaled @ right.T).flatten())
    return {name: torch.stack(each) for name, each in found.items()}


def projections(shapes: Mapping[str, tuple[int, int]], projected: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> Gaussian matrices [K, P] and [K, M] float64 whose projections keep lengths on average."""
    draw = torch.Generator().manual_seed(_SEED)
    return {
        name: tuple(
            torch.randn(projected, width, generator=draw, dtype=torch.float64) / projected**0.5 for width in shape
        )
        for name, shape in shapes.items()
    }


def whiten(*sides: Tensor) -> list[Tensor]:
    """R^(-1/2) of each of ``sides`` [n, D] but the last, whose mean outer product R [D, D] is."""
    *wanted, train = sides
    values, vectors = torch.linalg.eigh(train.T @ train / len(train))
    values = values.clamp(min=0)
    root = (values + DAMPING_SHARE * values.mean()).rsqrt()
    return [side @ (vectors * root) @ vectors.T for side in wanted]
