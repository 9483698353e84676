"""How often what ``verify`` says of a run is true, where the truth is known: a head whose curvature is a dense matrix.

The truth of a pair is ∇fᵀ(G + λ)⁻¹∇log p / N with G, λ and N of the run, which is what the proximal optimum moves per
copy as doses go to 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import raylux
from raylux.calibrated import LEVEL
from raylux.evaluate import agreement, slope
from raylux.verification import VerifyOptions

FEATURES, CLASSES, SEQUENCES, QUERIES, DAMPING = 4, 3, 40, 40, 0.05
# Queries and sequences that a repeat draws: about as many as the command takes by itself.
DRAWN = (4, 20)
REPEATS = 200


def examples(count: int, seed: int) -> list[tuple[Tensor, int]]:
    """Gaussian features of several widths and lengths, classes at random."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.linspace(0.4, 1.6, FEATURES, dtype=torch.float64)
    lengths = torch.randn(count, 1, generator=generator, dtype=torch.float64).mul(0.5).exp()
    features = lengths * widths * torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    return [(x, int(torch.randint(CLASSES, (1,), generator=generator))) for x in features]


def gradient(head: nn.Linear, x: Tensor, label: int) -> Tensor:
    """∇log p [P · M] of one example."""
    wanted = torch.zeros(CLASSES, dtype=x.dtype)
    wanted[label] = 1
    return torch.outer(wanted - head(x).softmax(0), torch.cat([x, x.new_ones(1)])).reshape(-1).detach()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, np.ndarray]:
    """What was verified of every pair, and the truth of it [pairs]."""
    torch.manual_seed(7)
    head = nn.Linear(FEATURES, CLASSES).double()
    train, asked = examples(SEQUENCES, 1), examples(QUERIES, 2)
    queries: list[dict[str, Any]] = [{"id": str(n), "features": x, "label": y} for n, (x, y) in enumerate(asked)]
    folder = tmp_path_factory.mktemp("coverage") / "run"
    run = raylux.attribute(head, None, train, queries, folder=folder, overrides=[f"curvature.damping={DAMPING}"])
    options = VerifyOptions(queries=QUERIES, top=0, random=SEQUENCES, products=0, whole=False)
    frame = raylux.verify(run, options).verification()
    damped = DAMPING * torch.eye(CLASSES * (FEATURES + 1), dtype=torch.float64)
    for x, _ in train:
        p, a = head(x).softmax(0).detach(), torch.cat([x, x.new_ones(1)])
        damped += torch.kron(p.diag() - torch.outer(p, p), torch.outer(a, a)) / SEQUENCES
    rows, questions = (torch.stack([gradient(head, *one) for one in each]) for each in (train, asked))
    truth = (questions @ torch.linalg.solve(damped, rows.T) / SEQUENCES).numpy()
    place = {name: row for row, name in enumerate(run.sequences["sequence"])}
    records = frame.to_dict("records")
    return frame, np.array([truth[int(one["query"]), place[one["sequence"]]] for one in records])


def test_a_pairs_interval_is_a_bound(pairs: tuple[pd.DataFrame, np.ndarray]) -> None:
    """It adds up what the search may have left and the whole second order: it holds every pair, and is still narrow."""
    frame, truth = pairs
    assert len(frame) == SEQUENCES * QUERIES and frame["resolved"].all()
    assert ((frame["low"] <= truth) & (truth <= frame["high"])).all()
    width = (frame["high"] - frame["low"]).to_numpy() / 2
    assert np.sqrt((width**2).mean()) < 0.05 * np.sqrt((truth**2).mean())


def test_a_slopes_interval_covers_as_often_as_it_says(pairs: tuple[pd.DataFrame, np.ndarray]) -> None:
    """90 % intervals of measured changes on predicted ones, from queries and sequences drawn from all of them."""
    frame, truth = pairs
    predicted, measured, exact = (
        frame.assign(exact=truth).pivot(index="query", columns="sequence", values=name).to_numpy()
        for name in ("predicted", "measured", "exact")
    )
    wanted = slope(predicted, exact)
    random, inside = np.random.default_rng(0), 0
    for _ in range(REPEATS):
        some = np.ix_(*(random.integers(count, size=drawn) for count, drawn in zip(exact.shape, DRAWN, strict=True)))
        found = agreement(predicted[some], measured[some], LEVEL, draws=300).slope
        assert found.high - found.low > 0.01, "EK-FAC is not exact, so that there is something to tell"
        inside += found.low <= wanted <= found.high
    assert 0.80 <= inside / REPEATS <= 0.97, inside / REPEATS
