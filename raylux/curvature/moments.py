"""Second moments of per-sequence gradients in a basis: the eigenvalue correction Λ of EK-FAC.

George et al. 2018; Grosse et al. 2023, eq. 18-21 with the transposes put right: the gradient of a sequence
is G = Σ_t g_t a_tᵀ (tokens summed before squaring) and its coordinates in the Kronecker eigenbasis are
Q_Sᵀ G Q_A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import overload

import torch
from torch import Tensor

from raylux.blocks import Blocks, FilledBasis, Rotation
from raylux.cost.contraction import rotate_tokens_first
from raylux.products import aligned, aligned_width, gradients_into, rotated
from raylux.profiling import of
from raylux.routed import Routed, Rows, row_count, sequence_parts, width

# Of formed gradients, that are held on a GPU at a time.
_GPU_ENTRIES = 1 << 28


def add_second_moment(total: Tensor, a: Tensor, g: Tensor, q_a: Rotation | None, q_s: Rotation | None) -> None:
    """``total`` [P, M] += Σ_n (Q_Sᵀ G_n Q_A)², elementwise.

    Args:
        total: running sum [P, M], in float32 or better.
        a: [N, T, M], zero on padding; its dtype is that of the products.
        g: [N, T, P].
        q_a: [M, M] or None for the standard basis.
        q_s: [P, P] or None for the standard basis.
    """
    for turned in in_basis(a, g, q_a, q_s):
        with of("square"):
            _add_squares(total, turned)


def in_basis(a: Tensor, g: Tensor, q_a: Rotation | None, q_s: Rotation | None) -> Iterator[Tensor]:
    """Q_Sᵀ G_n Q_A of sequences, a few at a time: [n, P, M], which may be overwritten and is valid until the next.

    Tokens are rotated before the gradient is formed, or the gradient after, whichever costs less.

    Args:
        a: [N, T, M], zero on padding; its dtype is that of the products.
        g: [N, T, P].
        q_a: [M, M] or None for the standard basis.
        q_s: [P, P] or None for the standard basis.
    """
    if rotate_tokens_first(a.shape[1], g.shape[2], a.shape[2]):
        a, g = rotate(a, q_a), rotate(g, q_s)
        q_a = q_s = None
    outputs, inputs = g.shape[2], a.shape[2]
    # One sequence at a time: its gradient is read while it is still in the processor's cache. A GPU has no such cache,
    # and wants many.
    size = max(1, min(len(a), _GPU_ENTRIES // (outputs * inputs))) if a.is_cuda else 1
    gradients = torch.empty(size, outputs, aligned_width(inputs, a.dtype, a.device), dtype=a.dtype, device=a.device)
    a = aligned(a)
    for start in range(0, len(a), size):
        some = slice(start, min(start + size, len(a)))
        formed = gradients[: some.stop - start]
        with of("form"):
            gradients_into(a[some], g[some], formed)
        with of("rotate"):
            turned = formed if len(formed) > 1 else formed[0]
            if isinstance(q_s, Tensor | Blocks):
                turned = q_s.T @ turned
            elif q_s is not None:
                turned = rotated(turned.mT, q_s).mT
            if not isinstance(q_a, FilledBasis):
                turned = turned[..., :inputs]
            turned = turned if q_a is None else rotated(turned, q_a)
        yield turned if turned.dim() == 3 else turned[None]


def _add_squares(total: Tensor, gradients: Tensor) -> None:
    """``total`` [P, M] += Σ_n gradients_n², one after the other; ``gradients`` [N, P, M] may be overwritten."""
    for gradient in gradients:
        if gradient.dtype == total.dtype or gradient.is_cuda:
            total.addcmul_(gradient, gradient)
        else:
            total.add_(gradient.square_())


Basis = tuple[Rotation | None, Rotation | None]
"""(Q_A [M, M], Q_S [P, P]) of a layer; None: the standard basis."""


def add_second_moments(
    totals: Mapping[str, Tensor],
    inputs: Mapping[str, Rows],
    grads: Mapping[str, Rows],
    groups: Mapping[str, str],
    bases: Mapping[str, Basis],
    turned: Callable[[Mapping[str, Rows]], None] | None = None,
) -> None:
    """``add_second_moment`` for every layer; layers of one input group share the rotation of their inputs.

    A sequence of which no token was routed to an expert adds zeros to its sum, and counts. ``turned`` is told of the
    inputs of each group whose tokens are rotated, as they are in the eigenbasis.
    """
    group = ""
    a: Rows | None = None
    a_turned: Rows | None = None
    for name, g in grads.items():
        q_a, q_s = bases[name]
        if a is None or group != groups[name]:
            group, a_turned = groups[name], None
            a = inputs[group]
        own = a
        if rotate_tokens_first(row_count(a), width(g), width(a)):
            if a_turned is None:
                a_turned = rotate(a, q_a)
                if turned is not None and q_a is not None:
                    turned({group: a_turned})
            own, g, q_a, q_s = a_turned, rotate(g, q_s), None, None
        for _, own_a, own_g in sequence_parts(own, g):
            add_second_moment(totals[name], own_a, own_g, q_a, q_s)


@overload
def rotate(x: Tensor, basis: Rotation | None) -> Tensor: ...
@overload
def rotate(x: Rows, basis: Rotation | None) -> Rows: ...


def rotate(x: Rows, basis: Rotation | None) -> Rows:
    """Tokens in a basis: x [N, T, D] Q [D, D]; an expert's one sequence after the other, for the bits' sake."""
    if basis is None:
        return x
    with of("rotate"):
        if isinstance(x, Routed):
            turned = [rotated(own, basis) for own in x.rows.split(x.sizes) if len(own)]
            return x.over(torch.cat(turned)) if turned else x
        return rotated(x, basis)
