"""What scores put first, against scikit-learn and counting; means of queries with intervals on the same draws."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from raylux.evaluate import Estimate, detection, mean_of_each, recall, reciprocal_ranks
from raylux.evaluate.datamodel import agreement_of_repeats, ceiling


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(7)
    return random.integers(0, 12, (9, 40)).astype(float), random.random((9, 40)) < 0.12


def test_recall_and_ranks_are_what_counting_says(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    scores, relevant = drawn
    relevant = relevant.copy()
    relevant[4] = False
    shares, ranks = recall(scores, relevant, 5), reciprocal_ranks(scores, relevant)
    assert np.isnan(shares[4]) and np.isnan(ranks[4])
    for query in (0, 1, 2, 3, 5, 6, 7, 8):
        order = sorted(range(40), key=lambda place: (-scores[query, place], place))
        hits = [place for place in order if relevant[query, place]]
        assert shares[query] == len([place for place in order[:5] if place in hits]) / min(5, len(hits))
        assert ranks[query] == 1 / (1 + order.index(hits[0]))


def test_detection_has_the_area_of_scikit_learn_and_finds_all_in_the_end(
    drawn: tuple[np.ndarray, np.ndarray],
) -> None:
    scores, relevant = drawn
    for suspicion, marked in zip(scores, relevant, strict=True):
        found = detection(suspicion, marked)
        assert found.area == pytest.approx(roc_auc_score(marked, suspicion), abs=1e-12), "with ties"
        assert found.found[-1] == 1.0 and (np.diff(found.found) >= 0).all()
        assert found.at(0.25) == found.found[9] and found.at(0.0) == found.found[0]
    perfect = detection(relevant[0].astype(float), relevant[0])
    assert perfect.area == 1.0 and perfect.found[relevant[0].sum() - 1] == 1.0


def test_means_leave_out_what_says_nothing_and_differ_on_the_same_draws() -> None:
    random = np.random.default_rng(2)
    one = random.normal(1.0, 1.0, 60)
    one[7] = np.nan
    found = mean_of_each({"one": one, "more": one + 0.5, "none": np.full(60, np.nan)}, "one", draws=400)
    assert found.lds["one"].value == pytest.approx(np.nanmean(one))
    spread = np.nanstd(one) / np.sqrt(59) * 1.645
    assert found.lds["one"].high - found.lds["one"].low == pytest.approx(2 * spread, rel=0.15)
    assert found.above["one"] == Estimate(0.0, 0.0, 0.0)
    above = found.above["more"]
    assert (above.value, above.low, above.high) == pytest.approx((0.5, 0.5, 0.5))
    assert np.isnan(found.lds["none"].low) and np.isnan(found.above["none"].value)
    assert mean_of_each({"one": one}, "one", draws=400).lds == {"one": found.lds["one"]}


def test_what_repeats_agree_by_says_what_could_be_reached() -> None:
    """Effect and noise of one size: models agree by about a half, the effect with the mean of two by √(2/3)."""
    random = np.random.default_rng(5)
    effect, noise = random.normal(size=(400, 1, 30)), random.normal(size=(400, 2, 30))
    measured = effect + noise
    assert agreement_of_repeats(measured) == pytest.approx(0.48, abs=0.03)
    truth = np.mean([np.corrcoef(effect[:, 0, q], measured.mean(1)[:, q])[0, 1] for q in range(30)])
    assert ceiling(measured) == pytest.approx(truth, abs=0.03)
    assert np.isnan(agreement_of_repeats(measured[:, :1])) and np.isnan(ceiling(measured[:, :1]))
