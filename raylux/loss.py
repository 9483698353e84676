"""The training loss at the logits: its value and its gradient, for drawn and for given labels at once.

Cross-entropy, written out: with p the softmax of a row of logits, the loss is −log p[label] and its gradient with
respect to the logits p − onehot(label). Autograd would keep the log-softmax of all tokens and go through it again
for the gradient; here a few rows at a time pass through the processor's cache once, for both sets of labels.

Where the logits are h Wᵀ, with W the head, nobody needs the gradient by them but the product with W. It is taken block
by block, and of a second set of labels it is the first's but for two rows of W: (p − onehot(s)) W = (p − onehot(y)) W +
W[y] − W[s]. The given labels y are the ones that are taken in full: a product of p alone would round away what is
left of p − onehot(y) where the model is sure of y.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from raylux.blocks import block_sizes

Labeller = Callable[[Tensor, Tensor], Tensor]
"""(probabilities [n, V], places [n] among the flat tokens) -> labels [n] int64"""

# Entries that are worked on together, 4 MB of them: fewer stay nearer to the processor, but drawing labels starts some
# fifty operations for as many rows as these are. Where more rows than this share count, those without a label go along.
_CHUNK = 1 << 20
_DENSE = 0.5
# On a GPU there is no cache to stay in, and starting an operation costs what 10⁷ entries do.
_GPU_CHUNK = 1 << 25
# Rows that are multiplied by the head together: of fewer a product takes longer, more fill memory.
_BLOCK = 256


@dataclass
class OutputLoss:
    """The loss of a batch at its logits. Legend: n tokens, flat; V entries of the vocabulary, D of what the head reads.

    Attributes:
        token_loss: [n], 0 where there is no label.
        gradient: of the summed loss, by the logits [n, V] or by what the head reads [n, D], in the logits' dtype.
        labels: [n] int64, those that the loss was taken on.
    """

    token_loss: Tensor
    gradient: Tensor
    labels: Tensor


@torch.no_grad()
def logit_loss(logits: Tensor, targets: Tensor, labeller: Labeller | None, both: bool) -> list[OutputLoss]:
    """Loss and gradient at the logits.

    Args:
        logits: [n, V].
        targets: [n] int64, negative where no loss is taken.
        labeller: draws labels where ``targets`` has one; None: the targets are the labels.
        both: give the loss on the targets too, after that on the drawn labels.

    Returns:
        One loss, or two.
    """
    tokens = _Tokens(logits, targets)
    found = tokens.losses(logits.shape[1], logits.device, labeller, both)
    for piece in tokens.pieces(0, tokens.total):
        for index, one in enumerate(found):
            labels = piece.labels(labeller if index == 0 else None)
            piece.take(one, labels)
            one.gradient[piece.part] = piece.gradient(labels, last=index + 1 == len(found)).to(logits.dtype)
    return found


@torch.no_grad()
def hidden_loss(
    logits: Tensor, weight: Tensor, targets: Tensor, labeller: Labeller | None, both: bool
) -> list[OutputLoss]:
    """As ``logit_loss``, the gradient by what the head reads.

    Args:
        logits: [n, V], the products of what the head reads with its weight, and at most a bias beside.
        weight: [V, D] of the head, in the logits' dtype; may lie on another device, and the gradients do then.
    """
    tokens = _Tokens(logits, targets)
    found = tokens.losses(weight.shape[1], weight.device, labeller, both)
    blocks = tokens.blocks()
    kept = logits.new_empty(max((last - first for first, last in blocks), default=0), logits.shape[1])
    for first, last in blocks:
        for piece in tokens.pieces(first, last):
            for index, one in enumerate(found):
                piece.take(one, piece.labels(labeller if index == 0 else None))
            kept[piece.first - first : piece.last - first] = piece.gradient(piece.targets, last=True)
        part = tokens.part(first, last)
        there = part.to(weight.device) if isinstance(part, Tensor) else part
        given = kept[: last - first].to(weight.device) @ weight
        for index, one in enumerate(found):
            drawn = labeller is not None and index == 0
            one.gradient[there] = _moved(given, weight, targets[part], one.labels[part]) if drawn else given
    return found


def _moved(given: Tensor, weight: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """Gradients on other labels, of those on ``labels``; where both are the same or no label, the same bits."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    one, other = (weight[each.clamp(min=0).to(weight.device)].to(wide) for each in (labels, others))
    return one.sub_(other).add_(given)


class _Tokens:
    """The tokens of a batch that are gone through: those with a label, or all where these are most.

    Attributes:
        total: how many.
        rows: of them that stay in the processor's cache together.
    """

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        self._logits, self._targets = logits, targets
        self._places = (targets >= 0).nonzero().squeeze(1)
        # How torch sums a row on a GPU depends on the shape: there that must not depend on how many labels count.
        self._dense = logits.is_cuda or len(self._places) >= _DENSE * len(targets)
        self.total = len(targets) if self._dense else len(self._places)
        self.rows = max(2, (_GPU_CHUNK if logits.is_cuda else _CHUNK) // logits.shape[1])

    def losses(self, width: int, device: torch.device, labeller: Labeller | None, both: bool) -> list[OutputLoss]:
        """What is to be filled, gradients of ``width`` entries on a device."""
        wide = torch.float64 if self._logits.dtype == torch.float64 else torch.float32
        shape = (len(self._targets), width)
        return [
            OutputLoss(
                self._logits.new_zeros(shape[0], dtype=wide),
                (self._logits.new_empty if self._dense else self._logits.new_zeros)(shape, device=device),
                self._targets.clone(),
            )
            for _ in range(2 if both and labeller is not None else 1)
        ]

    def blocks(self) -> list[tuple[int, int]]:
        """The tokens that are multiplied together, as equal in number as can be."""
        count = -(-self.total // max(_BLOCK, self.rows))
        ends = [0, *accumulate(block_sizes(self.total, count))] if count else []
        return list(pairwise(ends))

    def part(self, first: int, last: int) -> slice | Tensor:
        """Where some of the tokens stand in the batch: a slice where most count."""
        return slice(first, last) if self._dense else self._places[first:last]

    def pieces(self, begin: int, end: int) -> Iterator[_Piece]:
        """Some of the tokens, a few at a time; where these are no multiple, the last ones twice."""
        for first in range(begin, end, self.rows):
            # Never a single row, which torch sums up in another order.
            first = max(begin, min(first, end - 2))
            last = min(first + self.rows, end)
            part = self.part(first, last)
            at = torch.arange(first, last, device=self._logits.device) if self._dense else self._places[first:last]
            yield _Piece(first, last, part, at, self._logits[part], self._targets[part])


class _Piece:
    """A few tokens. Legend: r rows.

    Attributes:
        first, last: of the tokens that are gone through.
        part: where these stand in the batch.
        targets: [r] int64, negative where no loss is taken.
    """

    def __init__(
        self, first: int, last: int, part: slice | Tensor, at: Tensor, logits: Tensor, targets: Tensor
    ) -> None:
        self.first, self.last, self.part, self.targets = first, last, part, targets
        self._at, self._logits = at, logits
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        x = logits.to(wide, copy=True)
        top = x.amax(1)
        self._p = x.sub_(top[:, None]).exp_()
        norm = self._p.sum(1)
        self._p.div_(norm[:, None])
        self._log_norm = norm.log() + top

    def labels(self, labeller: Labeller | None) -> Tensor:
        """[r], drawn where a loss is taken; without who draws, the targets."""
        if labeller is None:
            return self.targets
        return torch.where(self.targets >= 0, labeller(self._p, self._at), self.targets)

    def take(self, one: OutputLoss, labels: Tensor) -> None:
        """Write down the loss on some labels."""
        chosen = self._logits.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
        one.labels[self.part] = labels
        one.token_loss[self.part] = (self._log_norm - chosen.to(self._log_norm.dtype)) * (labels >= 0)

    def gradient(self, labels: Tensor, last: bool) -> Tensor:
        """[r, V] by the logits; the last one that is asked for takes the probabilities' place."""
        gradient = self._p if last else self._p.clone()
        gradient.scatter_add_(1, labels.clamp(min=0)[:, None], torch.full_like(gradient[:, :1], -1.0))
        return gradient.index_fill_(0, (labels < 0).nonzero().squeeze(1), 0.0)
