"""The head of a language model, where it is a linear map alone: a backward pass may then begin at what it reads."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from raylux.loss import Labeller, OutputLoss, hidden_loss, logit_loss

# Names that configs have for a factor of the logits, or for a bound that they are bent to.
_CHANGED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "logits_soft_cap")


def linear_head(model: nn.Module, tracked: Collection[str]) -> nn.Linear | None:
    """The module that makes logits of hidden states, where its weight alone tells the gradient by these.

    Args:
        model: any.
        tracked: names of layers whose own gradients are wanted: the head must not be among them.
    """
    found: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if type(found) is not nn.Linear or any(model.get_submodule(name) is found for name in tracked):
        return None
    return found


def ends_in_head(model: nn.Module, tracked: Collection[str]) -> bool:
    """Whether the logits will be what a linear head gives, as far as a config tells: a run looks at the tensors."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    changed = any(getattr(config, name, None) not in (None, 1.0) for name in _CHANGED)
    return linear_head(model, tracked) is not None and not changed


@dataclass
class End:
    """Where a backward pass begins.

    Attributes:
        place: the logits, or what their head read.
        head: whose weight leads from one to the other; None where they are one.
    """

    place: Tensor
    head: nn.Linear | None

    def losses(self, logits: Tensor, targets: Tensor, labeller: Labeller | None, both: bool) -> list[OutputLoss]:
        """Of flat logits, gradients by the place; else as ``logit_loss``."""
        if self.head is None:
            return logit_loss(logits, targets, labeller, both)
        with _weight(self.head) as weight:
            found = hidden_loss(logits, weight, targets, labeller, both)
        return [replace(one, gradient=one.gradient.to(self.place.device)) for one in found]


def end_of(head: nn.Linear | None, read: Tensor | None, logits: Tensor) -> End:
    """What a head read, where the logits are what it gave of it, all in one precision.

    On whichever devices the parts of a model lie, the choice is the same: it decides about bits.

    Args:
        head: as ``linear_head`` found it.
        read: None where something else comes between.
        logits: that the model gave.
    """
    if head is None or read is None or not read.requires_grad:
        return End(logits, None)
    return End(read, head) if read.dtype == logits.dtype == head.weight.dtype else End(logits, None)


@contextmanager
def _weight(head: nn.Linear) -> Iterator[Tensor]:
    """A head's weight, brought by accelerate's hook where it is read each time the head runs."""
    hook: Any = getattr(head, "_hf_hook", None)
    if hook is None or not head.weight.is_meta:
        yield head.weight
        return
    hook.pre_forward(head)
    try:
        yield head.weight
    finally:
        hook.post_forward(head, None)
