"""The study of a model whose head and word embedding are two matrices: its training, and its choices of layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from jobs import datamodel
from jobs.lds import apart, compared, retrain
from jobs.lds.study import Settings, Study
from jobs.lds.trained import train
from raylux.batches import TokenRow
from raylux.evaluate import judge
from raylux.store import RunFolder

SMALL = Settings(
    train=12, queries=2, subsets=4, repeats=2, vocabulary=300, layers=1, width=16, epochs=1, tied=False
)  # fmt: skip
HEAD, WORDS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def study() -> Study:
    torch.set_num_threads(1)
    return Study.of(SMALL)


@pytest.fixture(scope="module")
def model(study: Study) -> PreTrainedModel:
    return train(study)[-1].model


@pytest.fixture(scope="module")
def scores(study: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    made = compared.all_methods(study, tmp_path_factory.mktemp("runs"))
    assert all(one.scores.shape == (SMALL.queries, SMALL.train) and one.what for one in made)
    return {one.name: one.scores for one in made}


def test_head_and_word_embedding_are_trained_apart(study: Study, model: PreTrainedModel) -> None:
    start, usual = study.start(0), replace(study, settings=replace(SMALL, tied=True)).start(0)
    assert usual is None and start is not None
    for name in (HEAD, WORDS):
        assert not torch.equal(model.get_parameter(name), start.get_parameter(name)), "both are trained"
        assert not torch.equal(start.get_parameter(name), study.start(1).get_parameter(name)), "seeds differ"
        assert torch.equal(start.get_parameter(name), study.start(0).get_parameter(name))
    assert not torch.equal(model.get_parameter(HEAD), model.get_parameter(WORDS))


def test_its_results_lie_apart_and_the_others_where_they_were() -> None:
    assert Settings().name == "3a41849b26f663cc", "results that exist are found again"
    assert Settings(tied=False).name == Settings().name + "-untied"


def _gradient(model: PreTrainedModel, row: TokenRow, name: str) -> torch.Tensor:
    """Of the log-probability of a row's labels, by autograd."""
    tokens, labels = torch.as_tensor(row.tokens), torch.as_tensor(row.labels)
    logits = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    seen = labels[1:] >= 0
    total = logits[seen, labels[1:][seen]].sum()
    return torch.autograd.grad(total, model.get_parameter(name))[0].double()


@pytest.mark.parametrize(("choice", "name"), [("head", HEAD), ("words", WORDS)])
def test_the_dot_product_of_a_layer_is_its_own(
    study: Study, model: PreTrainedModel, scores: dict[str, np.ndarray], choice: str, name: str
) -> None:
    model.requires_grad_(True)
    queries, texts = ([_gradient(model, row, name).flatten() for row in rows] for rows in (study.parts, study.rows))
    wanted = (torch.stack(queries) @ torch.stack(texts).T).numpy()
    assert np.allclose(scores[f"identity, {choice}"], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    ratio = scores[f"TracIn, {choice}"] / scores[f"identity, {choice}"]
    assert ratio == pytest.approx(np.full_like(ratio, ratio[0, 0])), "one checkpoint: but for its rate the same"


def test_layers_add_up(scores: dict[str, np.ndarray]) -> None:
    """EK-FAC is of one layer at a time: what a choice adds to another is the score of what it adds."""
    both = scores["ekfac"] + scores["ekfac, head"]
    assert np.allclose(scores["ekfac, MLP and head"], both, rtol=1e-4, atol=1e-5 * np.abs(both).max())
    assert not np.allclose(scores["ekfac, attention, MLP and head"], both, rtol=0.01)
    without = scores["identity"] + scores["identity, head"] + scores["identity, words"]
    assert not np.allclose(scores["identity, everything"], without, rtol=0.01), "attention has a share"


def test_the_page_has_both_studies(
    tmp_path: Path, study: Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its own halves and models."""
    asked: list[tuple[bool, int]] = []

    def few(study: Study, folder: Path) -> dict[str, tuple[str, compared.Make]]:
        return {"ekfac": ("what it is", lambda epochs: np.arange(24.0).reshape(2, 12) % 7)}

    def answers(study: Study, folder: Path) -> np.ndarray:
        settings = study.settings
        asked.append((settings.tied, settings.subsets))
        return np.random.default_rng(settings.subsets).normal(
            size=(settings.subsets, settings.repeats, settings.queries)
        )

    monkeypatch.setattr(compared, "_makers", few)
    monkeypatch.setattr(apart, "makers", few)
    monkeypatch.setattr(compared, "train", lambda study: [])
    monkeypatch.setattr(retrain, "measured", answers)
    monkeypatch.setattr(datamodel, "judge", partial(judge, draws=20))
    sizes = [
        "--train",
        "12",
        "--queries",
        "2",
        "--repeats",
        "2",
        "--vocabulary",
        "300",
        "--layers",
        "1",
        "--width",
        "16",
    ]
    given = ["--folder", str(tmp_path), "--subsets", "5", *sizes]
    assert datamodel.main([*given, "--untied", "4"]) == 0
    both = capsys.readouterr().out
    assert datamodel.main([*given, "--untied", "0"]) == 0
    one = capsys.readouterr().out
    assert asked == [(True, 5), (False, 4), (True, 5)]
    assert (both.count("| ekfac | what it is |"), one.count("| ekfac | what it is |")) == (2, 1)
    heading = "## Head and word embedding as layers"
    assert heading in both and heading not in one
    assert "on 5 random halves" in both.partition(heading)[0] and "4 random halves" in both.partition(heading)[2]


def test_a_models_half_is_of_the_untied_model(study: Study, tmp_path: Path) -> None:
    store = RunFolder(str(tmp_path))
    there = [(subset, repeat) for subset in range(4) for repeat in range(2)][1:]
    for job in there:
        store.commit(retrain.STAGE, retrain.unit(*job), values=[0.0] * 2, shape=[2])
    found = retrain.measured(study, tmp_path, "local", quiet=True)[0, 0]
    tied = retrain.train(replace(SMALL, tied=True), 0, 0)
    assert (found < 0).all() and (found != tied).all()
