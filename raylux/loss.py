"""The training loss at the logits: its value and its gradient, for drawn and for given labels at once.

Cross-entropy, written out: with p the softmax of a row of logits, the loss is −log p[label] and its gradient with
respect to the logits p − onehot(label). Autograd would keep the log-softmax of all tokens and go through it again
for the gradient; here a few rows at a time pass through the processor's cache once, for both sets of labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Labeller = Callable[[Tensor, Tensor], Tensor]
"""(probabilities [n, V], places [n] among the flat tokens) -> labels [n] int64"""

# Entries that are worked on together; where more rows than this share count, rows without a label go along.
_CHUNK = 1 << 17
_DENSE = 0.5
# On a GPU there is no cache to stay in, and starting an operation costs what 10⁷ entries do.
_GPU_CHUNK = 1 << 27


@dataclass
class LogitLoss:
    """The loss of a batch at its logits. Legend: n tokens, flat; V entries of the vocabulary.

    Attributes:
        token_loss: [n], 0 where there is no label.
        gradient: [n, V] of the summed loss, in the logits' dtype.
        labels: [n] int64, those that the loss was taken on.
    """

    token_loss: Tensor
    gradient: Tensor
    labels: Tensor


@torch.no_grad()
def logit_loss(logits: Tensor, targets: Tensor, labeller: Labeller | None, both: bool) -> list[LogitLoss]:
    """Loss and gradient at the logits.

    Args:
        logits: [n, V].
        targets: [n] int64, negative where no loss is taken.
        labeller: draws labels where ``targets`` has one; None: the targets are the labels.
        both: give the loss on the targets too, after that on the drawn labels.

    Returns:
        One loss, or two.
    """
    counted = targets >= 0
    places = counted.nonzero().squeeze(1)
    # How torch sums a row on a GPU depends on the shape: there that must not depend on how many labels count.
    dense = logits.is_cuda or len(places) >= _DENSE * len(targets)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    count = 2 if both and labeller is not None else 1
    found = [
        LogitLoss(
            torch.zeros(len(targets), dtype=wide, device=logits.device),
            torch.empty_like(logits) if dense else torch.zeros_like(logits),
            targets.clone(),
        )
        for _ in range(count)
    ]
    rows = max(2, (_GPU_CHUNK if logits.is_cuda else _CHUNK) // logits.shape[1])
    total = len(targets) if dense else len(places)
    for first in range(0, total, rows):
        # Never a single row, which torch sums up in another order: the last one is done twice instead.
        start = max(0, min(first, total - 2))
        # A slice where most rows count, otherwise those that do.
        part: slice | Tensor = slice(start, start + rows) if dense else places[start : start + rows]
        keep = counted[part]
        x = logits[part].to(wide, copy=True)
        top = x.amax(1)
        p = x.sub_(top[:, None]).exp_()
        norm = p.sum(1)
        p.div_(norm[:, None])
        at = torch.arange(total, device=logits.device)[part] if dense else places[start : start + rows]
        for index, one in enumerate(found):
            labels = targets[part]
            if labeller is not None and index == 0:
                labels = torch.where(keep, labeller(p, at), labels)
                one.labels[part] = labels
            safe = labels.clamp(min=0)[:, None]
            chosen = logits[part].gather(1, safe).squeeze(1).to(wide)
            one.token_loss[part] = (norm.log() + top - chosen) * keep
            gradient = p.clone() if index + 1 < count else p
            gradient.scatter_add_(1, safe, torch.full_like(gradient[:, :1], -1.0))
            gradient.mul_(keep[:, None])
            one.gradient[part] = gradient.to(logits.dtype)
    return found
