"""Eigenbases of which the leading vectors are computed in float64 and the rest in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raylux.blas import eigendecomposition
from raylux.blocks import Blocks
from raylux.curvature import eigenbases, eigenbasis, square_eigenbasis
from tests import reference

N = 520


def _matrix(values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One with these eigenvalues (ascending), and its eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return vectors * values @ vectors.T, vectors


def _angles(found: Tensor, wanted: Tensor) -> Tensor:
    """1 − |cos| between the columns."""
    return 1 - (found * wanted).sum(0).abs()


# Like what gradients have: λ_i ~ i^-2.5, from 1 to 1e-7.
FALLING = torch.arange(N, 0, -1, dtype=torch.float64) ** -2.5


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
def test_small_eigenvectors_are_found_where_float32_alone_mixes_them(scale: float) -> None:
    matrix, wanted = _matrix(FALLING * scale)
    values, vectors = eigenbasis(matrix, "S", quick=True)
    assert values.dtype == vectors.dtype == torch.float64
    assert reference.difference(vectors @ torch.diag(values) @ vectors.T, matrix) <= 3e-6
    assert reference.difference(vectors.T @ vectors, torch.eye(N).double()) <= 1e-4
    plain = torch.linalg.eigh((matrix / scale).float()).eigenvectors.double()
    for share in (0.3, 0.5):  # of the vectors, from the smallest
        few = slice(0, int(share * N))
        assert _angles(vectors, wanted)[few].median() < 1e-2 * _angles(plain, wanted)[few].median()
    assert _angles(vectors, wanted)[N // 2 :].max() <= 1e-6
    assert ((values - FALLING * scale).abs() <= 1e-9 * scale).all()


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(N),
        torch.ones(N),
        torch.cat([torch.zeros(N - 5), torch.ones(5)]),
        torch.cat([torch.zeros(N - 40), torch.arange(1, 41) ** 4.0]),
        torch.linspace(1, 1.5, N),
        torch.cat([torch.linspace(1e-7, 1e-6, N - 1), torch.ones(1)]),
    ],
    ids=["zero", "identity", "rank 5", "rank 40", "nothing leads", "one leads"],
)
def test_of_any_spectrum_it_is_an_eigenbasis(values: Tensor) -> None:
    matrix, _ = _matrix(values.double())
    found, vectors = eigenbasis(matrix, "A", quick=True)
    assert bool((found >= 0).all()) and bool((found.diff() >= -1e-5 * found[-1]).all())
    assert reference.difference(vectors.T @ vectors, torch.eye(N).double()) <= 1e-4
    off = (vectors @ torch.diag(found) @ vectors.T - matrix).norm()
    assert float(off) <= 1e-5 * float(matrix.norm())


def test_what_fails_the_check_and_what_is_small_is_done_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, _ = _matrix(FALLING)
    rounded = []

    def spoilt(given: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigendecomposition(given)
        if given.dtype != torch.float32:
            return values, vectors
        rounded.append(len(given))
        return values, vectors * 1.001

    monkeypatch.setattr(eigenbases, "eigendecomposition", spoilt)
    values, vectors = eigenbasis(matrix, "A", quick=True)
    assert len(rounded) == 1 and 400 < rounded[0] < N
    assert reference.difference(vectors @ torch.diag(values) @ vectors.T, matrix) <= 1e-12
    eigenbasis(matrix[:400, :400], "A", quick=True)
    eigenbasis(matrix, "A")
    assert len(rounded) == 1


def test_blocks_are_decomposed_each_by_itself() -> None:
    parts = tuple(_matrix(FALLING, seed)[0] for seed in range(2))
    values, basis = square_eigenbasis(Blocks(parts), "S", quick=True)
    assert isinstance(basis, Blocks)
    for place, part in enumerate(parts):
        alone = eigenbasis(part, "S", quick=True)
        assert torch.equal(values.view(2, N)[place], alone[0]) and torch.equal(basis.parts[place], alone[1])
