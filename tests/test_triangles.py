"""Symmetric matrices by one of their triangles."""

import numpy as np
import pytest
import torch

from raylux.blocks import Blocks
from raylux.curvature import Covariances
from raylux.triangles import pack, triangle_entries, unpack, unpack_blocks


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 33])
def test_a_triangle_is_the_lower_one_and_gives_the_matrix_back(size: int) -> None:
    drawn = torch.randn(size, size, dtype=torch.float64)
    packed = pack(drawn)
    assert len(packed) == size * (size + 1) // 2
    rows, columns = np.tril_indices(size)
    assert sorted(packed.tolist()) == sorted(drawn.numpy()[rows, columns].tolist())
    assert torch.equal(unpack(packed, size), drawn.tril() + drawn.tril(-1).T)


def test_blocks_follow_one_another() -> None:
    blocks = [x + x.T for x in (torch.randn(n, n, dtype=torch.float64) for n in (3, 2))]
    packed = torch.cat([pack(block) for block in blocks])
    assert len(packed) == triangle_entries([3, 2])
    found = unpack_blocks(packed, [3, 2])
    assert isinstance(found, Blocks)
    assert all(torch.equal(one, other) for one, other in zip(found.parts, blocks, strict=True))


@pytest.mark.parametrize("blocks", [1, 3])
def test_sums_as_triangles_are_the_sums(blocks: int) -> None:
    """Bit for bit, and in blocks."""
    sums, whole = Covariances(blocks=blocks), Covariances(blocks=blocks)
    a, g = torch.randn(4, 5, 11, dtype=torch.float64), torch.randn(4, 5, 8, dtype=torch.float64)
    for each in (sums, whole):
        each.add({"l": a}, {"l": g}, torch.ones(4, 5, dtype=torch.bool))
    for triangles, full, width in zip(sums.triangles(), (whole.inputs, whole.grads), (11, 8), strict=True):
        sizes = [len(part) for part in torch.arange(width).tensor_split(blocks)]
        found = unpack_blocks(triangles["l"], sizes)
        assert torch.equal(found.flat() if isinstance(found, Blocks) else found, full["l"])
