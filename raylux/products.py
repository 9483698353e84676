"""Matrix products as a GPU wants them: one kernel for a batch, bf16 operands with float32 sums.

On a CPU the same products are taken a sequence at a time, where a result is still in the cache. What decides is the
device a tensor lies on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raylux.blocks import Blocks, FilledBasis, Rotation, RoundedBasis, Square
from raylux.scratch import Scratch

# Since torch 2.8, on CUDA alone.
_WIDENS = "out_dtype" in (torch.mm.__doc__ or "")


# Entries of a row that fast kernels take together. In bf16 on a GPU a width of 1025, a bias beside 1024 inputs, costs
# five times as much as one of 1032; in float32 on a CPU (AVX2) gradients are formed in rows of 513 at 47 GFLOP/s, in
# rows of 520 at 62, and 1,024 tokens are rotated in 2,049 dimensions at 55, in 2,056 at 75. In bf16 on a CPU (AMX)
# there was no gain to be seen.
_WIDTH = 8
_FILLED = {("cuda", torch.bfloat16), ("cpu", torch.float32)}


def aligned_width(width: int, dtype: torch.dtype, device: torch.device) -> int:
    """The width to which rows of a gradient are filled up with zeros: the next multiple of 8 where that pays."""
    return width + (-width % _WIDTH if (device.type, dtype) in _FILLED else 0)


def aligned(x: Tensor) -> Tensor:
    """x [..., D] with zeros behind each row up to its ``aligned_width``."""
    more = aligned_width(x.shape[-1], x.dtype, x.device) - x.shape[-1]
    return torch.nn.functional.pad(x, (0, more)) if more else x


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


def rotation(
    basis: Square | None, dtype: torch.dtype, scratch: Scratch | None = None, use: str = "basis"
) -> Rotation | None:
    """A basis in full precision, for products of ``dtype``; ``scratch``: memory to fill it up in, by ``use``."""
    if basis is None:
        return None
    if dtype == torch.bfloat16:
        return RoundedBasis.of(basis, dtype)
    if isinstance(basis, Blocks):
        return basis
    width = aligned_width(len(basis), basis.dtype, basis.device)
    if width == len(basis):
        return basis
    into = scratch.take(use, (width, width), basis.dtype, basis.device) if scratch else None
    return FilledBasis.of(basis, width, into)


def rotated(x: Tensor, basis: Rotation) -> Tensor:
    """x [..., D] Q [D, D], in the precision of Q; rows of x may be filled up to their ``aligned_width``, where Q is."""
    if isinstance(basis, RoundedBasis):
        return _rotated_by_rounded(x, basis)
    if isinstance(basis, FilledBasis):
        return _rotated_by_filled(x, basis.filled, basis.width)
    if isinstance(basis, Blocks):
        parts = zip(x.split(basis.sizes, -1), basis.parts, strict=True)
        return torch.cat([rotated(part, own) for part, own in parts], -1)
    width = x.shape[-1]
    # A basis in float32 on a CPU would be filled up anew for each product: who has many takes a ``FilledBasis``.
    more = 0 if x.dtype == torch.float32 else aligned_width(width, x.dtype, x.device) - width
    if not more:
        return (x.reshape(-1, width) @ basis).view_as(x)
    return _rotated_by_filled(x, torch.nn.functional.pad(basis, (0, more, 0, more)), width)


def _rotated_by_filled(x: Tensor, filled: Tensor, width: int) -> Tensor:
    own = x if x.shape[-1] == len(filled) else torch.nn.functional.pad(x, (0, len(filled) - width))
    return (own.reshape(-1, len(filled)) @ filled).view(own.shape)[..., :width]


def _rotated_by_rounded(x: Tensor, basis: RoundedBasis) -> Tensor:
    some = basis.leaks[0]
    turned = rotated(x.reshape(-1, x.shape[-1]).to(some.dtype), basis.rounded)
    for part, leaks in zip(turned.split([own.shape[1] for own in basis.leaks], 1), basis.leaks, strict=True):
        part.addmm_(part[:, -len(leaks) :].clone(), leaks, alpha=-1)
    return turned.view(x.shape)


def wide_product(x: Tensor, y: Tensor) -> Tensor:
    """x [m, k] y [k, n]; on a GPU the product of bf16 operands comes in float32, its sums never rounded to bf16."""
    if x.dtype != torch.bfloat16 or not x.is_cuda:
        return x @ y
    return torch.mm(x, y, out_dtype=torch.float32) if _WIDENS else x.float() @ y.float()
