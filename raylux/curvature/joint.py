"""The exact damped curvature of small models: one dense matrix over the weights of all tracked layers.

Of kind ``gauss_newton`` it is G = (1/N) Σ_i Σ_t J_itᵀ (diag p − p pᵀ) J_it as in ``raylux.curvature.gauss_newton``,
whose products with the unit vectors are its columns; of kind ``hessian`` that of L, ``raylux.curvature.hessian``.
With the blocks between layers that every Kronecker kind leaves out, and without the noise of drawn labels. With λ, a
number for each layer, it is taken apart once by Cholesky, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylux.batches import Batch
from raylux.capture import Capture
from raylux.curvature import hessian
from raylux.curvature.gauss_newton import add_products
from raylux.errors import NumericsError, UserError
from raylux.layers import TrackedLayer

MOST = 8192
"""Weights of the tracked layers together, at most: half a gigabyte of matrix, and as many products as weights."""

# Products of one linearised batch, whose directions are held at a time.
_BLOCK = 64

Shapes = Mapping[str, tuple[int, int]]
"""Layer -> (P, M), in the order in which their weights stand in the matrix, row by row."""


def check(kind: str, joint: bool, layers: Sequence[TrackedLayer], dtype: str) -> None:
    """Raises UserError where a kind over all weights jointly cannot serve the tracked layers of a model."""
    if not joint:
        return
    count = sum(layer.parameters for layer in layers)
    routed = [layer.name for layer in layers if layer.routed]
    why = None
    if routed:
        why = f"'{routed[0]}' belongs to an expert, and there are no products with {_named(kind)} for experts"
    elif dtype == "bfloat16":
        why = "its products need full precision, and model.dtype is bfloat16"
    elif count > MOST:
        why = f"it is a dense matrix over at most {MOST:,} tracked weights, and these are {count:,}"
    if why:
        raise UserError(
            f"curvature.kind={kind}: {why}; name fewer layers in model.layers, or take curvature.kind=ekfac, with "
            "curvature.solver=pcg for nearly the exact solution"
        )


def add_columns(capture: Capture, batch: Batch, total: Tensor) -> None:
    """``total`` [D, D] += Σ_it J_itᵀ H_it J_it of a batch, a row for each unit vector.

    Args:
        capture: of the model.
        batch: on the model's device, without filler rows.
        total: added to in place; weights in the order of the capture's layers.
    """
    shapes = {layer.name: layer.shape for layer in capture.layers}
    for start in range(0, len(total), _BLOCK):
        rows = total[start : start + _BLOCK]
        units = torch.zeros_like(rows)
        units[:, start : start + len(rows)].fill_diagonal_(1)
        add_products(capture, batch, [split(unit, shapes) for unit in units], [split(row, shapes) for row in rows])


COLUMNS: Mapping[str, Callable[[Capture, Batch, Tensor], None]] = {
    "gauss_newton": add_columns,
    "hessian": hessian.add_columns,
}
"""Kind -> what adds the columns of a batch."""


def _named(kind: str) -> str:
    return "the Hessian" if kind == "hessian" else "G"


def split(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Layer -> [P, M], a view of its part of [D]."""
    parts = flat.split([outputs * inputs for outputs, inputs in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def joined(parts: Mapping[str, Tensor], shapes: Shapes) -> Tensor:
    """[D] float64 of the layers' [P, M]."""
    return torch.cat([parts[name].reshape(-1).double() for name in shapes])


@dataclass(frozen=True)
class Joint:
    """G + λ (or the Hessian with it), taken apart.

    Attributes:
        shapes: of the layers.
        lower: L [D, D] float64, G + λ = L Lᵀ.
        damping: [D] λ of each weight.
    """

    shapes: Shapes
    lower: Tensor
    damping: Tensor

    @classmethod
    def of(cls, kind: str, shapes: Shapes, panels: Mapping[str, Tensor], damping: Mapping[str, float]) -> Joint:
        """From the rows of the matrix that each layer has, [P · M, D], and its λ.

        Raises:
            UserError: the Hessian with λ is not positive definite.
            NumericsError: G + λ is not: it is singular.
        """
        matrix = torch.cat([panels[name].double() for name in shapes])
        diagonal = torch.cat([matrix.new_full((outputs * inputs,), damping[name])
                              for name, (outputs, inputs) in shapes.items()])  # fmt: skip
        matrix = (matrix + matrix.T) / 2
        lower, failed = torch.linalg.cholesky_ex(matrix + diagonal.diag())
        if int(failed):
            if kind == "hessian":
                raise UserError(_indefinite(float(torch.linalg.eigvalsh(matrix)[0])))
            raise NumericsError("the damped curvature is singular: set curvature.damping above 0, or to auto")
        return cls(shapes, lower, diagonal)

    def solve(self, v: Tensor) -> Tensor:
        """(G + λ)⁻¹ v [D] float64; a vector at a time, as its bits would depend on others beside it."""
        return torch.cholesky_solve(v[:, None], self.lower)[:, 0]

    def squares(self, v: Tensor) -> Tensor:
        """[3]: ‖v‖², vᵀ (G + λ)⁻¹ v, ‖(G + λ)⁻¹ v‖² of v [D] float64."""
        x = self.solve(v)
        return torch.stack([v @ v, v @ x, x @ x])

    def freedom(self) -> dict[str, float]:
        """Layer -> its part of tr G (G + λ)⁻¹, the effective degrees of freedom."""
        inverse = torch.cholesky_inverse(self.lower).diagonal()
        parts = split(1 - self.damping * inverse, self.shapes)
        return {name: float(part.sum()) for name, part in parts.items()}


def _indefinite(smallest: float) -> str:
    """What is said of a Hessian that its damping leaves without an inverse; ``smallest`` of its eigenvalues."""
    # Rounded up to two digits, of which λ may be any number above.
    unit = 10.0 ** (math.floor(math.log10(-smallest)) - 1) if smallest < 0 else 0.0
    least = math.ceil(-smallest / unit) * unit if unit else 0.0
    return (
        f"curvature.kind=hessian: with this damping the Hessian is not positive definite (its smallest eigenvalue is "
        f"{smallest:.2g}); set curvature.damping above {least:.2g}, or take curvature.kind=gauss_newton, which has no "
        "negative ones"
    )
