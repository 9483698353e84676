"""What is summed into the two matrices of a layer, before they are decomposed: a choice among Kronecker factors.

- ``tokens``: A = E[a aᵀ], S = E[g gᵀ] over tokens, as if a and g of a token had nothing to do with each other
  (K-FAC, Martens & Grosse 2015).
- ``traced``: A = E[‖g‖² a aᵀ], S = E[‖a‖² g gᵀ] over tokens: each token counts by the trace of the other factor
  (TKFAC, Gao et al. 2020). The two traces are equal, E[‖g‖² ‖a‖²].
- ``sequences``: A = E[GᵀG], S = E[GGᵀ] over the gradients G = Σ_t g_t a_tᵀ of whole sequences (Shampoo, Gupta et al.
  2018; A ⊗ S over their trace is the square of its preconditioner, Morwani et al. 2024). They see how the tokens of a
  sequence add up, which the other two do not.

The last two differ from layer to layer even where layers read the same tensor, so no layers share an A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from raylux.influence.dots import sequence_gradients
from raylux.routed import Routed, Rows

Statistics = Literal["tokens", "traced", "sequences"]


def weighted(
    statistics: Statistics, inputs: Mapping[str, Rows], grads: Mapping[str, Rows], mask: Tensor
) -> tuple[dict[str, Rows], dict[str, Rows], Tensor]:
    """Rows whose sums of outer products are A and S up to a common factor.

    Args:
        statistics: which; other than ``tokens``, ``inputs`` has every layer.
        inputs: input group -> a [N, T, M], zero on padding; an expert's ``Routed``.
        grads: layer -> g [N, T, P], zero on padding.
        mask: [N, T] bool, True on real tokens.

    Returns:
        Rows for A [N, ·, M] and for S [N, ·, P], and a mask by which they are counted.
    """
    if statistics == "tokens":
        return dict(inputs), dict(grads), mask
    if statistics == "traced":
        return (
            {name: _by_norms(inputs[name], g) for name, g in grads.items()},
            {name: _by_norms(g, inputs[name]) for name, g in grads.items()},
            mask,
        )
    formed = {name: sequence_gradients(inputs[name], g) for name, g in grads.items()}
    # One of the mask for each sequence: how many rows stand for it cancels in the trace.
    return dict(formed), {name: gradient.mT for name, gradient in formed.items()}, mask.new_ones(len(mask), 1)


def _by_norms(x: Rows, other: Rows) -> Rows:
    """x with each row by the norm of the same token's row of ``other``."""
    if isinstance(x, Routed):
        assert isinstance(other, Routed)
        return x.over(_by_norms_of(x.rows, other.rows))
    assert not isinstance(other, Routed)
    return _by_norms_of(x, other)


def _by_norms_of(x: Tensor, other: Tensor) -> Tensor:
    return x * other.norm(dim=-1, keepdim=True)
