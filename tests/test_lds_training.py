"""What SOURCE and TrackStar are told of the study's training, and which methods it compares."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from jobs.lds import compared, segments
from jobs.lds.study import Settings, Study
from jobs.lds.trained import Checkpoint, train
from tests import reference

SMALL = Settings(train=24, queries=3, subsets=4, repeats=1, vocabulary=300, layers=1, width=16, epochs=3)


@pytest.fixture(scope="module")
def study() -> Study:
    torch.set_num_threads(1)
    return Study.of(SMALL)


@pytest.fixture(scope="module")
def trained(study: Study) -> tuple[list[Checkpoint], list[tuple[float, torch.Tensor]]]:
    """The checkpoints, and of each step its learning rate and its gradient of one layer, as the optimizer has them."""
    seen = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        # The first matrix of this shape is gate_proj's; vocabulary and attention have others.
        group = optimizer.param_groups[0]
        (first, *_rest) = (p for p in group["params"] if tuple(p.shape) == (32, 16))
        seen.append((float(group["lr"]), first.grad.double().clone()))

    handle = register_optimizer_step_pre_hook(look)
    try:
        return train(study), seen
    finally:
        handle.remove()


def test_what_the_optimizer_had_is_read_after_each_epoch(
    trained: tuple[list[Checkpoint], list[tuple[float, torch.Tensor]]],
) -> None:
    points, steps = trained
    assert len(points) == SMALL.epochs and len(steps) % SMALL.epochs == 0
    each = len(steps) // SMALL.epochs
    moment = torch.zeros(32, 16, dtype=torch.float64)
    for step, (_, gradient) in enumerate(steps, start=1):
        moment = 0.99 * moment + 0.01 * gradient**2
        if step % each == 0:
            point = points[step // each - 1]
            assert point.spent == pytest.approx(sum(rate for rate, _ in steps[:step]))
            assert point.rate == steps[step - 1][0]
            wanted = moment / (1 - 0.99**step)
            assert reference.difference(point.moments["model.layers.0.mlp.gate_proj"], wanted) < 1e-4
    before, after = (point.model.get_submodule("model.layers.0.mlp.up_proj").weight for point in points[1:])
    assert not torch.equal(before, after), "each is a copy"


def test_segments_share_out_the_whole_training(
    study: Study, trained: tuple[list[Checkpoint], list[tuple[float, torch.Tensor]]]
) -> None:
    points, _ = trained
    assert segments.bounds(12) == [4, 8, 12] and segments.bounds(3) == [1, 2, 3] and segments.bounds(1) == [1]
    tokens = np.mean([len(row.tokens) - 1 for row in study.rows])
    plain = segments.lengths(study, points, adapted=False)
    assert sum(plain) * tokens == pytest.approx(points[-1].spent)
    weights = [torch.cat([v.flatten().double() for v in point.moments.values()]) for point in points]
    wanted = [length / float(v.mean()) ** 0.5 for length, v in zip(plain, weights, strict=True)]
    assert segments.lengths(study, points, adapted=True) == pytest.approx(wanted)


def test_without_the_peer_its_row_is_left_out(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (compared.PEER in compared._makers(study, tmp_path)) == compared.peer.is_installed()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names = compared._makers(study, tmp_path)
    assert compared.PEER not in names and {"SOURCE", "TrackStar, 16", "ekfac, pcg", "bm25"} <= set(names)


def test_what_a_method_took_is_kept_with_its_scores(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is trained for what is there."""
    calls: list[str] = []

    def trained(study: Study) -> list[Checkpoint]:
        calls.append("train")
        return []

    def make(name: str, epochs: Sequence[Checkpoint]) -> np.ndarray:
        calls.append(name)
        return np.full((2, 3), float(len(name)))

    makers = {name: (f"what {name} is", partial(make, name)) for name in ("ekfac", "ekfac, pcg")}
    monkeypatch.setattr(compared, "train", trained)
    monkeypatch.setattr(compared, "_makers", lambda study, folder: makers)
    first, again = (compared.all_methods(study, tmp_path) for _ in range(2))
    assert calls == ["train", "ekfac", "ekfac, pcg"]
    for one, other in zip(first, again, strict=True):
        assert (one.scores == other.scores).all() and one.seconds == other.seconds
    assert [(one.name, one.what) for one in again] == [(name, what) for name, (what, _) in makers.items()]
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {"ekfac.npz", "ekfac-pcg.npz"}
