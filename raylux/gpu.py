"""How torch is to compute on a GPU: in the precision that a dtype says, and to the same bits each time.

Both are switches of the whole process, so they are set for a stretch and put back. On a CPU nothing is touched.
And the way from a GPU to the host.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Bytes from which on pinned memory is worth its while.
_LARGE = 1 << 20


@contextlib.contextmanager
def pinned(device: str) -> Iterator[None]:
    """While open, a product on a GPU has the precision its dtype says, whatever the process has set.

    float32 is float32, not TF32, which has 10 bits of mantissa in place of 23; and the partial sums of a bf16 product
    are added in float32.
    """
    if device != "cuda":
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    # torch 2.9 named it anew, and raises where both names are used.
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    reduced = "allow_bf16_reduced_precision_reduction"
    before = {each: getattr(matmul, each) for each in (name, reduced)}
    setattr(matmul, name, exact)
    setattr(matmul, reduced, False)
    try:
        yield
    finally:
        for each, value in before.items():
            setattr(matmul, each, value)


@contextlib.contextmanager
def repeatable(device: str) -> Iterator[None]:
    """While open, operations on a GPU give the same bits each time; the backward pass of attention else does not.

    Raises:
        RuntimeError: by torch, where an operation has no such kernel; ``is_unrepeatable`` knows it.
    """
    if device != "cuda":
        yield
        return
    # torch asks for it before cuBLAS runs; as large as the workspace that torch takes by itself on a Hopper.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filling: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), filling.fill_uninitialized_memory
    # Only to warn would leave attention as it is.
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        filling.fill_uninitialized_memory = before[1]


def is_unrepeatable(error: RuntimeError) -> bool:
    """Whether torch refused an operation because it has no kernel that repeats its bits."""
    return "deterministic" in str(error)


def to_host(x: Tensor) -> Tensor:
    """x on the CPU. Large ones come into pinned memory, which torch keeps and uses again: fresh memory takes longer
    to be had than to be filled.
    """
    x = x.detach()
    if not x.is_cuda or x.numel() * x.element_size() < _LARGE:
        return x.cpu()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
