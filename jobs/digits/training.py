"""Many copies of one small network trained at once, each without a point of its own, on the same batches."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from jobs.digits.data import CLASSES

State = dict[str, Tensor]
"""Parameters by name; of R networks [R, ...]."""


def network(hidden: int, seed: int, inputs: int = 64, depth: int = 2) -> nn.Module:
    """A tanh MLP of ``depth`` hidden layers, float64, as torch starts one."""
    torch.manual_seed(seed)
    widths = [inputs, *[hidden] * depth]
    layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(hidden, CLASSES)).double()


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent.

    Attributes:
        rate: of learning.
        momentum: of it.
        batch: points of a step.
        decay: μ of a term (μ/2)‖θ‖² in the loss.
    """

    rate: float
    momentum: float = 0.9
    batch: int = 32
    decay: float = 0.0


def states_of(model: nn.Module, count: int) -> State:
    """The parameters of a network, ``count`` times."""
    return {name: p.detach().expand(count, *p.shape).clone() for name, p in model.named_parameters()}


def train(
    states: State,
    x: Tensor,
    y: Tensor,
    left_out: Tensor,
    epochs: int,
    order: int,
    sgd: Sgd,
    first: int = 0,
    pull: float = 0.0,
) -> State:
    """Go on with each network for some epochs over the same batches.

    Args:
        states: where they are; [R, ...].
        x: [N, 64].
        y: [N].
        left_out: [R] the point whose loss does not count for a network, -1 for none.
        epochs: how many.
        order: seed of the batches; an epoch's are drawn from it and the epoch's number.
        sgd: how.
        first: number of the first of these epochs.
        pull: μ of a term (μ/2)‖θ − θ₀‖² towards where they are.
    """
    start = {name: value.clone() for name, value in states.items()}
    speed = {name: torch.zeros_like(value) for name, value in states.items()}

    for epoch in range(first, first + epochs):
        generator = torch.Generator().manual_seed(1_000_003 * order + epoch)
        shuffled = torch.randperm(len(x), generator=generator)
        for rows in shuffled.split(sgd.batch):
            own = {name: value.requires_grad_(True) for name, value in states.items()}
            logits = forward(own, x[rows])
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1), y[rows].repeat(len(logits)), reduction="none"
            ).view(logits.shape[:2])
            # A point that is left out takes its part of the mean with it: the others weigh what they did. The networks
            # have nothing to do with one another, so the gradient of the sum is that of each.
            total = (losses * (rows != left_out[:, None])).sum() / len(rows)
            gradients = torch.autograd.grad(total, list(own.values()))
            with torch.no_grad():
                for name, gradient in zip(own, gradients, strict=True):
                    drawn = pull * (own[name] - start[name]) + sgd.decay * own[name]
                    speed[name].mul_(sgd.momentum).add_(gradient + drawn)
                    states[name] = (own[name] - sgd.rate * speed[name]).detach()
    return states


def forward(states: State, x: Tensor) -> Tensor:
    """Logits [R, n, classes] of points x [n, 64] by every network."""
    count = len(next(iter(states.values())))
    h = x.expand(count, *x.shape)
    names = [name.removesuffix(".weight") for name in states if name.endswith(".weight")]
    for place, name in enumerate(names):
        h = torch.baddbmm(states[f"{name}.bias"][:, None], h, states[f"{name}.weight"].mT)
        h = h if place + 1 == len(names) else h.tanh()
    return h
