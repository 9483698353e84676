"""Training a small language model, or classifier, with more or less of some sequences: what removal is measured by.

Which sequences share a batch, and in which order batches come, goes by the seed and the *whole* corpus alone. A batch's
loss is Σ w L / T, with w the weight of a sequence, L its summed token loss and T the labelled tokens of the whole batch
whatever the weights: a sequence of weight 0 leaves a gap, one of weight 2 counts as if it came twice. So two trainings
by the same seed differ by the weights and by nothing else (common random numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raylux.batches import IGNORED, Batch, TokenRow, collate
from raylux.classes import is_classifier
from raylux.errors import NumericsError
from raylux.tasks import Call, task_of

# Steps of the warm-up are one in so many; sequences of like length share a batch, but for so many tokens of chance.
_WARM_UP, _JITTER = 20, 8
_CLIP = 1.0

Progress = Callable[[int, int, float], None]
"""Called after each step with (step, steps, loss per token)."""
Watch = Callable[[int, float, Any], None]
"""Called after each epoch with (epoch, learning rate of its last step, the model as it is then)."""


@dataclass(frozen=True)
class Recipe:
    """AdamW (β 0.9, 0.99) on the mean token loss of each batch, gradients clipped to norm 1.

    Attributes:
        epochs: passes over the corpus.
        batch_tokens: tokens of a batch with its padding, at most.
        rate: the largest learning rate; linear warm-up over a twentieth of the steps, then linear decay to zero.
        weight_decay: of AdamW.
    """

    epochs: int
    batch_tokens: int
    rate: float
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Proximity:
    """What holds some weights near where they are: λ/2 |θ − θ_s|² in the objective, Σ L / N over the sequences.

    Attributes:
        damping: λ of a parameter, by its name in the model.
        start: θ_s of each.
    """

    damping: Mapping[str, float]
    start: Mapping[str, Tensor]

    def add(self, model: nn.Module, per_sequence: float) -> None:
        """Add its gradient to what is there, of a loss that is smaller than the objective ``per_sequence`` times."""
        for name, start in self.start.items():
            parameter = model.get_parameter(name)
            pull = self.damping[name] / per_sequence * (parameter.detach() - start)
            parameter.grad = pull if parameter.grad is None else parameter.grad + pull


def train(
    model: nn.Module,
    rows: Sequence[TokenRow],
    recipe: Recipe,
    seed: int,
    weights: Sequence[float] | np.ndarray | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
    proximity: Proximity | None = None,
) -> None:
    """Train a causal LM or a classifier of transformers, in place; it is left in training mode.

    Args:
        model: its parameters want gradients.
        rows: the whole corpus.
        recipe: how.
        seed: of the order of the batches.
        weights: [N] w of each of ``rows``; default: 1, of a causal LM by its own loss (transformers takes it in
            float32).
        progress: told of each step.
        watch: shown the model after each epoch.
        proximity: holds weights near where they are.

    Raises:
        NumericsError: a loss is not finite: the learning rate is too large.
    """
    given = np.ones(len(rows)) if weights is None else np.asarray(weights, np.float64)
    lengths = [len(row.tokens) for row in rows]
    # A class stands at the first token, where a language model has nothing to predict.
    first = 0 if is_classifier(model) else 1
    labelled = np.array([int((row.labels[first:] != IGNORED).sum()) for row in rows])
    generator = torch.Generator().manual_seed(seed)
    epochs = [batches(lengths, recipe.batch_tokens, generator) for _ in range(recipe.epochs)]
    steps = sum(len(epoch) for epoch in epochs)
    warm = max(1, steps // _WARM_UP)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
    )
    model.train()
    step = 0
    for epoch, order in enumerate(epochs, start=1):
        for batch in order:
            step += 1
            optimizer.zero_grad(set_to_none=True)
            kept = [place for place in batch if given[place] != 0]
            loss = torch.zeros(())
            if kept:
                own = None if weights is None and first else given[kept] / max(1, labelled[batch].sum())
                loss = _backward(model, [rows[place] for place in kept], own)
            if proximity is not None:
                proximity.add(model, labelled.mean())
            if not torch.isfinite(loss):
                raise NumericsError(f"training: the loss is not finite at step {step} of {steps}; lower the rate")
            nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            rate = float(schedule.get_last_lr()[0])
            optimizer.step()  # what has no gradient stays as it is
            schedule.step()
            if progress is not None:
                progress(step, steps, float(loss))
        if watch is not None:
            watch(epoch, rate, model)


def _backward(model: nn.Module, rows: Sequence[TokenRow], weights: np.ndarray | None) -> Tensor:
    """Leave the gradient of Σ weight · summed token loss, or of the mean token loss; returns its value."""
    batch = collate(rows, range(len(rows)), max(len(row.tokens) for row in rows)).to(_device(model))
    if weights is None:
        arguments = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long()}
        loss: Tensor = model(**arguments, labels=batch.labels).loss
    else:
        losses = _losses(*_predicted(model, model, batch))
        loss = (losses * torch.from_numpy(weights).to(losses)).sum()
    loss.backward()
    return loss.detach()


def _predicted(model: nn.Module, call: Call, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [B, K, V] and the label of each, -100 where no loss is taken; ``call``: the model, at some weights."""
    if is_classifier(model):
        task = task_of(model)
        return task.logits(call, batch).unsqueeze(1), task.targets(batch)
    # As the model takes it by itself: with positions handed over the bits of earlier trainings might be others.
    logits = call(input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False).logits
    return logits[:, :-1], batch.labels[:, 1:]


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss of each row [B], of logits [B, K, V] and labels [B, K]."""
    flat = logits.flatten(0, 1)
    losses = nn.functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(labels).sum(1)


def batches(lengths: Sequence[int], batch_tokens: int, generator: torch.Generator) -> list[list[int]]:
    """Places of like length together, at most ``batch_tokens`` tokens with padding, batches shuffled."""
    jitter = (torch.rand(len(lengths), generator=generator) * _JITTER).tolist()
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] + jitter[i])
    found: list[list[int]] = [[]]
    for i in order:
        # Rows come by about rising length, so this one sets the width, within the jitter.
        width = max([lengths[i]] + [lengths[j] for j in found[-1]])
        if found[-1] and width * (len(found[-1]) + 1) > batch_tokens:
            found.append([])
        found[-1].append(i)
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


class Answers:
    """Log-probabilities under a model as it is, for ``Questions.at``."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def logprobs(self, rows: Sequence[TokenRow], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log p of each row's labels [len(rows)], in nats, float64; ``weights`` in place of the model's."""
        batch = collate(rows, range(len(rows)), max(len(row.tokens) for row in rows)).to(_device(self._model))

        def call(**arguments: Any) -> Any:
            return torch.func.functional_call(self._model, dict(weights or {}), kwargs=arguments)

        with torch.no_grad():
            logits, labels = _predicted(self._model, call, batch)
        return -_losses(logits.double(), labels)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
