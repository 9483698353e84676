"""Mixtures of experts written out: a loop over experts, each a gated MLP of plain linears, as a reference.

Nothing here uses raylux. The modules are named as raylux names the matrices of experts.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Expert(nn.Module):
    """y = down(gate ∘ up), with the activation that the fused module has."""

    def __init__(self, fused: Any, expert: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linears(fused, expert)
        self.act = fused.act_fn if hasattr(fused, "act_fn") else None
        self.limit, self.alpha = getattr(fused, "limit", None), getattr(fused, "alpha", None)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.act is not None:
            return self.down_proj(self.act(gate) * up)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.down_proj((up + 1) * gate * torch.sigmoid(self.alpha * gate))


class Loop(nn.ModuleList):
    """The experts of a block, one after the other, each on the tokens that chose it."""

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self):
            token, place = torch.where(chosen == number)
            if len(token):
                out = out.index_add(0, token, expert(x[token]) * weights[token, place, None])
        return out


def unfused(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose experts are loops."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if name.endswith(".experts"):
            parent, _, leaf = name.rpartition(".")
            loop = Loop(Expert(module, expert) for expert in range(module.num_experts))
            setattr(model.get_submodule(parent), leaf, loop.requires_grad_(False))
    return model


def _linears(fused: Any, expert: int) -> list[nn.Linear]:
    """Copies of an expert's weights: gate, up, down."""
    transposed = hasattr(fused, "gate_up_proj_bias")  # GPT-OSS keeps [in, out], gate and up in turns, and biases
    both, down = (getattr(fused, name)[expert].clone() for name in ("gate_up_proj", "down_proj"))
    if not transposed:
        return [_linear(weight, None) for weight in (*both.chunk(2), down)]
    biases, own = fused.gate_up_proj_bias[expert], fused.down_proj_bias[expert]
    return [
        _linear(both[:, ::2].T, biases[::2]),
        _linear(both[:, 1::2].T, biases[1::2]),
        _linear(down.T, own),
    ]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear
