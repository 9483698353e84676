"""The dose curve in its short form: doses do what they say, nothing is drawn anew, and what is done is kept."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import dose_curve, pages
from jobs.dose import choose, page, retrain
from jobs.dose.choose import BM25, EKFAC, PEER, RANDOM
from jobs.dose.judge import Gap, Outcome, Sets, counts, gap, mean
from jobs.dose.retrain import Measured
from jobs.dose.study import COLD, DOSES, PROXIMAL, WARM, Settings, Study, study_of, weights_of
from jobs.kept import kept
from jobs.lds import methods
from raylux.demo.training import initial_model, train_model
from raylux.engine.progress import Reporter
from raylux.engine.tasks import run_tasks
from raylux.errors import UserError
from raylux.evaluate.exact import exact_norms
from raylux.store import RunFolder

SMALL = Settings(
    train=32, queries=4, vocabulary=300, layers=1, width=16, epochs=2, size=3, random=2, warm_epochs=1, proximal=1
)


@pytest.fixture(scope="module")
def study() -> Study:
    torch.set_num_threads(1)
    return study_of(SMALL)


@pytest.fixture(scope="module")
def base(study: Study, tmp_path_factory: pytest.TempPathFactory) -> choose.Base:
    return choose.base(study, tmp_path_factory.mktemp("dose"))


# training with weights


def exact_start(study: Study, how: Any) -> Any:
    model = initial_model(study.drawn.tokenizer, how).double()
    exact_norms(model)
    return model


def test_a_weighted_step_is_the_sum_of_the_texts_own(study: Study) -> None:
    """Against AdamW on losses of one text at a time, without padding, in float64."""
    how = replace(study.settings.training(), epochs=3, batch_tokens=10**6)
    texts, weights = study.drawn.texts[:5], [1.0, 0.0, 2.0, 5.0, 1.3]
    start = exact_start(study, how)
    found = train_model(texts, study.drawn.tokenizer, how, weights=weights, start=start)
    model = exact_start(study, how)
    assert all(torch.equal(x, y) for x, y in zip(start.parameters(), model.parameters(), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=how.weight_decay)
    rows = [torch.tensor(row) for row in study.drawn.tokenizer(texts)["input_ids"]]
    for step in range(3):
        losses = [
            torch.nn.functional.cross_entropy(model(input_ids=row[None]).logits[0, :-1], row[1:], reduction="sum")
            for row in rows
        ]
        loss = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(len(row) - 1 for row in rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # Three steps, the first of which is the warm-up.
        optimizer.param_groups[0]["lr"] = how.rate * min(1.0, (3 - step) / 2)
        optimizer.step()
    moved = max(
        float((x - y).detach().abs().max()) for x, y in zip(model.parameters(), start.parameters(), strict=True)
    )
    apart = max(
        float((x - y).detach().abs().max()) for x, y in zip(model.parameters(), found.parameters(), strict=True)
    )
    assert moved > 1e-3 and apart < 1e-7 * moved


def test_ones_are_no_weights(study: Study) -> None:
    how, leads = study.settings.training(), study.drawn
    plain = weights_of(train_model(leads.texts, leads.tokenizer, how))
    assert np.abs(weights_of(retrain.trained(study, (), 0.0)) - plain).max() < 1e-3 * np.abs(plain).max()


def test_a_text_that_is_taken_away_adds_nothing(study: Study) -> None:
    """Whatever it says: another text of as many tokens in its place leaves the same bits."""
    leads = study.drawn
    lengths = [len(row.tokens) for row in study.rows]
    one, other = next(
        (i, j) for i in range(len(lengths)) for j in range(i) if lengths[i] == lengths[j] and i not in range(2)
    )
    changed = list(leads.texts)
    changed[one] = leads.texts[other]
    assert changed[one] != leads.texts[one]
    weights = [1.0] * len(changed)
    weights[one] = 0.0
    found = [
        weights_of(train_model(texts, leads.tokenizer, study.settings.training(), weights=weights))
        for texts in (leads.texts, changed)
    ]
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("way", [COLD, WARM])
def test_no_dose_is_the_model_without_one(way: str, study: Study, base: choose.Base) -> None:
    """The same bits, whatever the set; and from the start those of the model that is scored."""
    results = [
        retrain.retrained((SMALL, base.weights[-1]), way, own, 0.0)[:-1] for own in ((), (1, 5, 9), study.random[0])
    ]
    assert all((one == results[0]).all() for one in results)
    if way == COLD:
        assert (weights_of(retrain.trained(study, (), 0.0)) == base.weights[-1]).all()
    dosed = retrain.retrained((SMALL, base.weights[-1]), way, (1, 5, 9), 1.0)[:-1]
    assert (dosed != results[0]).all()


@pytest.mark.parametrize("way", [COLD, WARM])
def test_small_doses_are_in_proportion(way: str, study: Study) -> None:
    """In float64, as long as nothing is drawn anew: central differences at two sizes agree."""
    start = exact_start(study, study.settings.training())
    how = study.settings.training(warm=way == WARM)
    leads, own = study.drawn, [2, 3, 11]

    def f(dose: float) -> np.ndarray:
        weights = np.ones(len(leads.texts))
        weights[own] += dose
        return leads.logprobs(train_model(leads.texts, leads.tokenizer, how, weights=weights.tolist(), start=start))

    small, large = ((f(dose) - f(-dose)) / (2 * dose) for dose in (1e-4, 3e-4))
    assert np.abs(small).max() > 1e-3
    np.testing.assert_allclose(small, large, atol=2e-3 * np.abs(small).max())


# the proximal optimum


def test_better_solves_predict_the_proximal_optimum(study: Study, base: choose.Base, tmp_path: Path) -> None:
    """A set's predicted change is the sum over its sequences: true of small doses."""
    own = study.random[0]
    found = retrain.optimum((SMALL, base.weights[-1]), own, base.damping)[:-1]
    (less, more), noise = found.reshape(2, 2, -1)
    odd, even = (more - less) / 2, (more + less) / 2
    assert np.linalg.norm(even) < 0.2 * np.linalg.norm(odd)
    assert np.linalg.norm(noise) < 0.2 * np.linalg.norm([less, more])
    options = ["curvature.solver=pcg", "curvature.iterations=20"]
    run = choose.run(study, study.model(base.weights[-1]), tmp_path / "pcg", "ekfac", options)
    solved = methods.array(study.drawn, run)
    predicted = DOSES[PROXIMAL][1] * solved[:, list(own)].sum(1) / SMALL.train
    assert np.corrcoef(predicted, odd)[0, 1] > 0.95
    assert 0.8 < predicted @ odd / (predicted @ predicted) < 1.2


# what is kept


def test_a_worker_that_dies_is_replaced_and_leaves_the_same_bits(
    study: Study, base: choose.Base, tmp_path: Path, ray_cluster: dict[str, Any]
) -> None:
    """Over Ray with a process killed in the middle; here undisturbed; and gone on with after half of it was lost."""
    dying = str(tmp_path / "dying")

    def deadly(start: retrain.Start, way: str, own: tuple[int, ...], dose: float) -> np.ndarray:
        if dose == 1.0 and not os.path.exists(dying):
            Path(dying).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return retrain.retrained(start, way, own, dose)

    def run(folder: str, function: Callable[..., np.ndarray], backend: str) -> dict[str, np.ndarray]:
        store = RunFolder(str(tmp_path / folder))
        jobs = {retrain.unit(study.random[0], dose): (COLD, study.random[0], dose) for dose in DOSES[COLD]}
        start = (SMALL, base.weights[-1])
        found = run_tasks(store, COLD, function, start, jobs, reporter=Reporter(store, quiet=True), backend=backend)
        # Without the seconds.
        return {name: one[:-1] for name, one in found.items()}

    found, alone = run("ray", deadly, "ray"), run("here", retrain.retrained, "local")
    assert Path(dying).exists() and found.keys() == alone.keys() and len(found) == 3
    (tmp_path / "ray" / "ledger" / COLD / f"{retrain.unit(study.random[0], -1.0)}.json").unlink()
    again = run("ray", retrain.retrained, "local")
    for name, one in alone.items():
        assert (found[name] == one).all() and (again[name] == one).all()


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "one.npz"
    assert kept(path, lambda: {"x": np.arange(3)})["x"].tolist() == [0, 1, 2]
    assert kept(path, lambda: {"x": np.arange(9)})["x"].tolist() == [0, 1, 2]


# the numbers


def outcome(study: Study, change: dict[str, np.ndarray], own: dict[str, list[int]], sets: int) -> Outcome:
    members = [(place, place + 1, place + 2) for place in range(sets)]
    random = np.random.default_rng(0)
    scores = {name: random.normal(size=(4, SMALL.train)) for name in own}
    seconds = {way: np.array([1.0, 2.0]) for way in DOSES}
    return Outcome(
        scores, Sets(members, own, [sets - 2, sets - 1]), Measured(change, 0.01 + 0 * change[PROXIMAL], seconds)
    )


def test_each_query_is_read_with_its_own_set(study: Study) -> None:
    shape = {way: (len(doses), 10, 4) for way, doses in DOSES.items()}
    change = {way: np.arange(np.prod(size), dtype=float).reshape(size) for way, size in shape.items()}
    change[PROXIMAL][:, 3:] = np.nan
    found = outcome(study, change, {EKFAC: [0, 1, 2, 3], BM25: [4, 1, 6, 0]}, 10)
    assert found.moved(EKFAC, COLD, 1.0).tolist() == [change[COLD][1, place, place] for place in range(4)]
    assert found.moved(RANDOM, WARM, -1.0).tolist() == change[WARM][0, 8:].mean(0).tolist()
    assert np.isnan(found.moved(RANDOM, PROXIMAL, 0.02)).all()
    assert found.elsewhere(EKFAC, COLD, 1.0)[0] == change[COLD][1, 1:4, 0].mean()
    difference = change[COLD][1, [0, 1, 2, 3], range(4)] - change[COLD][1, [4, 1, 6, 0], range(4)]
    assert found.more(EKFAC, BM25, COLD, 1.0).mean == difference.mean()
    # Taken away, the one that lowers f more moves it more.
    assert found.more(EKFAC, BM25, COLD, -1.0).mean == pytest.approx(-found.more(EKFAC, BM25, COLD, 1.0).mean)
    predicted = found.predicted(EKFAC, 4.0)
    scores = found.methods[EKFAC]
    assert predicted[5, 2] == pytest.approx(4 * scores[2, [5, 6, 7]].sum())


def test_predictions_that_come_true_have_slope_one(study: Study) -> None:
    names = {EKFAC: [0, 1, 2, 3]}
    empty = {way: np.zeros((len(doses), 10, 4)) for way, doses in DOSES.items()}
    guess = outcome(study, empty, names, 10)
    true = {way: np.stack([guess.predicted(EKFAC, dose) for dose in doses]) for way, doses in DOSES.items()}
    found = outcome(study, true, names, 10)
    for way, doses in DOSES.items():
        for dose in doses:
            for one in (found.own_slope(EKFAC, way, dose), found.all_pairs(EKFAC, way, dose)):
                assert (one.slope.value, one.slope.low, one.slope.high) == pytest.approx((1, 1, 1))
                assert one.r_squared == pytest.approx(1)
    odd, even = found.linear()
    assert odd > 0 and even == pytest.approx(0, abs=1e-12)


def test_an_error_is_that_of_the_mean_over_queries() -> None:
    x = np.array([1.0, 2.0, 3.0, 6.0, np.nan])
    assert gap(x) == Gap(3.0, pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2))
    assert gap(np.zeros(3)).errors == 0.0 and np.isnan(gap(np.array([1.0])).error)
    found = mean(x)
    assert found.low < found.value == 3.0 < found.high
    assert counts([Gap(2.0, 1.0), Gap(1.9, 1.0), Gap(-2.5, 1.0)]) == (1, 1)


# the command

SMALLER = replace(SMALL, queries=3, epochs=1, random=1)
OPTIONS = [f"--{name}={value}" for name, value in asdict(SMALLER).items()]


def test_a_page_is_written_from_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    given = [*OPTIONS, "--methods", EKFAC, BM25, "--backend=local"]
    given += ["--folder", str(tmp_path / "kept"), "--write"]
    drawn = find_spec("matplotlib") is not None

    def command() -> str:
        assert dose_curve.main(given) == (0 if drawn else 2)
        return (tmp_path / "dose-curve.md").read_text(encoding="utf-8")

    text = command()
    assert all(f"| {page.NAMES[name]} |" in text for name in (EKFAC, BM25, RANDOM))
    assert page.NAMES[PEER] not in text and str(tmp_path) not in text and "nan" not in text
    assert "against BM25: met in" in text
    models = list((tmp_path / "kept").rglob(f"ledger/{COLD}/*.json"))
    assert 1 + 3 * 3 <= len(models) <= 1 + 3 * (2 * SMALLER.queries + SMALLER.random)
    if drawn:
        assert (tmp_path / "dose-curve.png").stat().st_size > 1000

    def never(*_: object, **__: object) -> Callable[..., Any]:
        raise AssertionError("trained again")

    for module in (retrain, choose):
        monkeypatch.setattr(module, "train_model", never)
    assert command() == text


def test_the_short_form_has_a_page_of_its_own(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change = {way: np.full((len(doses), 10, 4), np.nan) for way, doses in DOSES.items()}
    change[PROXIMAL][:, [0, 1, 4, 8, 9]] = np.random.default_rng(0).normal(size=(2, 5, 4))
    found = outcome(study, change, {EKFAC: [0, 1, 2, 3], BM25: [4, 1, 6, 0]}, 10)
    monkeypatch.setattr(dose_curve, "outcome", lambda *_: found)
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    given = ["--ways", PROXIMAL, "--proximal", "2", "--folder", str(tmp_path / "kept"), "--write"]
    assert dose_curve.main(given) == 0
    text = (tmp_path / "dose-proximal.md").read_text(encoding="utf-8")
    assert f"| {page.NAMES[EKFAC]} | {PROXIMAL} | +0.02 |" in text and COLD not in text and "nan" not in text
    assert not (tmp_path / "dose-curve.md").exists()
    assert text.rstrip() == capsys.readouterr().out.rstrip()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ways", "proximal", "--proximal", "1"], "--proximal 1: two queries at least"),
        (["--queries", "0"], "--queries 0: at least 1"),
        (["--size", "200", "--train", "100"], "--size 200: a set is smaller than the 100 texts of --train"),
        (["--random", "-1"], "--random -1: 0, or more"),
        (["--train", "1000000"], "lower --train or --queries"),
    ],
)
def test_bad_options_are_said_in_a_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "kept"
    assert dose_curve.main([*options, "--folder", str(folder)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line
    assert not folder.exists()


# the peer


def test_a_missing_peer_is_said(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="make peers"):
        choose.peer(study, None, tmp_path)  # type: ignore[arg-type]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning:kronfluence")
def test_the_peers_scores_are_in_raylux_s_sign_and_unit(study: Study, base: choose.Base, tmp_path: Path) -> None:
    """The two draw labels of their own: alike, not equal."""
    model = study.model(base.weights[-1])
    ours = methods.array(study.drawn, choose.run(study, model, tmp_path / "run", "ekfac"))
    theirs = choose.peer(study, model, tmp_path / "peer")
    assert theirs.shape == ours.shape
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9
    assert 0.7 < (ours * theirs).sum() / (theirs**2).sum() < 1.4
