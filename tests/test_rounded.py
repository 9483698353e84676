"""Bases rounded to bf16 whose leading vectors are kept in full."""

from __future__ import annotations

import pytest
import torch

from raylux.blocks import Blocks, RoundedBasis, Square
from raylux.curvature import Spectral, add_second_moment
from raylux.engine.solve import Form, solve_layer
from raylux.influence.dots import sequence_gradients
from raylux.products import rotated

DRAW = torch.Generator().manual_seed(0)


def orthonormal(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=DRAW, dtype=torch.float64))[0].float()


def steep_tokens(count: int, basis: torch.Tensor) -> torch.Tensor:
    """Tokens whose coordinates in the last eight basis vectors are 300 times the others, and share a sign."""
    scales = torch.where(torch.arange(len(basis)) < len(basis) - 8, 1 / 300, 1.0)
    return (1 + torch.rand(count, len(basis), generator=DRAW)) * scales @ basis.T


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest error of a column, relative to that column."""
    return float(((found.float() - wanted).norm(dim=0) / wanted.norm(dim=0)).max())


@pytest.mark.parametrize("sizes", [(96,), (40, 56), (5, 91)], ids=str)
def test_small_coordinates_keep_their_digits_beside_large_ones(sizes: tuple[int, ...]) -> None:
    """Summed over tokens that all point one way, as a mean of activations does."""
    parts = tuple(orthonormal(size) for size in sizes)
    basis: Square = parts[0] if len(parts) == 1 else Blocks(parts)
    tokens = torch.cat([steep_tokens(512, part) for part in parts], 1)
    wanted = rotated(tokens, basis)
    plain = rotated(tokens.bfloat16(), basis.to(torch.bfloat16))
    found = rotated(tokens.bfloat16(), RoundedBasis.of(basis, torch.bfloat16))
    assert found.dtype == torch.bfloat16 and found.shape == tokens.shape
    sums = [x.float().sum(0, keepdim=True) for x in (found, plain, wanted)]
    assert off(sums[0], sums[2]) < min(0.1, off(sums[1], sums[2]) / 5)
    for part, end in zip(parts, torch.tensor(sizes).cumsum(0).tolist(), strict=True):
        few = slice(end - min(8, len(part)), end)
        assert off(found[:, few], wanted[:, few]) < 0.01


def test_second_moments_take_either_way_with_a_rounded_basis() -> None:
    """A formed gradient is rotated by such bases too, where the sequence is long."""
    q_a, q_s = orthonormal(24), orthonormal(40)
    for length in (8, 300):
        a, g = torch.randn(3, length, 24, generator=DRAW), torch.randn(3, length, 40, generator=DRAW)
        exact, found = torch.zeros(40, 24), torch.zeros(40, 24)
        add_second_moment(exact, a, g, q_a, q_s)
        rounded = (RoundedBasis.of(basis, torch.bfloat16) for basis in (q_a, q_s))
        add_second_moment(found, a.bfloat16(), g.bfloat16(), *rounded)
        assert float((found - exact).norm() / exact.norm()) < 0.02


def test_s_test_of_steep_queries_is_near_that_in_full_precision() -> None:
    q_a, q_s = orthonormal(160), orthonormal(200)
    tokens = [(steep_tokens(length, q_a), steep_tokens(length, q_s)) for length in (20, 33, 1)]
    values = torch.rand(200, 160, generator=DRAW) * 1e-3
    curvature = Spectral(values, q_a, q_s)
    damping = curvature.damping("auto")
    for eigen in (True, False):
        exact, found = (
            solve_layer(curvature, tokens, damping, Form(dtype, eigen)) for dtype in (torch.float32, torch.bfloat16)
        )
        for place, (a, g) in enumerate(tokens):
            wanted = curvature.into(sequence_gradients(a[None], g[None])[0]) / (values + damping)
            wanted = wanted if eigen else curvature.back(wanted)
            assert torch.allclose(exact.s_test[place], wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
            assert float((found.s_test[place].float() - wanted).norm() / wanted.norm()) < 0.01
        assert exact.squares == pytest.approx(found.squares, rel=0.01)
        assert found.pairs[1] == pytest.approx(found.pairs[0], rel=0.02)
        assert exact.pairs[1] == pytest.approx(exact.pairs[0], rel=1e-4)
        assert exact.pairs[0] == pytest.approx(found.pairs[0], rel=1e-6)
