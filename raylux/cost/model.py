"""A model's shapes, and the FLOPs and bytes of its forward and backward pass for one token.

The backward pass computes gradients of outputs only (DESIGN, decision 5): a linear map costs it what it costs the
forward pass, twice the entries of its weight, and nothing below the lowest layer that is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from raylux.heads import ends_in_head
from raylux.layers import Coverage, TrackedLayer, token_share
from raylux.models import logit_width
from raylux.placement import Placement

# How often the numbers of a token are written or read beside the products, by forward and backward together: those
# of the residual stream (norms, residuals, positions), and those of the MLP's wide outputs (activation, gate).
_HIDDEN_PASSES, _WIDE_PASSES = 48, 7
# Activations that are spelled out in single operations instead of one (``raylux.fused`` makes one of the others).
_SPELLED_OUT = {"quick_gelu": 16}
# How often numbers of the vocabulary's width are written or read: the softmax and its gradient; drawing labels of it;
# the gradient on given labels beside that on the drawn ones. A linear head takes less, and nothing for other labels.
_VOCABULARY_PASSES, _DRAWING_PASSES, _GIVEN_PASSES = 16, 4, 6
_LINEAR_HEAD_PASSES = 14
# Of the elementwise work of both passes, what the backward pass has.
_BACKWARD_SHARE = 0.6


@dataclass(frozen=True)
class ModelShape:
    """Shapes alone.

    Attributes:
        tracked: layers, in the order in which the model runs them.
        groups: layer -> leader of its input group.
        parameters: of the whole model, tied ones once.
        linears: (name, entries of its weight) of every linear map, the head included; an expert's entries by its
            share of the tokens.
        blocks: transformer blocks.
        hidden: width of the residual stream.
        attention: heads × head size.
        vocabulary: V, entries of a row of logits: a classifier's are its classes.
        wide_passes: times that a number of the MLP's wide outputs is read or written beside the products.
        activation: of the MLP, "gelu" or "silu" in any form, or another's name.
        gated: of two wide outputs one is activated and multiplied by the other.
        checkpointing: blocks keep their inputs alone, and run again in the backward pass.
        placement: of its parts, where a worker does not hold them all on one device.
        linear_head: the logits are a linear map of what the head reads, by which gradients of the loss are taken.
    """

    tracked: tuple[TrackedLayer, ...]
    groups: Mapping[str, str]
    parameters: int
    linears: tuple[tuple[str, int], ...]
    blocks: int
    hidden: int
    attention: int
    vocabulary: int
    wide_passes: int = _WIDE_PASSES
    activation: str = ""
    gated: bool = False
    checkpointing: bool = False
    placement: Placement | None = None
    linear_head: bool = False

    @classmethod
    def of(cls, model: nn.Module, covered: Coverage, groups: Mapping[str, str]) -> ModelShape:
        """From a model that may lie on the meta device."""
        config: Any = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        linears = tuple(
            (name, round(module.weight.numel() * token_share(model, name, module)))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and isinstance(module.weight, nn.Parameter)
        )
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        activation = str(getattr(config, "hidden_act", None) or getattr(config, "activation_function", None))
        size = getattr(config, "head_dim", None) or hidden // heads
        return cls(
            covered.tracked,
            dict(groups),
            covered.parameters,
            linears,
            int(config.num_hidden_layers),
            hidden,
            heads * int(size),
            logit_width(model),
            _SPELLED_OUT.get(activation, _WIDE_PASSES),
            next((name for name in ("gelu", "silu") if name in activation), activation),
            any(name.rpartition(".")[2].startswith("gate") for name, _ in linears),
            linear_head=ends_in_head(model, [layer.name for layer in covered.tracked]),
        )

    def run_by(self, checkpointing: bool, placement: Placement | None) -> ModelShape:
        """The same model, checkpointed or over several devices; what is read anew is checkpointed in any case.

        Over several devices what a linear head spares is left out of account: each counts by itself.
        """
        reads = placement is not None and bool(placement.reads)
        linear = self.linear_head and placement is None
        return replace(self, checkpointing=checkpointing or reads, placement=placement, linear_head=linear)

    @cached_property
    def leaders(self) -> frozenset[str]:
        return frozenset(self.groups.values())

    def forward_flops(self, tokens: float) -> float:
        """Of a token in a sequence of ``tokens``: 2 per weight, and 4·T per head coordinate and block."""
        return 2.0 * sum(size for _, size in self.linears) + self.attention_flops(tokens)

    def attention_flops(self, tokens: float) -> float:
        """Of a token in the forward pass's attention."""
        return 4.0 * tokens * self.attention * self.blocks

    def again_flops(self, tokens: float) -> float:
        """Of a token in blocks that run again, one time."""
        return self.forward_flops(tokens) - 2.0 * self.hidden * self.vocabulary if self.checkpointing else 0.0

    def backward_flops(self, tokens: float, lowest: str | None = None) -> float:
        """Of a token, down to the layer ``lowest`` (default: the lowest tracked one), without weight gradients."""
        lowest = lowest or self.tracked[0].name
        names = [name for name, _ in self.linears]
        # Neither the lowest layer nor those that share its input hand a gradient further down.
        members = {name for name, leader in self.groups.items() if leader == self.groups[lowest]}
        above = self.linears[names.index(lowest) :]
        linear = sum(size for name, size in above if name not in members)
        return 2.0 * linear + self.attention_backward_flops(tokens, lowest)

    def attention_backward_flops(self, tokens: float, lowest: str | None = None) -> float:
        """Of a token in the backward pass's attention, down to the layer ``lowest``."""
        blocks = self.blocks - 1 - block_of(lowest or self.tracked[0].name)
        return 8.0 * tokens * self.attention * blocks

    def pass_bytes(self, itemsize: int, drawn: bool = False) -> float:
        """Bytes that the elementwise work of a token's forward and backward pass moves; ``drawn``: with its label."""
        passes = _LINEAR_HEAD_PASSES if self.linear_head else _VOCABULARY_PASSES
        vocabulary = passes + (_DRAWING_PASSES if drawn else 0)
        return self._block_bytes(itemsize) + float(4 * vocabulary * self.vocabulary)

    def again_bytes(self, itemsize: int) -> float:
        """Bytes of the elementwise work of a second backward pass, on other labels."""
        passes = 0 if self.linear_head else _GIVEN_PASSES
        return _BACKWARD_SHARE * self._block_bytes(itemsize) + float(4 * passes * self.vocabulary)

    @property
    def spared_flops(self) -> float:
        """Of a token in a second backward pass of the same batch: those of the head, which is multiplied once."""
        return 2.0 * self.hidden * self.vocabulary if self.linear_head else 0.0

    def _block_bytes(self, itemsize: int) -> float:
        block = _HIDDEN_PASSES * self.hidden + self.wide_passes * self._wide()
        return float(itemsize * self.blocks * block)

    @property
    def activated(self) -> float:
        """Numbers of a token that go through an activation."""
        return self.blocks * self._wide() / (2 if self.gated else 1)

    def activation_bytes(
        self, itemsize: int, wanted: Sequence[TrackedLayer], blocks: int | None = None, logits: bool = True
    ) -> float:
        """Bytes of a token at the peak of a pass: what backward needs, the logits, and the captured a and g.

        Of one device of several: ``wanted`` and ``blocks`` are those on it, ``logits`` whether they are there.
        """
        own = self.blocks if blocks is None else blocks
        block = 8 * self.hidden + 3 * self._wide()
        saved = (own * self.hidden + block if self.checkpointing else own * block) * itemsize
        # The logits, and their gradients on two sets of labels; or of some rows of a block at a time.
        per_entry = 2 * itemsize if self.linear_head else itemsize + 8
        heads = self.vocabulary * per_entry if logits else 0
        captured = itemsize * sum(
            layer.share * (layer.outputs + (layer.inputs if layer.name in self.leaders else 0)) for layer in wanted
        )
        return float(saved + heads + captured)

    def _wide(self) -> float:
        """Outputs of all tracked layers of a block that are wider than the residual stream, or that stream."""
        wide = sum(layer.share * layer.outputs for layer in self.tracked if layer.outputs > self.hidden)
        return max(float(self.hidden), wide / self.blocks)


def block_of(name: str) -> int:
    """The number in a module's path: its block."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)
