"""A model in float64 throughout: what a library computes in float32 whatever the model's dtype is put right."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Two ways to compute a norm that differ by more than this are not the same norm in two precisions.
_ALIKE = 1e-5


def exact_norms(model: nn.Module) -> int:
    """Have the RMS norms of a float64 model compute in float64; how many there were.

    The norms of transformers round to float32 and back. A measured difference of two nearly equal log-probabilities
    would be made of these roundings. A module is taken for such a norm where it has its two attributes, a weight and
    ``variance_epsilon``, and gives what an RMS norm gives, to float32's precision; it is changed in place.
    """
    found = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1 and hasattr(module, "variance_epsilon"):
            probe = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            probe = probe.to(weight.device, weight.dtype)
            with torch.no_grad():
                usual, exact = module(probe), _rms_norm(module, probe)
            if usual.shape == exact.shape and bool((usual - exact).abs().max() <= _ALIKE * exact.abs().max()):
                module.forward = MethodType(_rms_norm, module)
                found += 1
    return found


def _rms_norm(module: Any, hidden_states: Tensor) -> Tensor:
    """w ∘ x / √(mean(x²) + ε)."""
    scale = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * (hidden_states * scale)
