"""The mathematics of the first pass: balanced gradients, their count sketches, the error that a sketch makes.

A score is ⟨V, G⟩ with the preconditioned query V and the sequence's gradient G, both [P, M]. For any diagonal b in the
Kronecker eigenbasis it is ⟨V / b, G · b⟩ too. A sketch of k numbers, each the sum of the entries of a bucket under
random signs, keeps the inner product without bias and with a standard error of about ‖V / b‖ ‖G · b‖ / √k: so b is
chosen to make that product of norms small. Scaling a few of the largest directions of A and S does nearly all of it,
and costs 2·T·k_A·M + 2·T·k_S·P multiplications per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Balance:
    """Scales of the largest eigendirections, as factors of the tokens; the queries are divided by them.

    Attributes:
        outputs: [P], 1 but for the last ``k_S``; directions are in ascending order of their eigenvalue.
        inputs: [M], 1 but for the last ``k_A``.
        sides: (k_S, k_A).
    """

    outputs: Tensor
    inputs: Tensor
    sides: tuple[int, int]

    def tokens(self, a: Tensor, g: Tensor, q_a: Tensor, q_s: Tensor) -> tuple[Tensor, Tensor]:
        """a [N, T, M] and g [N, T, P] of the standard basis, with their large directions scaled."""
        k_s, k_a = self.sides
        return _scale(a, q_a, self.inputs, k_a), _scale(g, q_s, self.outputs, k_s)

    def queries(self, v: Tensor) -> Tensor:
        """V [Q, P, M] of the eigenbasis, divided by the scales."""
        return v / (self.outputs[:, None] * self.inputs)

    def multiplications(self, tokens: float) -> float:
        """For a sequence of T tokens."""
        (k_s, k_a), outputs, inputs = self.sides, len(self.outputs), len(self.inputs)
        return 2 * tokens * (k_s * outputs + k_a * inputs)


def _scale(x: Tensor, basis: Tensor, scales: Tensor, count: int) -> Tensor:
    if not count:
        return x
    some = basis[:, -count:]
    return x + (x @ some * (scales[-count:] - 1)) @ some.T


def balance(v2: Tensor, g2: Tensor, sides: tuple[int, int]) -> Balance:
    """The scales that make E‖V / b‖² · E‖G · b‖² least, one side given the other, in turn.

    Args:
        v2: [P, M], mean square of the queries in the eigenbasis.
        g2: [P, M], of the gradients (Λ).
        sides: (k_S, k_A), directions that are scaled.
    """
    v2_, g2_ = v2.double().numpy(), g2.double().numpy()
    x, y = np.ones(len(v2_)), np.ones(v2_.shape[1])
    for _ in range(20):
        _improve(x, (v2_ / y**2).sum(1), (g2_ * y**2).sum(1), sides[0])
        _improve(y, (v2_ / x[:, None] ** 2).sum(0), (g2_ * x[:, None] ** 2).sum(0), sides[1])
    return Balance(torch.from_numpy(x).float(), torch.from_numpy(y).float(), sides)


def _improve(z: np.ndarray, v: np.ndarray, g: np.ndarray, count: int) -> None:
    """The last ``count`` of z, so that (Σ v/z²)(Σ g z²) falls; v, g [n] are sums over the other side."""
    if count:
        best = np.sqrt(v[-count:] / np.maximum(g[-count:], 1e-30 * g.max()))
        z[-count:] = np.sqrt(best * np.sqrt((g * z**2).sum() / (v / z**2).sum()))


@dataclass(frozen=True)
class CountSketch:
    """Entry i goes to bucket i modulo k, under its own sign and weight.

    Attributes:
        weights: [P·M], signs times positive weights for the gradients.
        inverse: [P·M], signs over the weights, for the queries.
        size: k.
    """

    weights: Tensor
    inverse: Tensor
    size: int

    @classmethod
    def draw(cls, v2: Tensor, g2: Tensor, size: int, seed: int) -> CountSketch:
        """Random signs; weights that balance the standard basis entry by entry, from mean squares [P, M] of both."""
        signs = torch.randint(0, 2, (v2.numel(),), generator=torch.Generator().manual_seed(seed)) * 2 - 1
        floor = 1e-6 * float(g2.mean())
        scale = (v2.clamp_min(1e-6 * float(v2.mean())) / g2.clamp_min(floor)).flatten() ** 0.25
        return cls(signs * scale, signs / scale, min(size, v2.numel()))

    def gradients(self, g: Tensor) -> Tensor:
        """[N, k] of G [N, P, M]."""
        return self._sums(g.flatten(1) * self.weights)

    def queries(self, v: Tensor) -> Tensor:
        """[Q, k] of V [Q, P, M]."""
        return self._sums(v.flatten(1) * self.inverse)

    def _sums(self, x: Tensor) -> Tensor:
        rest = -x.shape[1] % self.size
        return torch.nn.functional.pad(x, (0, rest)).unflatten(1, (-1, self.size)).sum(1)


def narrowed(x: np.ndarray, size: int, seed: int) -> np.ndarray:
    """A sketch [N, size] of a sketch [N, K]: what a sketch of that size would have been; size divides K."""
    signs = np.random.default_rng(seed).integers(0, 2, x.shape[1]) * 2 - 1
    return (x * signs.astype(x.dtype)).reshape(len(x), -1, size).sum(1)


@dataclass(frozen=True)
class Deflated:
    """Scores split into a part that is computed exactly, by r pivots, and the rest, that is sketched.

    Pivots are combinations W of the queries; ⟨W, G⟩ is exact, and costs as much as r queries. What is left of the
    queries is orthogonal to them among the scores, and what the pivots predict of a gradient's sketch is taken off it.

    Attributes:
        pivots: [N, r] ⟨W, G_n⟩.
        mix: [Q, r], shares of the pivots in each query's scores.
        gradients: [N, k], what is left of the sketches.
        queries: [Q, k], likewise.
    """

    pivots: np.ndarray
    mix: np.ndarray
    gradients: np.ndarray
    queries: np.ndarray

    @classmethod
    def split(
        cls, exact: np.ndarray, gradients: np.ndarray, queries: np.ndarray, scale: np.ndarray, count: int, pilot: int
    ) -> Deflated:
        """Pivots are the leading directions of the sketched scores of the first ``pilot`` sequences.

        Args:
            exact: [N, Q] scores of this layer, of which a run would compute the combinations alone.
            gradients: [N, k] sketches.
            queries: [Q, k] sketches.
            scale: [Q], by which queries are divided so that none rules.
            count: r.
            pilot: sequences.
        """
        if not count:
            return cls(np.zeros((len(exact), 0), np.float32), np.zeros((len(scale), 0)), gradients, queries)
        seen = gradients[:pilot] @ (queries / scale[:, None]).T
        _, vectors = np.linalg.eigh(seen.T @ seen)
        lead = vectors[:, : -count - 1 : -1]
        pivots = (exact / scale) @ lead
        # Every query's own scores regressed on the pivots of the pilot: what is left is smaller than by `lead` alone.
        explained = np.linalg.lstsq(pivots, gradients, rcond=None)[0]
        rest = (queries / scale[:, None]) - lead @ (lead.T @ (queries / scale[:, None]))
        mix = lead + rest @ explained.T
        return cls(pivots, mix * scale[:, None], gradients - pivots @ explained, rest * scale[:, None])

    def estimate(self) -> np.ndarray:
        """[N, Q] approximate scores of the layer."""
        return self.pivots @ self.mix.T + self.gradients @ self.queries.T

    def variance(self) -> np.ndarray:
        """[N, Q] of the sketch's error, as its own norms say: ‖rest of G‖² ‖rest of V‖² / k."""
        norms = [np.square(x).sum(1, dtype=np.float64) for x in (self.gradients, self.queries)]
        return np.outer(*norms) / self.gradients.shape[1]
