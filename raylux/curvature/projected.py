"""Gradients over the roots of an optimizer's second moments, projected and whitened: TrackStar (Chang et al. 2024).

Of a layer with second moments v [P, M] the gradient G [P, M] of a sequence becomes

    φ(G) = L (G / √v) Rᵀ  [K, K]

with L [K, P] and R [K, M] of random signs over √K, which keep inner products on average. With C = E[φ φᵀ] over the
fitted sequences, λ added, the inner product of two sequences is φᵀ (C + λ)⁻¹ φ, layers summed: what the other kinds
have as vᵀ (G + λ)⁻¹ v, of rank K². A score is that product over the lengths of the two, a cosine.

v may be known up to a factor for each layer: λ being a share of the mean of C, the factor cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylux.curvature.spectral import DAMPING_SHARE
from raylux.errors import NumericsError, UserError
from raylux.layers import TrackedLayer
from raylux.sampling import random_signs

# Of the mean of v, added to it: a weight that had no gradient in the training is not divided by nothing.
_FLOOR = 1e-8


def check(kind: str, projected: bool, size: int, layers: Sequence[TrackedLayer]) -> None:
    """Raises UserError where the gradients of some tracked layers cannot be projected to [size, size]."""
    if not projected:
        return
    routed = [layer.name for layer in layers if layer.routed]
    if routed:
        raise UserError(
            f"curvature.kind={kind}: '{routed[0]}' belongs to an expert, whose few gradients do not whiten anything; "
            "name other layers in model.layers, or take curvature.kind=diagonal"
        )
    least = min(layers, key=lambda layer: min(layer.shape))
    if size > min(least.shape):
        raise UserError(
            f"curvature.projection={size}: '{least.name}' is {least.outputs} by {least.inputs}, and its gradients "
            f"cannot be projected to {size} by {size}; set it to {min(least.shape)} or lower, or leave that layer out "
            "of model.layers"
        )


def sides(name: str, shape: tuple[int, int], size: int, seed: int) -> tuple[Tensor, Tensor]:
    """(L [K, P], R [K, M]) of a layer, float64: signs over √K, a function of name, shape, size and seed alone."""
    left, right = (
        random_signs(f"{seed} {size} {width} {side} {name}", (size, width)) for side, width in enumerate(shape)
    )
    return left / size**0.5, right / size**0.5


def reciprocal_roots(moments: Tensor) -> Tensor:
    """1/√v [P, M], v raised by a small share of its mean; ones of a layer without any gradient."""
    mean = moments.double().mean()
    raised = moments.double() + _FLOOR * mean
    return torch.where(mean > 0, raised.rsqrt(), 1.0).to(moments.dtype)


@dataclass(frozen=True)
class Projected:
    """The metric of a layer.

    Attributes:
        roots: 1/√v [P, M].
        left: L [K, P].
        right: R [K, M].
        lower: Cholesky factor [K·K, K·K] float64 of C + λ; None: C is not known yet.
        damping: λ.
    """

    roots: Tensor
    left: Tensor
    right: Tensor
    lower: Tensor | None = None
    damping: float = 0.0

    @classmethod
    def of(cls, name: str, moments: Tensor, size: int, seed: int) -> Projected:
        """What projects the gradients of a layer with second moments [P, M]; not yet whitened."""
        outputs, inputs = moments.shape
        left, right = (side.to(moments) for side in sides(name, (outputs, inputs), size, seed))
        return cls(reciprocal_roots(moments), left, right)

    def whitened(self, second: Tensor, setting: float | str) -> Projected:
        """The metric, of C [K·K, K·K] and λ: a number, or a tenth of C's mean eigenvalue for "auto".

        Raises:
            NumericsError: C + λ is singular.
        """
        matrix = second.double()
        matrix = (matrix + matrix.T) / 2
        damping = DAMPING_SHARE * float(matrix.diagonal().mean()) if isinstance(setting, str) else float(setting)
        matrix.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            raise NumericsError("the damped curvature is singular: set curvature.damping above 0, or to auto")
        return Projected(self.roots, self.left, self.right, lower, damping)

    def features(self, gradient: Tensor) -> Tensor:
        """φ [K·K] of a gradient [P, M]; one at a time, as its bits would depend on others beside it."""
        return (self.left @ (gradient * self.roots) @ self.right.T).flatten()

    def solve(self, gradient: Tensor) -> Tensor:
        """[P, M] whose product with any gradient is the inner product of the two in this metric."""
        assert self.lower is not None, "not whitened"
        solved = torch.cholesky_solve(self.features(gradient).double()[:, None], self.lower)
        size = len(self.left)
        return (self.left.T @ solved.view(size, size).to(gradient.dtype) @ self.right) * self.roots

    def square(self, gradient: Tensor) -> Tensor:
        """φᵀ (C + λ)⁻¹ φ of a gradient, float64: its length squared."""
        assert self.lower is not None, "not whitened"
        turned = torch.linalg.solve_triangular(self.lower, self.features(gradient).double()[:, None], upper=False)
        return turned.square().sum()
