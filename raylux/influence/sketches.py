"""Estimated scores of all pairs, a first stage before exact scores of the few that matter: folded gradients.

A score of a layer is ⟨V, G⟩ with the preconditioned query V and the sequence's gradient G = Σ_t g_t a_tᵀ, both [P, M].

1. **Balance.** For any diagonal scales b in the Kronecker eigenbasis it is ⟨V / b, G · b⟩, too. An estimate by k
   numbers errs by about ‖V / b‖ ‖G · b‖ / √k, and preconditioned queries are large where gradients are small: scaling
   the largest eigendirections of S and A alone makes that product several times smaller. In tokens it costs
   2·T·c·(P + M).
2. **Signs and folding.** Rows and columns of G take random signs (g and a do, that is), runs of R rows are laid upon
   one another, each rolled on by some columns, and added up: k = R·M numbers φ(G) with E⟨φ(V), φ(G)⟩ = ⟨V, G⟩. Without
   the roll whole rows would meet under one sign. A run is added as it is formed: nothing of G's size is ever held.

Whatever is estimated comes with the variance that its own norms promise, ‖φ(V)‖² ‖φ(G)‖² (1/k − 1/(P·M)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raylux.cost.two_stage import FOLDED
from raylux.influence.dots import Held, in_memory
from raylux.products import gradients_into
from raylux.profiling import of
from raylux.sampling import random_signs

SIZE = FOLDED
"""Numbers of a folded gradient, about."""

# Rows of a gradient that are formed at a time, and sequences.
_FORMED, _SEQUENCES = 128, 8
# Queries whose mean squares say how gradients are balanced.
_SEEN = 64
# Bytes of queries that are balanced at a time.
_BLOCK = 64 << 20
_ROUNDS = 20


@dataclass(frozen=True)
class Directions:
    """Orthonormal directions of one side of a layer, and the factors of a gradient along them.

    Attributes:
        vectors: [n, c].
        scales: [c].
    """

    vectors: Tensor
    scales: Tensor

    def scaled(self, x: Tensor, power: int = 1) -> Tensor:
        """x [..., n] with its parts along the directions multiplied by their scales, or (−1) divided."""
        return x + (x @ self.vectors * (self.scales**power - 1)) @ self.vectors.T


@dataclass(frozen=True)
class Fold:
    """How gradients of a layer become shorter: a function of its name and shape.

    Attributes:
        outputs: scaled directions of g; None: none.
        inputs: of a; likewise.
        signs: [P] and [M].
        rows: R.
    """

    outputs: Directions | None
    inputs: Directions | None
    signs: tuple[Tensor, Tensor]
    rows: int

    @property
    def size(self) -> int:
        """k."""
        return self.rows * len(self.signs[1])

    @property
    def spread(self) -> float:
        """1/k − 1/(P·M): what the variance of an estimate is of the norms squared; 0 where nothing is folded."""
        outputs, inputs = (len(side) for side in self.signs)
        return 1 / self.size - 1 / (outputs * inputs)

    def gradients(self, a: Tensor, g: Tensor) -> Tensor:
        """φ(G) [N, k] of a [N, T, M] and g [N, T, P]."""
        a = (a if self.inputs is None else self.inputs.scaled(a)) * self.signs[1]
        g = (g if self.outputs is None else self.outputs.scaled(g)) * self.signs[0]
        found = a.new_zeros(len(a), self.rows, a.shape[2])
        # Many rows are formed at a time, since products of few are slow; of few sequences, so that they stay in cache.
        together = max(1, _FORMED // self.rows)
        runs = list(self._runs())
        buffer = a.new_empty(_SEQUENCES, together * self.rows, a.shape[2])
        for some in torch.arange(len(a)).split(_SEQUENCES):
            own = slice(int(some[0]), int(some[-1]) + 1)
            for first in range(0, len(runs), together):
                here = runs[first : first + together]
                begin = here[0][0].start
                some_g = g[own, :, begin : here[-1][0].stop]
                formed = buffer[: len(some), : some_g.shape[2]]
                gradients_into(a[own], some_g, formed)
                for run, shift in here:
                    _add_rolled(found[own], formed[:, run.start - begin : run.stop - begin], shift)
        return found.flatten(1)

    def queries(self, v: Tensor) -> Tensor:
        """φ(V) [Q, k] of V [Q, P, M], which is divided by what gradients are multiplied with."""
        v = v if self.inputs is None else self.inputs.scaled(v, -1)
        v = v if self.outputs is None else self.outputs.scaled(v.mT, -1).mT
        v = v * self.signs[0][:, None] * self.signs[1]
        found = v.new_zeros(len(v), self.rows, v.shape[2])
        for run, shift in self._runs():
            _add_rolled(found, v[:, run], shift)
        return found.flatten(1)

    def _runs(self) -> Iterator[tuple[slice, int]]:
        """The rows of each run, and by how many columns it is rolled."""
        outputs, inputs = (len(side) for side in self.signs)
        # Near the golden section no two of few runs come to lie upon one another.
        step = round(inputs * (math.sqrt(5) - 1) / 2)
        for number, start in enumerate(range(0, outputs, self.rows)):
            yield slice(start, start + self.rows), number * step % inputs


def _add_rolled(total: Tensor, x: Tensor, shift: int) -> None:
    """Add x [N, R, M], or fewer rows, with its columns rolled on."""
    into, rest = total[:, : x.shape[1]], x.shape[2] - shift
    into[..., shift:] += x[..., :rest]
    into[..., :shift] += x[..., rest:]


def fold(
    name: str,
    queries: Sequence[Tensor],
    leading: tuple[Tensor, Tensor] | None,
    values: Tensor | None,
    size: int = SIZE,
) -> Fold:
    """The fold of a layer that makes the errors of some queries' estimates small.

    Args:
        name: of the layer, from which its signs are drawn.
        queries: V, dense [P, M] each; all count alike, whatever their length.
        leading: eigenvectors of the largest eigenvalues of S [P, s] and A [M, c], which are scaled; None: nothing is.
        values: Λ [P, M], the mean squares of gradients in the eigenbasis, these directions last.
        size: k, about.
    """
    some = queries[0]
    outputs, inputs = some.shape
    signs = random_signs(f"{name} S", (outputs,)).to(some), random_signs(f"{name} A", (inputs,)).to(some)
    rows = min(outputs, -(-size // inputs))
    if leading is None or values is None or rows == outputs:
        return Fold(None, None, signs, rows)
    u_s, u_a = leading
    moments = np.zeros((u_s.shape[1] + 1, u_a.shape[1] + 1))
    # Scales need not be exact: some of many queries do.
    for block in _blocks(queries[:: -(-len(queries) // _SEEN)]):
        weights = 1 / block.square().sum((1, 2), keepdim=True).clamp_min(torch.finfo(block.dtype).tiny)
        top_rows, top_columns = u_s.T @ block, block @ u_a
        corner = top_rows @ u_a
        whole, along, across, both = (
            (x.square() * weights).sum(0).double().cpu().numpy() for x in (block, top_rows, top_columns, corner)
        )
        moments += _parted(whole.sum(), along.sum(1), across.sum(0), both)
    g, (rest, beside) = values.double().cpu().numpy(), (outputs - u_s.shape[1], inputs - u_a.shape[1])
    lam = _parted(g.sum(), g[rest:].sum(1), g[:, beside:].sum(0), g[rest:, beside:])
    found = [torch.from_numpy(scales).to(some) for scales in balance(moments, lam)]
    return Fold(Directions(u_s, found[0]), Directions(u_a, found[1]), signs, rows)


def balance(v: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales x [s], y [c] of directions that make E‖V / b‖² E‖G · b‖² least, one side given the other, in turn.

    Args:
        v: [s + 1, c + 1] mean squares of queries along pairs of directions; first what lies beside all of them.
        g: likewise of gradients.
    """
    x, y = np.ones(len(v)), np.ones(v.shape[1])
    for _ in range(_ROUNDS):
        _improve(x, (v / y**2).sum(1), (g * y**2).sum(1))
        _improve(y, (v / x[:, None] ** 2).sum(0), (g * x[:, None] ** 2).sum(0))
    return x[1:], y[1:]


def _improve(z: np.ndarray, v: np.ndarray, g: np.ndarray) -> None:
    """z but for its first, so that (Σ v/z²)(Σ g z²) falls."""
    least = np.finfo(np.float64).tiny, 1e-30 * g.max() + np.finfo(np.float64).tiny
    best = np.sqrt(np.maximum(v[1:], least[0]) / np.maximum(g[1:], least[1]))
    z[1:] = np.sqrt(best * np.sqrt((g * z**2).sum() / max((v / z**2).sum(), least[0])))


def _parted(whole: float, rows: np.ndarray, columns: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Sums of squares beside and along directions, of their totals: ``balance`` has it."""
    found = np.zeros((len(rows) + 1, len(columns) + 1))
    found[1:, 1:] = corner
    found[1:, 0] = rows - corner.sum(1)
    found[0, 1:] = columns - corner.sum(0)
    found[0, 0] = whole - found.sum()
    # Rounding may leave a little less than nothing.
    return np.maximum(found, 0.0)


def _blocks(queries: Sequence[Tensor]) -> Iterator[Tensor]:
    size = max(1, _BLOCK // (queries[0].numel() * queries[0].element_size()))
    for start in range(0, len(queries), size):
        yield torch.stack(list(queries[start : start + size]))


@dataclass(frozen=True)
class LayerSketch:
    """The queries of a layer, folded.

    Attributes:
        fold: how.
        queries: φ(V) [Q, k].
        squares: ‖φ(V)‖² [Q].
    """

    fold: Fold
    queries: Held
    squares: Tensor

    @classmethod
    def build(cls, drawn: Fold, queries: Sequence[Tensor], hold: Callable[[Tensor], Held] = in_memory) -> LayerSketch:
        """Of V, dense [P, M] each; ``hold`` puts what is made of them where it rests."""
        found = torch.cat([drawn.queries(block) for block in _blocks(queries)])
        squares = found.square().sum(1)
        return cls(drawn, hold(found), squares)

    def estimates(self, batches: Sequence[tuple[Tensor, Tensor]], rows: int) -> tuple[Tensor, Tensor]:
        """What the scores of some batches may be.

        Args:
            batches: a [N, T, M] and g [N, T, P] of each.
            rows: of each product, so that an estimate does not depend on how many there are.

        Returns:
            Estimates [N, Q] over all batches, and their variances [N, Q].
        """
        with of("form"):
            folded = torch.cat([self.fold.gradients(a, g) for a, g in batches])
            count = len(folded)
            folded = torch.nn.functional.pad(folded, (0, 0, 0, -count % rows))
        with of("dot"):
            queries = self.queries()
            found = torch.cat([part @ queries.T for part in folded.split(rows)])[:count]
            lengths = folded[:count].square().sum(1)
        return found, torch.outer(lengths, self.squares) * self.fold.spread
