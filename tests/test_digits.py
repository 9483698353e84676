"""The studies on handwritten digits in short form: predicted removals against fits and training without the point."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from jobs import fragility, leave_one_out, pbrf
from jobs.digits import depths, gaps, removals
from jobs.digits.data import CLASSES, Digits
from jobs.digits.training import Sgd, forward, network, states_of, train


def test_leave_one_out(tmp_path: Path) -> None:
    settings = removals.Settings(train=200, penalty=1e-2, questions=1, removed=6, seeds=1)
    found = removals.study(settings, 7, tmp_path)
    exact = next(iter(removals.ESTIMATORS))
    assert removals.correlations([found], exact).min() >= 0.99
    # A whole point of so few is no small step, and removals do more than first order says.
    assert 1 < removals.slopes([found], exact).min() < 1.5
    assert removals.correlations([found], "gradient dot product").max() < removals.correlations([found], exact).min()
    text = leave_one_out.page(settings, [found], "command")
    assert "6 pairs" in text and "**met**" in text


def test_a_fit_ends_where_the_gradient_vanishes() -> None:
    digits, leave = Digits.split(3, 120), 5
    found = removals.newton(digits, torch.zeros(CLASSES, 65, dtype=torch.float64), 1e-2, leave=leave)
    weights = found.clone().requires_grad_(True)
    x = torch.cat([digits.x, torch.ones(120, 1, dtype=torch.float64)], 1)
    losses = nn.functional.cross_entropy(x @ weights.T, digits.y, reduction="none")
    kept = torch.arange(120) != leave
    (losses[kept].sum() / 120 + 0.005 * weights.square().sum()).backward()
    assert weights.grad is not None and weights.grad.norm() < 1e-10


def test_networks_trained_together_are_those_trained_alone() -> None:
    digits, out = Digits.split(3, 40), [-1, 7, 9]
    model, sgd = network(6, 1, depth=3), Sgd(0.1, batch=8, decay=0.2)
    together = train(states_of(model, 3), digits.x, digits.y, torch.tensor(out), 2, 4, sgd, first=1, pull=0.1)
    for place, leave in enumerate(out):
        own = network(6, 1, depth=3)
        begun = [p.detach().clone() for p in own.parameters()]
        search = torch.optim.SGD(own.parameters(), 0.1, 0.9, weight_decay=0.2)
        for epoch in (1, 2):
            order = torch.randperm(40, generator=torch.Generator().manual_seed(4_000_012 + epoch))
            for rows in order.split(8):
                search.zero_grad()
                losses = nn.functional.cross_entropy(own(digits.x[rows]), digits.y[rows], reduction="none")
                near = sum((p - s).square().sum() for p, s in zip(own.parameters(), begun, strict=True))
                (losses[rows != leave].sum() / 8 + 0.05 * near).backward()
                search.step()
        assert torch.allclose(forward(together, digits.test_x)[place], own(digits.test_x), atol=1e-12)


def test_what_influence_predicts(tmp_path: Path) -> None:
    settings = gaps.Settings(train=100, hidden=8, epochs=8, rate=0.1, damping=0.1, questions=3, removed=8, linearised=2)
    found = gaps.study(settings, 5, tmp_path)
    pearson, spearman = found.correlation("proximal optimum")
    assert spearman >= 0.9 and pearson >= 0.95 and found.optima < 1e-2
    assert spearman > found.correlation("cold, seeds of their own")[1] + 0.3
    assert all(values.shape == (3, 8) for values in found.measured.values())
    assert found.distances["that to its linearisation"] < 0.1 * found.distances["proximity to proximal Bregman optimum"]
    assert found.distances["exact to truncated solve"] < 0.1 * found.distances["that to its linearisation"]
    text = pbrf.page(settings, [found], "command")
    assert all(truth in text for truth in gaps.TRUTHS) and all(gap in text for gap in gaps.GAPS)


def test_depth_and_weight_decay(tmp_path: Path) -> None:
    """The points that influence names do what it says in a shallow network that goes on without them."""
    settings = depths.Settings(train=60, hidden=8, epochs=16, damping=0.1, questions=2, removed=6, seeds=1)
    found = [depths.cell(settings, depth, 1e-2, 5, tmp_path / str(depth)) for depth in (1, 3)]
    assert all(len(own) == 2 for one in found for own in one.correlation.values())
    assert min(found[0].correlation[depths.WARM]) >= 0.8
    text = fragility.page(settings, found, "command")
    assert "| 1 | 0.01 |" in text and "| depth 3 |" in text and "| weight decay 0.01 |" in text


@pytest.mark.parametrize("job", [leave_one_out, pbrf, fragility])
def test_settings_without_sense_are_one_line(job: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--removed", "0"]) == 2  # type: ignore[attr-defined]
    assert capsys.readouterr().err.startswith("error: --")
