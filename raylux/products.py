"""Matrix products as a GPU wants them: one kernel for a batch, bf16 operands with float32 sums.

On a CPU the same products are taken a sequence at a time, where a result is still in the cache. What decides is the
device a tensor lies on, so the bits of a CPU run do not know of this module.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Since torch 2.8, on CUDA alone.
_WIDENS = "out_dtype" in (torch.mm.__doc__ or "")


def gradients_into(a: Tensor, g: Tensor, out: Tensor, batched: bool | None = None) -> None:
    """G_n = Σ_t g_t a_tᵀ of each sequence.

    Args:
        a: [N, T, M].
        g: [N, T, P].
        out: [N, P, M], is overwritten; in the dtype of a and g.
        batched: one product for all; None: on a GPU. Otherwise one by one, since on a CPU a sequence's gradient would
            depend on how many stand in its batch. On a GPU the batch's shape chooses the kernel, and is a function of
            the sequence's own length (``score_batches``) or of its fit unit.
    """
    if a.is_cuda if batched is None else batched:
        torch.bmm(g.mT, a, out=out)
        return
    for n in range(len(a)):
        torch.mm(g[n].T, a[n], out=out[n])


def wide_product(x: Tensor, y: Tensor) -> Tensor:
    """x [m, k] y [k, n]; on a GPU the product of bf16 operands comes in float32, its sums never rounded to bf16."""
    if x.dtype != torch.bfloat16 or not x.is_cuda:
        return x @ y
    return torch.mm(x, y, out_dtype=torch.float32) if _WIDENS else x.float() @ y.float()
