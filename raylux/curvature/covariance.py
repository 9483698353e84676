"""Uncentred covariances A = E[a aᵀ], S = E[g gᵀ] over tokens, and their eigenbases.

Martens & Grosse 2015; for transformers as in Grosse et al. 2023, eq. 12-17: tokens as if independent.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from raylux.errors import NumericsError


@dataclass
class Covariances:
    """Running sums over tokens, on the device and in the precision of what is added.

    Attributes:
        inputs: input group -> Σ a aᵀ [M, M].
        grads: layer -> Σ g gᵀ [P, P].
        rows: layer -> number of token rows summed (real tokens × calls of the module).
        sequences: number of sequences summed.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    sequences: int = 0

    def add(self, inputs: dict[str, Tensor], grads: dict[str, Tensor], mask: Tensor) -> None:
        """Add a batch.

        Args:
            inputs: input group -> a [N, c·T, M], zero on padding, c the calls of the module.
            grads: layer -> g [N, c·T, P], zero on padding.
            mask: [N, T] bool, True on real tokens.
        """
        tokens = int(mask.sum())
        for name, a in inputs.items():
            _add_outer(self.inputs, name, a)
        for name, g in grads.items():
            _add_outer(self.grads, name, g)
            self.rows[name] = self.rows.get(name, 0) + tokens * (g.shape[1] // mask.shape[1])
        self.sequences += len(mask)


def _add_outer(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
    rows = x.reshape(-1, x.shape[-1])
    rows = rows.float() if rows.dtype == torch.bfloat16 else rows
    if name in sums:
        sums[name].addmm_(rows.T, rows)
    else:
        sums[name] = rows.T @ rows


def eigenbasis(covariance: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, clamped at 0) [n] and orthonormal eigenvectors in columns [n, n], in float64.

    Args:
        covariance: symmetric up to rounding [n, n]; rank-deficient matrices are normal.
        name: what an error calls the matrix.

    Raises:
        NumericsError: NaN or infinity in the matrix, or the decomposition fails.
    """
    matrix = covariance.double()
    if not torch.isfinite(matrix).all():
        raise NumericsError(f"{name}: the covariance holds NaN or infinity")
    matrix = (matrix + matrix.T) / 2
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:
        raise NumericsError(f"{name}: the eigendecomposition failed ({error})") from None
    return values.clamp_(min=0.0), vectors
