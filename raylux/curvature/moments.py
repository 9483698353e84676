"""Second moments of per-sequence gradients in a basis: the eigenvalue correction Λ of EK-FAC.

George et al. 2018; Grosse et al. 2023, eq. 18-21 with the transposes put right: the gradient of a sequence
is G = Σ_t g_t a_tᵀ (tokens summed before squaring) and its coordinates in the Kronecker eigenbasis are
Q_Sᵀ G Q_A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raylux.profiling import of

_CHUNK_BYTES = 1 << 28


def add_second_moment(total: Tensor, a: Tensor, g: Tensor, q_a: Tensor | None, q_s: Tensor | None) -> None:
    """``total`` [P, M] += Σ_n (Q_Sᵀ G_n Q_A)², elementwise.

    Args:
        total: running sum [P, M].
        a: [N, T, M], zero on padding.
        g: [N, T, P].
        q_a: [M, M] or None for the standard basis.
        q_s: [P, P] or None for the standard basis.

    Tokens are rotated before the gradient is formed, or the gradient after, whichever costs less.
    """
    tokens = a.shape[1]
    if rotate_tokens_first(tokens, g.shape[2], a.shape[2]):
        with of("rotate"):
            a = a if q_a is None else a @ q_a
            g = g if q_s is None else g @ q_s
        q_a = q_s = None
    rows = max(1, _CHUNK_BYTES // (total.numel() * total.element_size()))
    for start in range(0, len(a), rows):
        with of("form"):
            gradient = torch.bmm(g[start : start + rows].mT, a[start : start + rows])
        with of("rotate"):
            gradient = gradient if q_s is None else q_s.T @ gradient
            gradient = gradient if q_a is None else gradient @ q_a
        with of("square"):
            total.add_(gradient.square_().sum(0))


def rotate_tokens_first(tokens: int, outputs: int, inputs: int) -> bool:
    """True where T·(M² + P²) multiplications cost no more than P·M·(P + M) for the formed gradient."""
    return tokens * (inputs**2 + outputs**2) <= outputs * inputs * (outputs + inputs)
