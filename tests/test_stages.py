"""Stages of a training: what a sequence of pre-training did to the fine-tuned model, against dense matrices, refits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import raylux
from raylux.cli import main
from raylux.errors import UserError
from tests import reference
from tests import test_exact as exact
from tests import test_modules as modules
from tests.small import Inputs, make_inputs
from tests.test_combined import attribute, moved

# ------------------------------------------------------------------------------------------ dense matrices


def expected(runs: Sequence[raylux.Run], models: Sequence[Any], kind: str) -> np.ndarray:
    """Influence of the first stage's sequences on the last one's model [Q, N]; the last stage's run and model first."""
    layers = runs[0].settings["model"]["layers"]
    carried = [reference.question_gradient(models[0], layers, question) for question in exact.QUESTIONS]
    sequences = [reference.gradients(models[-1], layers, example) for example in exact.corpus_of(runs[-1])]
    total = np.zeros((len(carried), len(sequences)))
    for run, model in zip(runs, models, strict=True):
        fit = exact.fitted_on(run)
        grads = [reference.gradients(model, layers, example) for example in fit]
        pairs = [reference.token_pairs(model, layers, example) for example in fit]
        for name in layers:
            dense = reference.curvature(kind, [g[name] for g in grads], [p[name] for p in pairs])
            for place, query in enumerate(carried):
                solved = dense.solve(query[name], "auto")
                query[name] = dense.damping("auto") * solved
                if run is runs[-1]:
                    total[place] -= [float((solved * sequence[name]).sum()) for sequence in sequences]
    return total / len(sequences)


@pytest.mark.parametrize(("kind", "basis", "stages"), [("ekfac", "eigen", 2), ("diagonal", "standard", 3)])
def test_queries_go_back_through_later_stages(kind: str, basis: str, stages: int, tmp_path: Path) -> None:
    """Each stage with a corpus and a model of its own; N is that of the first."""
    models = [exact.gpt2(), *(moved(seed) for seed in range(1, stages))]
    how = (f"curvature.kind={kind}", f"query.basis={basis}", "fit.labels=dataset")
    runs: list[raylux.Run] = []
    for place, model in enumerate(models):
        after = [f"query.carried_from={runs[-1].folder}"] if runs else []
        texts = exact.TEXTS if place == stages - 1 else exact.TEXTS[place : 12 + place]
        runs.append(attribute(model, tmp_path / str(place), *how, *after, train=texts))
    assert runs[-1].unit == "nats" and runs[-1].train_size == len(exact.TEXTS)
    assert reference.difference(runs[-1].scores(), expected(runs, models, kind)) < 1e-9


# ------------------------------------------------------------------------------------------------- refits


def fitted(train: list[tuple[Tensor, int]], weights: Tensor, near: Tensor, damping: float) -> Tensor:
    """[P, M + 1] of a linear classifier: argmin Σ_n w_n L_n / N + λ/2 ‖θ − near‖², by Newton's method."""
    x = torch.stack([torch.cat([row, row.new_ones(1)]) for row, _ in train])
    y = torch.tensor([label for _, label in train])

    def objective(flat: Tensor) -> Tensor:
        loss = functional.cross_entropy(x @ flat.view_as(near).T, y, reduction="none")
        return (weights * loss).sum() / len(y) + damping / 2 * (flat - near.reshape(-1)).square().sum()

    found = near.reshape(-1).clone()
    for _ in range(8):
        gradient: Any = torch.func.grad(objective)(found)
        found = found - torch.linalg.solve(torch.func.hessian(objective)(found), gradient)
    return found.view_as(near)


def model_of(parameters: Tensor) -> nn.Module:
    model = nn.Linear(parameters.shape[1] - 1, len(parameters)).double().eval()
    with torch.no_grad():
        model.weight.copy_(parameters[:, :-1])
        model.bias.copy_(parameters[:, -1])
    return model


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_it_is_what_training_both_stages_again_does(kind: str, tmp_path: Path) -> None:
    """A softmax head, where both matrices are exact: a copy more or less of each sequence, and then fine-tuning."""
    rows = modules.data("linear", 24)
    first, second, asked = rows[:12], [(x + 0.5, (label + 1) % 3) for x, label in rows[12:20]], rows[20:]
    damping, proximity, start = 0.05, 0.2, torch.zeros(3, 7, dtype=torch.float64)

    def trained(weights: Tensor) -> tuple[nn.Module, nn.Module]:
        before = fitted(first, weights, start, damping)
        after = fitted(second, torch.ones(len(second), dtype=torch.float64), before, proximity)
        return model_of(before), model_of(after)

    def measured(weights: Tensor) -> list[float]:
        model = trained(weights)[1]
        return [float(modules.log_p(model, *query).detach()) for query in asked]

    whole, copies, some = torch.ones(len(first), dtype=torch.float64), 1e-3, 4
    truth = np.empty((len(asked), some))
    for place, step in enumerate(copies * torch.eye(len(first), dtype=torch.float64)[:some]):
        truth[:, place] = np.subtract(measured(whole + step), measured(whole - step)) / (2 * copies)
    before, after = trained(whole)
    how = f"curvature.kind={kind}"
    tuned = modules.attribute(after, second, asked, how, f"curvature.damping={proximity}", folder=tmp_path / "tuned")
    more = (f"curvature.damping={damping}", f"query.carried_from={tuned.folder}")
    found = modules.attribute(before, first, asked, how, *more, folder=tmp_path / "first")
    assert reference.difference(found.scores()[:, :some], truth) < 1e-6


# ------------------------------------------------------------------------------------------ what is refused

SHORT = ("fit.sequences=8", "score.token_top=0", "query.max_error=0")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def later(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> raylux.Run:
    return inputs.run(tmp_path_factory.mktemp("later") / "run", *SHORT)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("curvature.kind=identity", "query.carried_from=LATER"), r"kind=identity has no \(G \+ λ\)⁻¹"),
        (("curvature.solver=pcg", "query.carried_from=LATER"), "solver=pcg solves for a gradient of this model"),
        (("query.carried_from=[LATER, LATER]",), "twice; name each checkpoint's run once"),
        (("query.carried_from=[LATER, OTHER]",), "several runs are checkpoints of one segment"),
        (("query.carried_from=[]",), "query.carried_from' = a list of 0"),
        (("query.carried_from=nowhere",), "not a run folder"),
    ],
)
def test_what_cannot_be_a_stage(
    inputs: Inputs, later: raylux.Run, tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        inputs.run(tmp_path / "run", *SHORT, *(one.replace("LATER", later.folder) for one in overrides))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("curvature.kind=identity",), "kind=identity, which predicts no step of the weights"),
        (("curvature.kind=kfac", "curvature.damping=0"), r"λ of '.*_proj' is 0 there"),
        (("curvature.segment=0.5",), "stands for a segment of training and this one for none"),
    ],
)
def test_what_is_no_stage_to_carry_from(inputs: Inputs, tmp_path: Path, overrides: tuple[str, ...], said: str) -> None:
    other = inputs.run(tmp_path / "other", *SHORT, *overrides)
    with pytest.raises(UserError, match=said) as error:
        inputs.run(tmp_path / "run", *SHORT, f"query.carried_from={other.folder}")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_it_is_read_like_any_run_and_not_calibrated(
    inputs: Inputs, later: raylux.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = inputs.run(tmp_path / "run", *SHORT, f"query.carried_from={later.folder}")
    for command in (["top", run.folder, "--query", "a"], ["inspect", run.folder]):
        assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("through a later stage of training: sizes go by the λ of both stages") == 2
    for command in ("calibrate", "verify"):
        assert main([command, run.folder]) == 2
        assert "with query.carried_from a run predicts what its sequences do" in capsys.readouterr().err
