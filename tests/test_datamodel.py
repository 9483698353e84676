"""The linear datamodeling score: exact where the truth is linear, honest intervals, and the study that uses it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from jobs import datamodel
from jobs.lds import methods, page, retrain
from jobs.lds.compared import PEER, Method
from jobs.lds.study import Settings, Study
from jobs.lds.trained import train
from raylux.errors import UserError
from raylux.evaluate import correlations, judge
from raylux.evaluate.datamodel import Estimate
from raylux.store import RunFolder

SMALL = Settings(train=24, queries=3, subsets=4, repeats=2, vocabulary=300, layers=1, width=16, epochs=1)


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True effects [Q, N], members [S, N], and f [S, Q] with noise as large as the effect."""
    random = np.random.default_rng(3)
    effects = random.normal(size=(12, 200))
    members = random.random((40, 200)) < 0.5
    exact = members @ effects.T
    return effects, members, exact + exact.std(0) * random.normal(size=exact.shape)


def test_effects_that_add_up_are_predicted_exactly(drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    effects, members, _ = drawn
    assert correlations(effects, members, members @ effects.T) == pytest.approx(np.ones(12))
    assert correlations(-3 * effects, members, members @ effects.T) == pytest.approx(-np.ones(12))


def test_it_is_spearmans_correlation_of_each_query(drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    effects, members, measured = drawn
    coarse = np.round(measured)  # with ties
    expected = [spearmanr(members @ effects[q], coarse[:, q]).statistic for q in range(12)]
    assert correlations(effects, members, coarse) == pytest.approx(expected, abs=1e-12)


def test_a_method_that_knows_is_told_from_one_that_does_not(drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    effects, members, measured = drawn
    random = np.random.default_rng(4)
    noise = random.normal(size=effects.shape)
    scores = {"true": effects, "same": 2 * effects, "half": effects + noise, "none": noise}
    found = judge(scores, members, measured, against="true", draws=300)
    for estimate in found.lds.values():
        assert estimate.low < estimate.value < estimate.high
    # Effect and noise are of one size: their correlation with the sum is 0.71.
    assert found.lds["true"].value == pytest.approx(0.71, abs=0.08)
    assert found.lds["none"].low < 0 < found.lds["none"].high
    assert found.above["same"] == Estimate(0.0, 0.0, 0.0), "differences are taken on the same draws"
    assert found.above["half"].high < 0 and found.above["none"].high < found.above["half"].value
    again = judge(scores, members, measured, against="true", draws=300)
    assert again == found


def test_an_interval_covers_what_it_says() -> None:
    """The mean LDS of a fixed method over many drawn experiments lies in the 90 % interval of about as many."""
    random = np.random.default_rng(5)
    inside, truth = 0, []
    experiments = []
    for _ in range(30):
        effects, members = random.normal(size=(20, 60)), random.random((30, 60)) < 0.5
        exact = members @ effects.T
        measured = exact + exact.std(0) * random.normal(size=exact.shape)
        experiments.append(judge({"true": effects}, members, measured, "true", draws=120).lds["true"])
        truth.append(experiments[-1].value)
    middle = float(np.mean(truth))
    inside = sum(one.low <= middle <= one.high for one in experiments)
    assert 0.75 <= inside / len(experiments) <= 1.0


def test_a_query_that_nothing_moves_is_left_out() -> None:
    members = np.array([[True, False], [False, True], [True, True], [False, False]])
    measured = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    scores = np.array([[1.0, 2.0], [1.0, 2.0]])
    assert np.isnan(correlations(scores, members, measured)[1])
    assert judge({"one": scores}, members, measured, "one", draws=20).lds["one"].value == pytest.approx(1.0)


@pytest.fixture(scope="module")
def study() -> Study:
    torch.set_num_threads(1)
    return Study.of(SMALL)


def test_a_study_is_a_function_of_its_settings(study: Study) -> None:
    again = Study.of(SMALL)
    assert (again.texts, again.asked) == (study.texts, study.asked)
    assert (again.members == study.members).all() and (study.members.sum(1) == SMALL.train // 2).all()
    held = {query["prompt"] + query["completion"] for query in study.asked}
    assert not held & set(study.texts), "queries are held out"
    assert Settings(seed=1).name != Settings().name


def test_models_that_are_there_are_not_trained_again(study: Study, tmp_path: Path) -> None:
    """Killed in the middle, the rest is trained; what was there is read as it is."""
    store = RunFolder(str(tmp_path))
    there = [(subset, repeat) for subset in range(4) for repeat in range(2)]
    for place, job in enumerate(there):
        if place != 5:
            store.commit(retrain.STAGE, retrain.unit(*job), values=[float(place)] * 3, shape=[3])
    found = retrain.measured(study, tmp_path, "local", quiet=True)
    assert found.shape == (4, 2, 3)
    values = [retrain.train(SMALL, 2, repeat) for repeat in (1, 0)]
    assert (found[2, 1] == values[0]).all() and (values[0] != values[1]).any() and (values[0] < 0).all()
    assert np.delete(found[:, :, 0].ravel(), 5).tolist() == [0, 1, 2, 3, 4, 6, 7]


def test_methods_score_every_text(study: Study, tmp_path: Path) -> None:
    points = train(study)
    assert len(points) == 1 and points[0].rate > 0
    found = {
        "ekfac": methods.scores(study, points[0].model, tmp_path / "run", "ekfac"),
        "bm25": methods.prefiltered(study, "bm25"),
    }
    for scores in found.values():
        assert scores.shape == (3, 24) and np.isfinite(scores).all() and scores.std() > 0
    plain = methods.scores(study, points[0].model, tmp_path / "plain", "diagonal")
    lengths = plain / methods.unit_length(study, points[0].model, tmp_path / "unit", "diagonal")
    assert lengths.min() > 0 and lengths.std(1).min() > 0, "each text by its own"
    assert np.allclose(lengths, lengths[:1], rtol=1e-4), "whatever is asked"
    measured = np.random.default_rng(0).normal(size=(4, 2, 3))
    judged = judge(found, study.members, measured.mean(1), "ekfac", draws=50)
    listed = [Method(name, "", x, 1.0) for name, x in found.items()]
    text = page.page(page.Found(SMALL, listed, judged, measured), None, "cmd")
    left_out = "its row is left out"
    assert left_out in text
    listed.append(Method(PEER, "", found["ekfac"], 1.0))
    judged.lds[PEER], judged.above[PEER] = judged.lds["ekfac"], judged.above["ekfac"]
    assert left_out not in page.page(page.Found(SMALL, listed, judged, measured), None, "cmd")
    for name in found:
        assert f"| {name} |  | {judged.lds[name]} |" in text
    if find_spec("matplotlib") is None:
        with pytest.raises(UserError, match="matplotlib"):
            page.plot({"one": judged}, tmp_path / "plot.png")
    else:
        page.plot({"one": judged, "other": judged}, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_method_is_on_the_frontier_where_nothing_as_cheap_is_better() -> None:
    priced = {
        "free": (0, 0.2),
        "worse": (3, 0.1),
        "good": (3, 0.4),
        "as good": (3, 0.4),
        "dear": (9, 0.4),
        "best": (9, 0.5),
    }
    assert page.frontier(priced) == {"free", "good", "as good", "best"}


def test_too_little_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert datamodel.main(["--folder", str(tmp_path), "--subsets", "1"]) == 2
    assert datamodel.main(["--folder", str(tmp_path), "--untied", "3"]) == 2
    assert datamodel.main(["--folder", str(tmp_path), "--train", "1000000"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 3 and all(line.startswith("error: ") for line in said)
