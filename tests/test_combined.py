"""Several runs read as one: TracIn against brute force, the mean of models, and what cannot be added up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from transformers import PreTrainedModel

import raylux
from raylux.cli import main
from raylux.combined import Combined
from tests import reference
from tests.architectures import build
from tests.test_exact import ASKED, QUESTIONS, TEXTS, TOLERANCE, VOCAB, corpus_of, expected_of, gpt2, tokenizer

OVERRIDES = ("query.max_error=0", "score.token_top=0", "fit.sequences=8")
RATES = (3e-3, 5e-4)


def moved(seed: int) -> PreTrainedModel:
    """A model somewhere near."""
    model = build("gpt2", torch.float64, VOCAB)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return model


def attribute(model: PreTrainedModel, folder: Path | None, *overrides: str, **more: Any) -> raylux.Run:
    asked = {"train": TEXTS, "queries": ASKED} | more
    return raylux.attribute(model, tokenizer(), **asked, folder=folder, overrides=[*OVERRIDES, *overrides])


@pytest.fixture(scope="module")
def models() -> list[PreTrainedModel]:
    return [gpt2(), moved(1)]


@pytest.fixture(scope="module")
def dots(models: list[PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> list[raylux.Run]:
    base = tmp_path_factory.mktemp("dots")
    return [attribute(model, base / str(place), "curvature.kind=identity") for place, model in enumerate(models)]


def test_weighted_by_learning_rates_it_is_tracin(models: list[PreTrainedModel], dots: list[raylux.Run]) -> None:
    """Σ_k η_k ∇f(q)·∇log p(z), each gradient by autograd of one sequence on its own checkpoint."""
    wanted = np.zeros((len(ASKED), len(TEXTS)))
    for rate, model, run in zip(RATES, models, dots, strict=True):
        layers = run.settings["model"]["layers"]
        for place, question in enumerate(QUESTIONS):
            asked = reference.question_gradient(model, layers, question)
            for at, sequence in enumerate(corpus_of(run)):
                found = reference.gradients(model, layers, sequence)
                wanted[place, at] -= rate * sum(float((asked[name] * found[name]).sum()) for name in layers)
    combined = raylux.combine(dots, RATES)
    assert combined.unit == "weighted dot"
    scores = combined.scores()
    assert scores.attrs["unit"] == "weighted dot"
    for place, query in enumerate(combined.queries):
        assert reference.difference(scores.sel(query=query), wanted[place]) <= TOLERANCE
        best = combined.top(query, 5)
        order = np.argsort(-wanted[place], kind="stable")[:5]
        assert best["sequence"].tolist() == dots[0].sequences["sequence"].iloc[order].tolist()
        assert reference.difference(best["influence"], wanted[place][order]) <= TOLERANCE
        assert best.attrs["unit"] == "weighted dot" and best["rank"].tolist() == [1, 2, 3, 4, 5]


def test_the_mean_of_models_each_with_its_own_curvature(models: list[PreTrainedModel]) -> None:
    runs = [attribute(model, None, "curvature.kind=ekfac") for model in models]
    wanted = np.mean([sum(expected_of(m, run, QUESTIONS).values()) for m, run in zip(models, runs, strict=True)], 0)
    combined = raylux.combine(runs)
    assert combined.unit == "nats"
    for place, query in enumerate(combined.queries):
        assert reference.difference(combined.scores().sel(query=query), wanted[place]) <= TOLERANCE
        values = [run.scores().sel(query=query).to_numpy() for run in runs]
        assert combined.agreement(query) == pytest.approx(spearmanr(*values).statistic, abs=1e-12)


def test_a_run_alone_is_itself(dots: list[raylux.Run]) -> None:
    combined = raylux.combine(dots[:1])
    for query in combined.queries:
        pd.testing.assert_frame_equal(combined.top(query), dots[0].top(query))
        assert math.isnan(combined.agreement(query))
    assert raylux.combine([*dots, dots[0]]).agreement(combined.queries[0]) < 1.0
    assert raylux.combine([dots[0], dots[0]]).agreement(combined.queries[0]) == pytest.approx(1.0, abs=1e-12)


def test_documents_are_summed_over_runs(models: list[PreTrainedModel]) -> None:
    train = [{"id": f"d{place}", "text": f"{text} " * 3} for place, text in enumerate(TEXTS)]
    more = ("curvature.kind=identity", "corpus.max_length=16")
    runs = [attribute(model, None, *more, train=train) for model in models]
    combined = raylux.combine(runs)
    query = combined.queries[0]
    tables = [run.top(query, 100, by="document").set_index("document")["influence"] for run in runs]
    found = combined.top(query, 100, by="document").set_index("document")["influence"]
    assert len(found) == len(train) < len(runs[0].sequences)
    assert reference.difference(found, ((tables[0] + tables[1]) / 2)[found.index]) <= TOLERANCE


def other_runs(model: PreTrainedModel) -> dict[str, raylux.Run]:
    dot = "curvature.kind=identity"
    return {
        "differ in unit": attribute(model, None),
        "differ in train_size": attribute(model, None, dot, "score.train_size=9"),
        "differ in their sequences": attribute(model, None, dot, train=[text.upper() for text in TEXTS]),
        "ask different things as": attribute(model, None, dot, queries=[ASKED[1], ASKED[0]]),
        "no query in common": attribute(
            model, None, dot, queries=[{"id": "other", "prompt": "anna", "completion": "lives"}]
        ),
    }


def test_what_cannot_be_added_up_is_one_line(dots: list[raylux.Run]) -> None:
    for said, run in other_runs(gpt2()).items():
        with pytest.raises(raylux.UserError, match=said) as error:
            raylux.combine([dots[0], run])
        assert "\n" not in str(error.value)
    few = attribute(gpt2(), None, "curvature.kind=identity", "prefilter.kind=tfidf", "prefilter.top=4")
    combined = raylux.combine([dots[0], few])
    with pytest.raises(raylux.UserError, match=r"scored against \d+ sequences .* give both the same prefilter"):
        combined.top(combined.queries[0])
    with pytest.raises(raylux.UserError, match="1 weights for 2 runs"):
        raylux.combine(dots, [1.0])
    for weights in ([math.nan, 1.0], [0.0, 0.0]):
        with pytest.raises(raylux.UserError, match="finite numbers are wanted"):
            raylux.combine(dots, weights)
    with pytest.raises(raylux.UserError, match="no run is named"):
        Combined([])


def test_the_command_shows_several_runs_as_one(dots: list[raylux.Run], capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run.folder for run in dots]
    query = dots[0].queries[0]
    assert main(["top", *folders, "--query", query, "-k", "3"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    combined = raylux.combine(folders)
    assert f"2 runs, which agree by {combined.agreement(query):.2f}" in shown
    weights = [option for rate in RATES for option in ("--weight", str(rate))]
    assert main(["top", *folders, "--query", query, "-k", "3", "--format", "json", *weights]) == 0
    records = json.loads(capsys.readouterr().out)
    wanted = raylux.combine(folders, RATES).top(query, 3)
    assert [row["influence"] for row in records] == wanted["influence"].tolist()
    assert {row["unit"] for row in records} == {"weighted dot"}
    assert main(["top", *folders, "--weight", "1"]) == 2
    assert "1 weights for 2 runs" in capsys.readouterr().err
