"""How well removals are predicted in networks of some depth, trained with some weight decay (Basu et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import raylux
from jobs.digits.data import Digits
from jobs.digits.training import Sgd, State, forward, network, states_of, train
from raylux.evaluate.datamodel import spearman

WARM, COLD = "warm", "cold, same seed"
NOBODY = -1


@dataclass(frozen=True)
class Settings:
    """What is trained, asked and removed.

    Attributes:
        train: N.
        hidden: width of each hidden layer.
        epochs: K of the base; all go on for K/2 more.
        rate: of learning.
        damping: what λ, per example, has beside the weight decay.
        questions: test points of the largest loss, that are asked about.
        removed: points that are removed, those of the largest mean influence, whatever its sign, on the questions.
        first: seed of the first repetition.
        seeds: repetitions.
    """

    train: int = 400
    hidden: int = 16
    epochs: int = 40
    rate: float = 0.03
    damping: float = 1e-2
    questions: int = 5
    removed: int = 40
    first: int = 300
    seeds: int = 3


@dataclass(frozen=True)
class Cell:
    """One network of the grid.

    Attributes:
        depth: hidden layers.
        decay: weight decay.
        seed: of the split, the start and the batches.
        loss: of training, the decay's term apart, at the end of the base.
        accuracy: on the test set.
        correlation: truth -> Spearman's ρ between predicted and measured changes of log p over the removals, of each
            question.
    """

    depth: int
    decay: float
    seed: int
    loss: float
    accuracy: float
    correlation: dict[str, list[float]]


def cell(settings: Settings, depth: int, decay: float, seed: int, folder: Path) -> Cell:
    """Train a network, ask for influence, remove the points that it names, warm and cold.

    Args:
        settings: of the study.
        depth: hidden layers.
        decay: weight decay.
        seed: of everything that is drawn.
        folder: for the run.
    """
    digits, sgd = Digits.split(seed, settings.train), Sgd(settings.rate, decay=decay)
    model, half = started(network(settings.hidden, seed, depth=depth)), settings.epochs // 2

    def trained(states: State, out: torch.Tensor, epochs: int, first: int = 0) -> State:
        return train(states, digits.x, digits.y, out, epochs, seed, sgd, first)

    fresh = states_of(model, 1)
    base = trained(dict(fresh), torch.tensor([NOBODY]), settings.epochs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(base[name][0])
        logits, unseen = model(digits.x), model(digits.test_x)
        losses = nn.functional.cross_entropy(unseen, digits.test_y, reduction="none")
    asked = losses.topk(settings.questions).indices
    predicted = -_influence(settings, model, digits, asked, decay, folder)
    removed = torch.as_tensor(np.abs(predicted).mean(0)).topk(settings.removed).indices
    out = torch.cat([removed, torch.tensor([NOBODY])])
    start = {name: value.expand(len(out), *value.shape[1:]).clone() for name, value in fresh.items()}
    states = {
        WARM: trained(states_of(model, len(out)), out, half, settings.epochs),
        COLD: trained(trained(start, out, settings.epochs), out, half, settings.epochs),
    }
    return Cell(
        depth, decay, seed,
        float(nn.functional.cross_entropy(logits, digits.y)),
        float((unseen.argmax(1) == digits.test_y).double().mean()),
        {
            truth: spearman(predicted[:, removed.numpy()].T, _changes(found, digits, asked).T).tolist()
            for truth, found in states.items()
        },
    )  # fmt: skip


def started(model: nn.Module) -> nn.Module:
    """With weights so large that a signal keeps its size (Glorot & Bengio 2010): torch's own fade in eight layers."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, nn.init.calculate_gain("tanh"))
    return model


def _influence(
    settings: Settings, model: nn.Module, digits: Digits, asked: torch.Tensor, decay: float, folder: Path
) -> np.ndarray:
    """Of every training point on log p of each question's class, [questions, N], by the exact damped Gauss-Newton
    matrix; the decay's term is a part of λ."""
    run = raylux.attribute(
        model, None, digits.pairs(), digits.questions(asked), folder=folder,
        overrides=[
            f"curvature.damping={settings.damping + decay}", f"fit.sequences={settings.train}", "query.max_error=0",
            "curvature.solver=pcg", "curvature.iterations=400", "curvature.tolerance=1e-4",
        ],
    )  # fmt: skip
    return run.scores().to_numpy().astype(float)


def _changes(states: State, digits: Digits, asked: torch.Tensor) -> np.ndarray:
    """By how much log p of each question's class is other than with nothing left out, [questions, removed]."""
    labels = digits.test_y[asked]
    found = forward(states, digits.test_x[asked]).log_softmax(2)[:, torch.arange(len(labels)), labels]
    return (found[:-1] - found[-1]).T.numpy()
