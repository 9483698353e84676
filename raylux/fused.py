"""Activations of a loaded model as one operation each: the same function, in fewer passes over memory.

transformers writes the tanh form of GELU (Hendrycks & Gimpel 2016) as eight elementwise operations, so that a forward
and backward pass reads and writes the widest activations of a GPT-2 some twenty times; torch has it in one.
"""

from __future__ import annotations

from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation

# 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), with √(2/π) in full or to ten digits.
_TANH_GELU = (NewGELUActivation, FastGELUActivation)


def fuse_activations(model: nn.Module) -> int:
    """Replace them in place; returns how many. What a subclass computes is its own, and stays."""
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in _TANH_GELU
    ]
    for parent, name in found:
        setattr(parent, name, nn.GELU(approximate="tanh"))
    return len(found)
