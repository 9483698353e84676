"""s_test of a block of queries in one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raylux.cost.contraction import rotate_tokens_first
from raylux.curvature import Spectral


def solve_layer(
    curvature: Spectral, tokens: Sequence[tuple[Tensor, Tensor]], damping: float, dtype: torch.dtype, eigen: bool
) -> tuple[list[Tensor], list[float]]:
    """(G + λI)⁻¹ of each query's gradient.

    Args:
        curvature: of the layer; its bases are in ``dtype``.
        tokens: per query, a [T, M] and g [T, P] in ``dtype``; the gradient is Σ_t g_t a_tᵀ.
        damping: λ.
        dtype: of the products and of the result.
        eigen: leave the result in the eigenbasis.

    Returns:
        s_test [P, M] of each query, and the squared norm of its gradient.

    Raises:
        NumericsError: λ = 0 where Λ has a zero.
    """
    solved, norms = [], []
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for gradient in _gradients(curvature, tokens):
        g = gradient.to(wide)
        norms.append(float(g.square().sum(dtype=torch.float64)))
        solved.append(curvature.divide(g, damping).to(dtype))
    if not eigen:
        solved = [curvature.back(s_test) for s_test in solved]
    return solved, norms


def _gradients(curvature: Spectral, tokens: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Q_Sᵀ G Q_A of each query, by the cheaper way: rotated as tokens (all queries' in one product), or as G."""
    a, g = tokens[0]
    count = sum(len(one) for one, _ in tokens) / len(tokens)
    if not rotate_tokens_first(count, g.shape[1], a.shape[1]):
        return [curvature.into(g.T @ a) for a, g in tokens]
    lengths = [len(a) for a, _ in tokens]
    rotated = [
        (x if basis is None else x @ basis).split(lengths)
        for x, basis in (
            (torch.cat([a for a, _ in tokens]), curvature.q_a),
            (torch.cat([g for _, g in tokens]), curvature.q_s),
        )
    ]
    return [g.T @ a for a, g in zip(*rotated, strict=True)]
