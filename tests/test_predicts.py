"""The influence predicts what one more copy does: the short form of jobs/proximal_optimum.py.

EK-FAC's size is off (docs/results/proximal-optimum.md has the slopes), so what is asserted is correlation.
"""

from __future__ import annotations

import pytest

from jobs.proximal_optimum import Outcome, Settings, experiment, page


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    # Narrow, as what takes long is the eigenvectors of a matrix as large as there are weights.
    return experiment(Settings(train=256, added=8, copies=(1.0,), width=12, iterations=45, draws=4000), check=1)


@pytest.mark.parametrize("copies", [1.0])
def test_ekfac_predicts_the_proximal_optimum_better_than_dot_products(outcome: Outcome, copies: float) -> None:
    assert outcome.measured[copies].shape == (4, 8)
    assert outcome.pearson("ekfac", copies) >= 0.8
    assert outcome.pearson("ekfac", copies) > outcome.pearson("identity", copies)
    assert outcome.pearson("ekfac", copies, cross=True) > outcome.pearson("identity", copies, cross=True)
    # Sign and unit: a prediction in nats, which overstates but not by orders of magnitude.
    assert 0.1 < outcome.slope("ekfac", copies) < 2.0


@pytest.mark.parametrize("copies", [1.0])
def test_the_searches_ended_at_the_optimum(outcome: Outcome, copies: float) -> None:
    assert all(optimum.gradient <= 0.02 * optimum.start for optimum in outcome.optima[copies])
    assert outcome.moved[copies] <= 0.02


def test_the_page_shows_what_was_found(outcome: Outcome) -> None:
    text = page([outcome], "python jobs/proximal_optimum.py --seeds 0")
    for copies in outcome.measured:
        for kind in ("ekfac", "identity"):
            assert f"{outcome.pearson(kind, copies):.3f}" in text
        assert f"{outcome.slope('ekfac', copies):.3f}" in text
