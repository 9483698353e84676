"""scipy's BLAS and LAPACK, for what torch has no routine or a slower one, on as many threads as torch's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from scipy.linalg import LinAlgError, blas, eigh
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]
from torch import Tensor

from raylux import processor


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add xᵀx of rows x [·, n] on a CPU: the lower triangle of ``total`` [n, n] alone, which is half the work."""
    update: Any = blas.dsyrk if rows.dtype == torch.float64 else blas.ssyrk
    # Column-major for BLAS: the transposes of both, without a copy.
    with _as_many_threads():
        update(1.0, rows.contiguous().numpy().T, beta=1.0, c=total.numpy().T, overwrite_c=1)


def eigendecomposition(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors in columns of a symmetric matrix, by the library that is quicker.

    torch has Intel's library, whose LAPACK takes its plainest path on other makers' processors: of n = 2,049 in
    float32, 0.66 s where OpenBLAS takes 0.57; of n = 1,025 in float64 0.19 s and 0.14 (a Zen with AVX-512; with AVX2 it
    is much the same).

    Raises:
        torch.linalg.LinAlgError: it does not converge.
    """
    if matrix.device.type != "cpu" or not torch.backends.mkl.is_available() or processor.is_intel():
        return torch.linalg.eigh(matrix)
    try:
        with _as_many_threads():
            values, vectors = eigh(matrix.numpy(), driver="evd", check_finite=False)
    except LinAlgError as error:
        raise torch.linalg.LinAlgError(str(error)) from None
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _as_many_threads() -> AbstractContextManager[Any]:
    limited: AbstractContextManager[Any] = _controller().limit(limits=torch.get_num_threads(), user_api="blas")
    return limited


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
