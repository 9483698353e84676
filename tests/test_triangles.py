"""Symmetric matrices by one of their triangles."""

from pathlib import Path

import numpy as np
import pytest
import torch

from raylux.blocks import Blocks, triangle_entries
from raylux.curvature import Covariances
from raylux.engine.shard import FactorShard, ShardSpec
from raylux.store import RunFolder
from raylux.triangles import pack, unpack, unpack_blocks
from tests.simulated import LAYERS


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


def test_a_fit_goes_on_from_a_snapshot_of_both_triangles(tmp_path: Path) -> None:
    """As raylux wrote them before it summed one."""
    store = RunFolder(str(tmp_path))
    drawn = torch.randn(3, 3, dtype=torch.float64)
    total = (drawn + drawn.T).numpy()
    key, _ = store.write("snapshots/covariance/x", {"sum": total})
    groups = {layer.name: layer.name for layer in LAYERS}
    shard = FactorShard(ShardSpec(str(tmp_path), LAYERS, groups, "ekfac", "auto", "float64", 1, "cpu"))
    shard.begin(1, {"A:l0": key}, {"l0": 5, "": 2})
    (written, _, facts) = shard.write_covariances()["A:l0"]
    assert np.array_equal(store.group(written).read("matrix"), total / 5)
    assert facts["mean"] == pytest.approx(np.trace(total) / 15)
