"""What the logits of a model are about: the next token at every position, or one class of a whole example.

Everything after the logits (loss, labels drawn from the model, capture of a and g, curvature, solves, scores) is the
same for all. The label of a class stands at the first position of its sequence, all others carry none: so batches,
keys of sampled labels and what is kept of them are those of a language model.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raylux.batches import IGNORED, Batch
from raylux.classes import is_classifier
from raylux.modules import features_of, logits_of

Call = Callable[..., Any]
"""A model, or what runs it with other weights."""


class Task(ABC):
    """How a batch runs through a model. Legend: B rows, T tokens, K places of a row that have logits, V entries."""

    takes_places = False
    """Whether logits can be asked for at some places alone."""

    @abstractmethod
    def logits(self, call: Call, batch: Batch, places: Tensor | slice = slice(None)) -> Tensor:
        """[B, K, V], or [B, V] where K is 1; [1, n, V] at n flat ``places`` of a single row."""

    @abstractmethod
    def targets(self, batch: Batch) -> Tensor:
        """The label of each place [B, K] int64, -100 where no loss is taken."""

    @abstractmethod
    def where(self, batch: Batch) -> Tensor:
        """Where in its own sequence the label of each place stands [B, K]: a draw must not depend on padding."""

    @abstractmethod
    def labels(self, batch: Batch, targets: Tensor) -> Tensor:
        """Labels of places [B, K] as labels of the batch [B, T]."""


class NextToken(Task):
    """A causal language model: the logits of a token are for the one after it.

    Args:
        model: called as ``model(input_ids=…, attention_mask=…)``, returns an object with ``logits`` [B, T, V].
    """

    def __init__(self, model: nn.Module) -> None:
        takes = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in takes
        self.takes_places = "logits_to_keep" in takes
        self._spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1

    def logits(self, call: Call, batch: Batch, places: Tensor | slice = slice(None)) -> Tensor:
        # The model picks them of states that may lie on another device than the batch; numbers lie on none.
        extra: dict[str, Any] = {}
        if not isinstance(places, slice):
            extra["logits_to_keep"] = places.tolist() if self._spread else places
        if self._takes_positions:
            extra["position_ids"] = _positions(batch)
        found: Tensor = call(
            input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False, **extra
        ).logits
        return found

    def targets(self, batch: Batch) -> Tensor:
        targets = torch.full_like(batch.labels, IGNORED)
        targets[:, :-1] = batch.labels[:, 1:]
        return targets

    def where(self, batch: Batch) -> Tensor:
        place = torch.zeros_like(batch.labels)
        place[:, :-1] = _positions(batch)[:, 1:]
        return place

    def labels(self, batch: Batch, targets: Tensor) -> Tensor:
        labels = batch.labels.clone()
        labels[:, 1:] = targets[:, :-1]
        return labels


class OneClass(Task):
    """A classifier of texts: one row of logits over its classes, for the whole sequence.

    No positions are handed over: models count them from the left, some from another number than 0. So padding stands
    on the right, and is the model's own padding token, by which some of them find the end of a text.

    Args:
        padding: id of the padding token.
    """

    def __init__(self, padding: int) -> None:
        self._padding = padding

    def logits(self, call: Call, batch: Batch, places: Tensor | slice = slice(None)) -> Tensor:
        ids = batch.input_ids.masked_fill(~batch.mask, self._padding)
        found: Tensor = call(input_ids=ids, attention_mask=batch.mask.long()).logits
        return found

    def targets(self, batch: Batch) -> Tensor:
        return batch.labels[:, :1].clone()

    def where(self, batch: Batch) -> Tensor:
        return torch.zeros_like(batch.labels[:, :1])

    def labels(self, batch: Batch, targets: Tensor) -> Tensor:
        labels = batch.labels.clone()
        labels[:, :1] = targets
        return labels


class FeatureClass(OneClass):
    """A module in memory: the one token of an example is its features.

    Args:
        dtype: of the module.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(0)
        self._dtype = dtype

    def logits(self, call: Call, batch: Batch, places: Tensor | slice = slice(None)) -> Tensor:
        features = batch.input_ids[:, 0]
        return logits_of(call(features.to(self._dtype) if features.is_floating_point() else features))


def task_of(model: nn.Module) -> Task:
    """What a model's logits are about."""
    if features_of(model) is not None:
        return FeatureClass(next(model.parameters()).dtype)
    if is_classifier(model):
        padding = getattr(model.config, "pad_token_id", None)
        return OneClass(0 if padding is None else int(padding))
    return NextToken(model)


def _positions(batch: Batch) -> Tensor:
    """[B, T] each token's place in its own sequence, wherever the padding stands; 0 on padding before it."""
    return (batch.mask.long().cumsum(1) - 1).clamp_(min=0)
