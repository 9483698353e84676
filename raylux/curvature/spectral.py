"""A layer's curvature as eigenvalues on a Kronecker basis: one operator for every kind.

G_l V = Q_S [Λ ∘ (Q_Sᵀ V Q_A)] Q_Aᵀ, hence (G_l + λI)⁻¹ V = Q_S [(Q_Sᵀ V Q_A) / (Λ + λ)] Q_Aᵀ
(Grosse et al. 2023, eq. 21, with the transposes put right). A basis of None is the standard one, Λ of None
is the identity operator.

Where a curvature stands for a segment of training, over which the learning rates sum to h (SOURCE, Bae et al. 2024),
1/(Λ + λ) gives way to two functions of the eigenvalues x = Λ + λ: (1 − exp(−hx))/x, by how much a gradient that is
added throughout the segment has moved the weights at its end, and exp(−hx), what is then left of a move before it.
The first tends to h for h → 0 (a gradient step) and to 1/x for h → ∞ (the damped inverse).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raylux.blocks import Square
from raylux.errors import NumericsError

DAMPING_SHARE = 0.1


@dataclass
class Spectral:
    """Curvature of one layer.

    Attributes:
        values: Λ [P, M], or None for the identity.
        q_a: [M, M] eigenvectors of A in columns, or None; in blocks where A is.
        q_s: [P, P] eigenvectors of S in columns, or None; likewise.
        segment: h of the segment of training that it stands for; None: the inverse is wanted.
    """

    values: Tensor | None = None
    q_a: Square | None = None
    q_s: Square | None = None
    segment: float | None = None

    def damping(self, setting: float | str, least: float = 0.0) -> float:
        """λ: the setting, or 0.1 × mean(Λ) of this layer for "auto"; 0 of a segment, whose end regularises.

        Args:
            setting: a number, or "auto".
            least: a mean that "auto" does not go below: of an expert, that over all experts of its block. Λ of an
                expert is a mean over all sequences; one that few tokens reach would be divided by next to nothing.
        """
        if self.values is None:
            return 0.0
        if not isinstance(setting, str):
            return float(setting)
        if self.segment is not None:
            return 0.0
        return DAMPING_SHARE * max(float(self.values.double().mean()), least)

    def multiply(self, v: Tensor) -> Tensor:
        """G V for V [..., P, M]."""
        return v if self.values is None else self.back(self.into(v) * self.values)

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """(G + λI)⁻¹ V for V [..., P, M]; for the identity, V itself.

        Raises:
            NumericsError: λ = 0 where Λ has a zero.
        """
        return self.back(self.divide(self.into(v), damping))

    def divide(self, v: Tensor, damping: float) -> Tensor:
        """V / (Λ + λ) for V [..., P, M] in the eigenbasis; for the identity, V itself.

        Raises:
            NumericsError: λ = 0 where Λ has a zero.
        """
        inverse = self.inverse(damping)
        return v if inverse is None else v * inverse

    def inverse(self, damping: float) -> Tensor | None:
        """1 / (Λ + λ) [P, M], of a segment (1 − exp(−h(Λ + λ))) / (Λ + λ); None for the identity.

        Raises:
            NumericsError: λ = 0 where Λ has a zero.
        """
        if self.values is None:
            return None
        denominator = self.values + damping
        if self.segment is not None:
            y = self.segment * denominator
            return self.segment * torch.where(y > 0, -torch.expm1(-y) / y, 1.0)
        if not bool((denominator > 0).all()):
            raise NumericsError("the damped curvature is singular: set curvature.damping above 0, or to auto")
        return denominator.reciprocal()

    def before(self, solved: Tensor, damping: float) -> Tensor:
        """What a query is to the segment before this one: exp(−h(G + λ)) V of a V that is given by its solution here.

        The solution (1 − exp(−h(G + λ)))/(G + λ) V has lost nothing of V: no eigenvalue of that is 0.

        Args:
            solved: [P, M] in the eigenbasis.
            damping: λ by which it was solved.

        Returns:
            [P, M] in the standard basis.
        """
        assert self.values is not None and self.segment is not None, "a segment of a kind with Λ"
        y = self.segment * (self.values + damping)
        return self.back(solved * torch.where(y > 0, y / torch.expm1(y), 1.0) / self.segment)

    def into(self, v: Tensor) -> Tensor:
        """Q_Sᵀ V Q_A."""
        v = v if self.q_s is None else self.q_s.T @ v
        return v if self.q_a is None else v @ self.q_a

    def back(self, v: Tensor) -> Tensor:
        """Q_S V Q_Aᵀ."""
        v = v if self.q_s is None else self.q_s @ v
        return v if self.q_a is None else v @ self.q_a.T
