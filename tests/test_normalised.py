"""Self-influence and normalised scores: against dense matrices, and bit for bit whoever computed them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raylux
from raylux.engine.worker import GradientWorker
from raylux.errors import MissingStageError, UserError
from raylux.ledger import SQUARES
from raylux.store import RunFolder
from tests import reference
from tests import test_exact as exact
from tests.architectures import build
from tests.interrupts import Interrupt
from tests.small import Inputs, make_inputs
from tests.test_experts import unfused

MEASURED = "score.self_influence=true"
KINDS = ("ekfac", "kfac", "diagonal", "identity")


def expected(run: raylux.Run, model: Any) -> np.ndarray:
    """‖v‖², vᵀ(G + λ)⁻¹v and ‖(G + λ)⁻¹v‖² of every sequence of the corpus, [3, N], by dense matrices."""
    setting, layers = run.config.curvature, run.settings["model"]["layers"]
    corpus = [reference.gradients(model, layers, row) for row in exact.corpus_of(run)]
    if setting.kind == "identity":
        return _squares(corpus, corpus)
    fit = exact.fitted_on(run)
    grads = [reference.gradients(model, layers, row) for row in fit]
    pairs = [reference.token_pairs(model, layers, row) for row in fit]
    pools: dict[str, list[str]] = {}
    for name in layers:
        block, _, leaf = name.rsplit(".", 2)
        pools.setdefault(f"{block} {leaf}" if ".experts." in name else name, []).append(name)
    dense = {
        name: reference.curvature(setting.kind, [g[name] for g in grads], [p[name] for p in pairs]) for name in layers
    }
    least = {name: float(np.mean([dense[one].mean for one in pool])) for pool in pools.values() for name in pool}
    solved = [{name: dense[name].solve(g[name], setting.damping, least[name]) for name in layers} for g in corpus]
    return _squares(corpus, solved)


def _squares(grads: Sequence[Mapping[str, np.ndarray]], solved: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    return np.array(
        [
            [sum(float((x[name] * y[name]).sum()) for name in x) for x, y in zip(one, other, strict=True)]
            for one, other in ((grads, grads), (grads, solved), (solved, solved))
        ]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_squares_are_those_of_the_dense_inverse(kind: str) -> None:
    run = exact.attribute(exact.gpt2(), MEASURED, f"curvature.kind={kind}", "fit.labels=dataset")
    norm, own, step = expected(run, exact.gpt2())
    frame, n = run.self_influence(), run.train_size if kind != "identity" else 1
    assert frame["sequence"].tolist() == run.sequences["sequence"].tolist()
    assert frame.attrs["unit"] == run.unit
    for column, square in (("self_influence", own / n), ("norm", np.sqrt(norm)), ("step", np.sqrt(step) / n)):
        assert reference.difference(frame[column], square) <= exact.TOLERANCE
    # What scores are divided by, θ- and ℓ-RelatIF among it.
    scores = run.scores().to_numpy()
    divisors: dict[Any, np.ndarray] = {
        "norm": np.sqrt(norm),
        "self-influence": np.sqrt(own / n),
        "step": np.sqrt(step) / n,
    }
    for by, divisor in divisors.items():
        assert reference.difference(run.scores(by), scores / divisor) <= 1e-8
        assert run.scores(by).attrs["unit"] == run.top(run.queries[0], normalise=by).attrs["unit"] != run.unit
        best = run.top(run.queries[0], 3, normalise=by)
        order = np.argsort(-scores[0] / divisor)[:3]
        assert best["sequence"].tolist() == run.sequences["sequence"].to_numpy()[order].tolist()


def test_of_experts() -> None:
    model = build("mixtral", torch.float64, exact.VOCAB)
    some = 'model.layers=["*.experts.*.down_proj"]'
    run = exact.attribute(model, MEASURED, some, "fit.labels=dataset")
    found = run.squares[1]
    for one, other in zip(found, expected(run, unfused(model)), strict=True):
        assert reference.difference(one, other) <= 1e-6  # routers round to float32


def test_a_sequence_that_influences_itself() -> None:
    """Asked for the whole of a text, the influence of that text is its self-influence."""
    text = exact.TEXTS[4].split()
    asked = [{"prompt": text[0], "completion": " ".join(text[1:])}]
    run = exact.attribute(exact.gpt2(), MEASURED, queries=asked)
    own = run.self_influence().set_index("sequence")["self_influence"]
    assert reference.difference([run.scores().to_numpy()[0, 4]], [own["4"]]) <= 1e-10
    assert run.top(run.queries[0], 1, normalise="self-influence")["sequence"].tolist() == ["4"]  # Cauchy-Schwarz


# ---------------------------------------------------------------------------------------------- bits


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "llama")


@pytest.fixture(scope="module")
def usual(inputs: Inputs) -> raylux.Run:
    return inputs.run(inputs.base / "usual", MEASURED)


def same(run: raylux.Run, usual: raylux.Run) -> None:
    assert np.array_equal(run.squares[0], usual.squares[0]) and len(usual.squares[0]) == 60
    assert np.array_equal(run.squares[1], usual.squares[1])


def test_over_layer_passes(inputs: Inputs, usual: raylux.Run, tmp_path: Path) -> None:
    same(inputs.run(tmp_path / "passes", MEASURED, "fit.passes=3"), usual)


def test_alone_afterwards_and_for_some_first(inputs: Inputs, usual: raylux.Run, tmp_path: Path) -> None:
    """Nothing is kept of the fit, candidates come in two lots, and scores were there before."""
    before = inputs.run(tmp_path / "run", "engine.keep_captured=never", "prefilter.kind=idf", "prefilter.top=7")
    for ask in (before.self_influence, lambda: before.scores("norm")):
        with pytest.raises(MissingStageError, match=r"raylux score CONFIG score\.self_influence=true"):
            ask()
    inputs.run(tmp_path / "run", MEASURED, "prefilter.kind=idf", "prefilter.top=7")
    run = inputs.run(tmp_path / "run", MEASURED)
    assert len(RunFolder(run.folder).committed(SQUARES)) > len(RunFolder(usual.folder).committed(SQUARES))
    same(run, usual)


def test_an_interrupted_pass_goes_on(
    inputs: Inputs, usual: raylux.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Interrupt(patch, GradientWorker, "squares_unit", 3, True)
        with pytest.raises(KeyboardInterrupt):
            inputs.run(tmp_path / "run", MEASURED)
    folder = RunFolder(str(tmp_path / "run"))
    there = folder.committed(SQUARES)
    assert len(there) == 2
    calls = Interrupt(monkeypatch, GradientWorker, "squares_unit", 100, True)
    same(inputs.run(tmp_path / "run", MEASURED), usual)
    assert 100 - calls.left == len(folder.committed(SQUARES)) - 2 > 0 and there < folder.committed(SQUARES)


def test_half_precision_is_near(inputs: Inputs, usual: raylux.Run, tmp_path: Path) -> None:
    run = inputs.run(tmp_path / "run", MEASURED, "engine.contraction_dtype=bfloat16")
    for one, other in zip(run.squares[1], usual.squares[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=0.03)


# -------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_divided(inputs: Inputs, usual: raylux.Run, tmp_path: Path) -> None:
    run = inputs.run(tmp_path / "run", "curvature.kind=cosine")
    with pytest.raises(UserError, match="cosines are normalised as they are"):
        run.top("a", normalise="norm")
    with pytest.raises(UserError, match="no such way to normalise scores, 'length'"):
        usual.scores("length")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="known of its sequences alone"):
        usual.top("a", by="document", normalise="norm")


def test_the_status_counts_them(usual: raylux.Run) -> None:
    (line,) = [stage.detail for stage in usual.status() if stage.name == "score"]
    assert line.endswith("60 sequences, self-influence of 60")


def test_fields_of_the_corpus_keep_their_names_apart(inputs: Inputs, tmp_path: Path) -> None:
    from tests.small import texts, write_lines

    other = Inputs(tmp_path / "other")
    other.base.mkdir()
    other.model.symlink_to(inputs.model)
    other.ask("a")
    rows = [{"id": f"c{n}", "norm": f"n{n}", "text": text} for n, text in enumerate(texts(12))]
    write_lines(other.corpus, rows)
    frame = other.run(tmp_path / "run", MEASURED, "corpus.keep=[norm]").self_influence()
    assert frame["kept.norm"].tolist() == [f"n{n}" for n in range(12)] and (frame["norm"] > 0).all()


def test_runs_are_normalised_each_by_its_own_lengths(inputs: Inputs, usual: raylux.Run, tmp_path: Path) -> None:
    other = inputs.run(tmp_path / "run", MEASURED, "fit.seed=1")
    found = raylux.combine([usual, other]).top("a", 60, normalise="step").set_index("sequence")["influence"]
    alone = [run.scores("step").sel(query="a").to_series() for run in (usual, other)]
    wanted = (alone[0] + alone[1]) / 2
    np.testing.assert_allclose(found.loc[wanted.index], wanted, rtol=1e-5)
