"""Activations in one operation against those of transformers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation

from raylux.batches import IGNORED, TokenRow, collate
from raylux.capture import Capture
from raylux.fused import fuse_activations
from raylux.models import coverage
from tests.architectures import build


@pytest.mark.parametrize(("activation", "bound"), [("gelu_new", 1e-12), ("gelu_fast", 1e-8)])
def test_a_model_has_the_same_inputs_gradients_and_loss(activation: str, bound: float) -> None:
    """``gelu_fast`` has its constant to ten digits."""
    model = build("gpt2", torch.float64, activation_function=activation)
    fused = copy.deepcopy(model)
    assert fuse_activations(fused) == 2 and fuse_activations(fused) == 0
    tokens = np.random.default_rng(0).integers(0, 128, 30).astype(np.int32)
    batch = collate([TokenRow(tokens, np.concatenate([[IGNORED], tokens[1:]]).astype(np.int32))], [0], 30)
    plain, found = (Capture(each, coverage(each, None).tracked).run(batch) for each in (model, fused))
    assert torch.allclose(found.loss, plain.loss, rtol=bound, atol=0)
    for ours, theirs in ((found.inputs, plain.inputs), (found.grads, plain.grads)):
        assert list(ours) == list(theirs)
        for name, wanted in theirs.items():
            assert isinstance(wanted, torch.Tensor)
            assert float((ours[name] - wanted).norm() / wanted.norm()) <= bound


def test_only_what_is_known_is_replaced() -> None:
    class Own(NewGELUActivation):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    model = nn.Sequential(NewGELUActivation(), Own(), nn.Sequential(FastGELUActivation()), nn.SiLU())
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    wanted = model(x)
    assert fuse_activations(model) == 2
    assert [type(module).__name__ for module in model] == ["GELU", "Own", "Sequential", "SiLU"]
    assert torch.allclose(model(x), wanted, rtol=1e-8)
