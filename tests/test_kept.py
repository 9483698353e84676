"""What a worker keeps on its disk: what was put comes back, up to the limit, and nothing of it outlives the worker."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raylux.engine.kept import Kept, Resting


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 3), "g": (5, 2)}
    return {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def read(kept: Kept, key: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor] | None:
    into = {name: torch.empty(shape, dtype=dtype) for name, shape in kept.shapes(key).items()}
    return into if kept.read(key, into) else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_was_put_comes_back(dtype: torch.dtype) -> None:
    kept = Kept(1 << 20)
    for key in range(5):
        kept.put(("fit", key), tensors(key, dtype))
    for key in (3, 0, 4, 3):
        found = read(kept, ("fit", key), dtype)
        assert found is not None and all(torch.equal(found[name], x) for name, x in tensors(key, dtype).items())
    assert ("fit", 5) not in kept and not kept.read(("fit", 5), {})


def test_what_is_kept_in_one_precision_is_not_there_in_another() -> None:
    kept = Kept(1 << 20)
    kept.put(0, {**tensors(0, torch.bfloat16), "a": tensors(0)["a"]})
    assert kept.names(0, torch.bfloat16) == ["g"] and kept.names(0, torch.float32) == ["a"]
    assert not kept.names(0, torch.float64) and not kept.names(1, torch.float32)


def test_up_to_the_limit() -> None:
    one = sum(x.numel() * x.element_size() for x in tensors(0).values())
    kept = Kept(2 * one + 1)
    for key in range(4):
        kept.put(key, tensors(key))
    assert [key in kept for key in range(4)] == [True, True, False, False]
    kept.put(0, tensors(9))
    found = read(kept, 0)
    assert found is not None and torch.equal(found["a"], tensors(0)["a"]), "the first stays"


def test_a_full_disk_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(1 << 20)
    kept.put(0, tensors(0))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "pwrite", full)
    kept.put(1, tensors(1))
    monkeypatch.undo()
    assert 1 not in kept and read(kept, 0) is not None
    kept.put(2, tensors(2))
    found = read(kept, 2)
    assert found is not None and torch.equal(found["g"], tensors(2)["g"])


def test_the_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = Kept(None)
    kept.put(0, tensors(0))
    assert list(tmp_path.iterdir()) == [] and read(kept, 0) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rests_is_read_when_it_is_asked_for(dtype: torch.dtype) -> None:
    resting = Resting()
    kept = [torch.randn(3, size, generator=torch.Generator().manual_seed(size)).to(dtype) for size in (1000, 1, 5000)]
    held = [resting.hold(x) for x in kept]
    for place in (2, 0, 1, 0):
        found = held[place]()
        assert found.dtype is dtype and torch.equal(found, kept[place])
        assert found.data_ptr() % 64 == 0


def test_what_finds_no_room_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    x = torch.randn(2, 5)
    monkeypatch.setattr(os, "pwrite", full)
    held, wanted = Resting().hold(x), x.clone()
    x.fill_(torch.nan)  # its memory may be written over, as if it had found room
    assert torch.equal(held(), wanted) and held() is held()
