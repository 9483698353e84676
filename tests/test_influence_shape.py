"""How influence is spread: laws are told from one another on samples of each, ranks end at the run's own scores."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pareto

from jobs import influence_shape
from jobs.shape import page
from jobs.shape.tails import tail, top_share
from raylux.errors import UserError


def test_a_power_law_is_known_by_its_exponent_and_its_tail() -> None:
    random = np.random.default_rng(0)
    found = tail(2 * (1 - random.random(2000)) ** (-1 / 2.5))
    assert found.exponent == pytest.approx(2.5, rel=0.06)
    assert found.fit > 0.1 and found.ratio > 2 and found.heavier < 0.05


def test_the_exponent_is_the_one_of_greatest_likelihood() -> None:
    x = np.sort(1 + np.random.default_rng(1).exponential(size=50))
    own = tail(x, draws=1).exponent

    def likelihood(exponent: float) -> float:
        return float(pareto.logpdf(x[1:], exponent, scale=x[0]).sum())

    assert likelihood(own) > max(likelihood(own * 1.01), likelihood(own * 0.99))


def test_an_exponential_is_no_power_law() -> None:
    found = tail(1 + np.random.default_rng(2).exponential(size=2000))
    assert found.fit < 0.1 and found.ratio < -2 and found.heavier > 0.95


def test_plausible_fits_are_as_frequent_as_they_say() -> None:
    """Of samples of a power law a tenth has p < 0.1."""
    random = np.random.default_rng(3)
    fits = [tail((1 - random.random(40)) ** (-1 / 3), draws=100, seed=place).fit for place in range(150)]
    assert 0.04 < np.mean(np.array(fits) < 0.1) < 0.17


def test_the_top_share_counts_positive_influence_alone() -> None:
    scores = np.concatenate([np.full(99, 1.0), [101.0], np.full(100, -5.0)])
    assert top_share(scores) == pytest.approx(102 / 200)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> page.Found:
    small = influence_shape.Settings(train=300, queries=2, ranked=20, epochs=1, vocabulary=600, layers=2, width=32)
    return influence_shape.measure(small, tmp_path_factory.mktemp("shape"))


def test_all_of_s_test_gives_the_scores_of_the_run(measured: page.Found) -> None:
    some = np.sort(np.random.default_rng(0).choice(count := measured.scores.shape[1], 20, replace=False))
    whole = measured.ranked[-1] / count  # the run's are in nats
    assert whole == pytest.approx(measured.scores[:, some], rel=1e-4, abs=1e-4 * np.abs(whole).max())


def test_layers_add_up_and_shares_too(measured: page.Found) -> None:
    assert measured.layers.sum(1) == pytest.approx(measured.scores, rel=1e-4, abs=1e-5 * np.abs(measured.scores).max())
    assert measured.by_block().sum(1) == pytest.approx([1, 1])
    assert measured.shared(measured.scores, 50, 50) == pytest.approx([1, 1])
    assert np.all(np.diff(measured.correlations().mean(1)) > -0.05)


def test_the_page_and_the_plot_come_of_it(measured: page.Found, tmp_path: Path) -> None:
    text = page.page(influence_shape.Settings(train=300, queries=2).drawn(), measured, "python jobs/influence_shape.py")
    assert "| 32 | 1.00000 |" in text and "nan" not in text
    if find_spec("matplotlib") is None:
        with pytest.raises(UserError, match="matplotlib"):
            page.plot(measured, tmp_path / "shape.png")
        return
    page.plot(measured, tmp_path / "shape.png")
    assert (tmp_path / "shape.png").stat().st_size > 10_000


def test_bad_sizes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert influence_shape.main(["--train", "100"]) == 2
    assert "--train at least 300" in capsys.readouterr().err
