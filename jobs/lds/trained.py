"""The model of all texts as it is trained: after each epoch its weights, what rates it took, and AdamW's moments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from jobs.lds.retrain import FIRST_SEED
from jobs.lds.study import Study
from raylux.demo.training import train_model
from raylux.layers import coverage


@dataclass(frozen=True)
class Checkpoint:
    """The model after an epoch.

    Attributes:
        model: as it is then.
        rate: learning rate of the step before.
        spent: learning rates of all steps until then, summed.
        moments: tracked layer -> AdamW's second moment of each weight [P, M], bias-corrected.
    """

    model: PreTrainedModel
    rate: float
    spent: float
    moments: dict[str, Tensor]


def train(study: Study) -> list[Checkpoint]:
    """The model of all texts after each epoch."""
    found: list[Checkpoint] = []
    with _watched() as steps:

        def watch(epoch: int, rate: float, model: PreTrainedModel) -> None:
            copy = type(model)(model.config)
            copy.load_state_dict(model.state_dict())
            found.append(Checkpoint(copy.eval(), rate, sum(steps.rates), _moments(model, steps.optimizer)))

        start = study.start(FIRST_SEED)
        train_model(study.texts, study.tokenizer, study.settings.training(FIRST_SEED), watch=watch, start=start)
    return found


@dataclass
class _Steps:
    """What was seen of the optimizer: itself, and the learning rate of each of its steps."""

    optimizer: Any
    rates: list[float]


@contextmanager
def _watched() -> Iterator[_Steps]:
    steps = _Steps(None, [])

    def seen(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        steps.optimizer = optimizer
        steps.rates.append(float(optimizer.param_groups[0]["lr"]))

    handle = register_optimizer_step_post_hook(seen)
    try:
        yield steps
    finally:
        handle.remove()


def _moments(model: PreTrainedModel, optimizer: Any) -> dict[str, Tensor]:
    found = {}
    for layer in coverage(model).tracked:
        state = optimizer.state[model.get_submodule(layer.name).weight]
        kept = 1 - optimizer.param_groups[0]["betas"][1] ** float(state["step"])
        found[layer.name] = state["exp_avg_sq"].clone() / kept
    return found
