"""Bases filled up to widths that kernels are fast at, and memory that is taken again: what comes out is the same."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import eigh
from torch import Tensor

from raylux import blas, processor
from raylux.blas import add_gram, eigendecomposition
from raylux.blocks import Blocks, FilledBasis
from raylux.curvature import Spectral, add_second_moment
from raylux.engine.solve import Form, solve_layer
from raylux.products import aligned, rotated, rotation
from raylux.scratch import Scratch

DRAW = torch.Generator().manual_seed(0)


def _basis(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=DRAW, dtype=torch.float64))[0].to(dtype)


def _off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_only_odd_widths_in_float32_are_filled() -> None:
    filled = rotation(_basis(21), torch.float32)
    assert isinstance(filled, FilledBasis) and filled.width == 21 and filled.filled.shape == (24, 24)
    assert not filled.filled[21:].any() and not filled.filled[:, 21:].any()
    for basis in (_basis(24), _basis(21, torch.float64), Blocks((_basis(5), _basis(7)))):
        kind = torch.float64 if isinstance(basis, Tensor) and basis.dtype == torch.float64 else torch.float32
        assert rotation(basis, kind) is basis
    assert rotation(None, torch.float32) is None


def test_tokens_are_rotated_as_by_the_basis_itself() -> None:
    basis, x = _basis(21), torch.randn(3, 16, 21, generator=DRAW)
    filled = rotation(basis, torch.float32)
    assert filled is not None
    found = rotated(x, filled)
    assert found.shape == x.shape and _off(found, x @ basis) < 1e-6
    assert torch.equal(rotated(aligned(x), filled), found), "rows that are filled already"


@pytest.mark.parametrize("length", [4, 300])  # tokens are rotated, or gradients
def test_second_moments_are_those_by_the_bases_themselves(length: int) -> None:
    q_a, q_s = _basis(21), _basis(37)
    a, g = torch.randn(3, length, 21, generator=DRAW), torch.randn(3, length, 37, generator=DRAW)
    plain, filled = torch.zeros(37, 21), torch.zeros(37, 21)
    add_second_moment(plain, a, g, q_a, q_s)
    add_second_moment(filled, a, g, rotation(q_a, torch.float32), rotation(q_s, torch.float32))
    assert _off(filled, plain) < 1e-6


@pytest.mark.parametrize("eigen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_queries_are_solved_the_same_in_memory_that_was_used(dtype: torch.dtype, eigen: bool) -> None:
    """Whatever lies in it, and wherever the tokens lie."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scratch, form = Scratch(), Form(dtype, eigen)
    for outputs, inputs in ((37, 21), (16, 43), (8, 8)):
        curvature = Spectral(
            torch.rand(outputs, inputs, generator=DRAW).to(wide), _basis(inputs, wide), _basis(outputs, wide)
        )
        tokens = [
            (torch.randn(n, inputs, generator=DRAW).to(wide), torch.randn(n, outputs, generator=DRAW).to(wide))
            for n in (5, 400, 3)
        ]
        moved = [(_elsewhere(a), _elsewhere(g)) for a, g in tokens]
        alone = solve_layer(curvature, tokens, 0.1, form)
        again = solve_layer(curvature, moved, 0.1, form, scratch=scratch)
        assert torch.equal(again.s_test, alone.s_test) and again.squares == alone.squares
        assert (again.pairs == alone.pairs).all()
        for place, (a, g) in enumerate(tokens):
            wanted = curvature.solve(g.T @ a, 0.1)
            wanted = curvature.into(wanted) if eigen else wanted
            assert _off(alone.s_test[place].to(wide), wanted) < (0.02 if dtype == torch.bfloat16 else 1e-5)
        for held in scratch._held.values():
            held.fill_(torch.nan)


def _elsewhere(x: Tensor) -> Tensor:
    """The same entries where memory is not aligned."""
    found = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x)
    return found.copy_(x)


def test_scratch_gives_the_same_memory_for_the_same_use() -> None:
    scratch = Scratch()
    first = scratch.take("a", (2, 3), torch.float32, "cpu")
    assert scratch.take("a", (5,), torch.float32, "cpu").data_ptr() == first.data_ptr()
    assert scratch.take("b", (5,), torch.float32, "cpu").data_ptr() != first.data_ptr()
    assert scratch.take("a", (5,), torch.float64, "cpu").dtype == torch.float64
    larger = scratch.take("a", (4, 3), torch.float32, "cpu")
    assert larger.shape == (4, 3)
    assert scratch.take("a", (2, 3), torch.float32, "cpu").data_ptr() == larger.data_ptr()


@pytest.mark.parametrize("intel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_either_library_decomposes(intel: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "is_intel", lambda: intel)
    called = []
    monkeypatch.setattr(blas, "eigh", lambda *args, **options: called.append(args) or eigh(*args, **options))
    x = torch.randn(60, 40, generator=DRAW, dtype=torch.float64).to(dtype)
    matrix = x.T @ x
    values, vectors = eigendecomposition(matrix)
    assert bool(called) == (not intel and torch.backends.mkl.is_available())
    assert values.dtype == vectors.dtype == dtype and bool((values.diff() >= 0).all())
    eps = torch.finfo(dtype).eps
    assert _off(vectors * values @ vectors.T, matrix) < 50 * eps
    assert float((vectors.T @ vectors - torch.eye(40)).norm()) < 100 * eps


def test_one_triangle_of_a_gram_matrix_is_added() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(30, 7, generator=DRAW, dtype=dtype)
        total = torch.ones(7, 7, dtype=dtype)
        add_gram(total, x)
        assert torch.allclose(total.tril(), (1 + x.T @ x).tril()) and torch.equal(
            total.triu(1), torch.ones(7, 7, dtype=dtype).triu(1)
        )
