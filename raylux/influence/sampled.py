"""Products of chosen pairs of sequences and queries: PyTorch's sampled products, of short pieces of both."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

PIECE = 1024
"""Entries that a product takes at a time: those of all sequences stay in the processor's cache."""


def no_scores(chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros at the pairs that are ``chosen`` [N, Q], as sparse rows [Q, N]."""
    with warnings.catch_warnings():
        # PyTorch's sparse rows are "in beta state".
        warnings.simplefilter("ignore", UserWarning)
        return chosen.T.to(dtype).to_sparse_csr() * 0


def sampled(scores: Tensor, queries: Tensor, gradients: Tensor) -> Tensor:
    """Sparse ``scores`` [Q, N] and, at the pairs that they have, products of queries [Q, n] with gradients [N, n]."""
    return torch.sparse.sampled_addmm(scores, queries, gradients.T)
