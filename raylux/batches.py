"""Batches of token sequences: which sequences go together, how they are padded.

Two ways to batch, both functions of the data alone, so that results do not depend on who computes them:

- ``fit_batches``: the sequences of a fit unit are always the same, so they are sorted by length and
  cut into batches of up to ``batch_tokens`` tokens.
- ``score_batches``: which sequences of a score unit are candidates differs from day to day. A sequence
  is therefore always run in a batch of a shape that is a function of its own length, short batches are
  filled up, and its numbers do not depend on the company it has (a row of a matrix product has the same
  bits wherever it stands, as long as the product's shape stays the same).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from raylux.routed import ROW_BLOCK

IGNORED = -100
MOST_ROWS = 16
_MOST_EXAMPLES = 128
# Padding, as a share of the real tokens, that a batch of a fit unit accepts: usually, and where what is captured of it
# is kept for the scores, which spares a forward and a backward pass.
PADDING, KEPT_PADDING = 0.05, 0.10
# A batch of this part of ``batch_tokens`` keeps the hardware as busy as a whole one: of a GPT-2 with d = 256 two
# sequences of 128 tokens take as long, each, as eight.
_BUSY = 4


@dataclass(frozen=True)
class Batch:
    """Padded sequences. Legend: B rows, T padded length.

    Attributes:
        rows: positions of the sequences in the caller's list, one per counted row; rows of the tensors
            beyond ``len(rows)`` are filler.
        input_ids: [B, T] int64; [B, 1, *shape] of features.
        mask: [B, T] bool, True on real tokens.
        labels: [B, T] int64, -100 where no loss is taken.
        keys: [B] int64, the sequences' keys for the noise of sampled labels.
    """

    rows: tuple[int, ...]
    input_ids: Tensor
    mask: Tensor
    labels: Tensor
    keys: Tensor

    def to(self, device: str | torch.device) -> Batch:
        return Batch(
            self.rows, self.input_ids.to(device), self.mask.to(device), self.labels.to(device), self.keys.to(device)
        )

    @property
    def tokens(self) -> int:
        """Real tokens of the counted rows."""
        return int(self.mask[: len(self.rows)].sum())


@dataclass(frozen=True)
class TokenRow:
    """One sequence as a worker gets it: tokens and labels [T] int, and its key; an example's features are one token."""

    tokens: np.ndarray
    labels: np.ndarray
    key: int = 0

    def part(self, tokens: int) -> TokenRow:
        """At most ``tokens`` of its tokens, from the one before the first label on: a masked prompt has no loss."""
        labelled = np.flatnonzero(self.labels != IGNORED)
        first = max(0, int(labelled[0]) - 1) if len(labelled) else 0
        kept = slice(first, first + tokens)
        return TokenRow(self.tokens[kept], self.labels[kept], self.key)


def mask_of_rows(mask: Tensor, rows: int) -> Tensor | None:
    """Which rows of a layer count, [N, rows] bool, of which it has ``rows`` for each sequence.

    Args:
        mask: [N, T] bool, True on real tokens.
        rows: T for each call of the layer.

    Returns:
        None where all do, since they are no tokens: above a classifier's pooling there is one for each sequence.
    """
    tokens = mask.shape[1]
    return mask.repeat(1, rows // tokens) if rows % tokens == 0 else None


def bucket(length: int, most: int | None = None) -> int:
    """The padded length of a sequence: at least one token more, up to a step of an eighth of its size or 8 tokens.

    transformers leaves out the attention mask of a batch without padding, and a sequence would take another
    path through attention with company of its own length than with shorter company: so there is always
    padding, but for a sequence as long as the longest of the corpus (``most``).
    """
    step = max(ROW_BLOCK, 1 << max(0, length.bit_length() - 4))
    padded = (length // step + 1) * step
    return padded if most is None else max(length, min(padded, most))


def longest(lengths: np.ndarray, context: int | None) -> int:
    """What padding need not exceed: the longest of ``lengths`` in whole blocks of rows, within the model's context."""
    blocks = -(-int(lengths.max()) // ROW_BLOCK) * ROW_BLOCK
    return blocks if context is None else max(int(lengths.max()), min(blocks, context))


def rows_per_batch(padded: int, batch_tokens: int) -> int:
    """Rows of a score batch of sequences padded to ``padded`` tokens, filler included.

    Matrix products flatten rows and tokens, and the bits of a token depend on where in a block of rows it stands.
    A length that is no whole number of blocks (a model's odd context) therefore runs alone.
    """
    if padded == 1:  # examples with features, all of which are always scored: company does not change
        return max(1, min(_MOST_EXAMPLES, batch_tokens))
    if padded % ROW_BLOCK:
        return 1
    return max(1, min(MOST_ROWS, batch_tokens // padded))


def collate(
    rows: Sequence[TokenRow], places: Sequence[int], padded: int, size: int | None = None, pad_left: bool = False
) -> Batch:
    """Pad ``rows`` to ``padded`` tokens; with ``size``, fill up to that many rows by repeating the first."""
    count = max(len(rows), size or 0)
    tokens = rows[0].tokens
    kind = tokens.dtype if tokens.dtype.kind == "f" else np.dtype(np.int64)
    ids = np.zeros((count, padded, *tokens.shape[1:]), kind)
    mask = np.zeros((count, padded), bool)
    labels = np.full((count, padded), IGNORED, np.int64)
    keys = np.zeros(count, np.int64)
    for place in range(count):
        row = rows[place] if place < len(rows) else rows[0]
        length = len(row.tokens)
        span = slice(padded - length, padded) if pad_left else slice(0, length)
        ids[place, span], mask[place, span], labels[place, span] = row.tokens, True, row.labels
        keys[place] = row.key
    tensors = [torch.from_numpy(array) for array in (ids, mask, labels, keys)]
    return Batch(tuple(places), *tensors)


def fit_batches(
    rows: Sequence[TokenRow],
    batch_tokens: int,
    pad_left: bool = False,
    most: int | None = None,
    padding: float = PADDING,
) -> list[Batch]:
    """All rows, longest first, in batches of up to ``batch_tokens`` padded tokens.

    Rows that fill a batch of ``score_batches`` with little padding (at most ``padding``, as a share of their tokens)
    are run as they will be when they are scored: what is captured of them then serves both.
    """
    batches = []
    left = set(range(len(rows)))
    for padded, places in [] if pad_left else _by_shape(rows, most):
        size = rows_per_batch(padded, batch_tokens)
        for start in range(0, len(places) - size + 1, size):
            chosen = places[start : start + size]
            if size * padded <= (1 + padding) * sum(len(rows[place].tokens) for place in chosen):
                batches.append(collate([rows[place] for place in chosen], chosen, padded))
                left -= set(chosen)
    order = sorted(left, key=lambda place: (-len(rows[place].tokens), place))
    start = 0
    while start < len(order):
        padded = len(rows[order[start]].tokens)
        most_rows = order[start : start + max(1, batch_tokens // padded)]
        places = most_rows[: _count([len(rows[place].tokens) for place in most_rows], batch_tokens)]
        batches.append(collate([rows[place] for place in places], places, padded, pad_left=pad_left))
        start += len(places)
    return batches


def _count(lengths: Sequence[int], batch_tokens: int) -> int:
    """How many of the rows that fit, longest first, make a batch: no padding once it keeps the hardware busy."""
    count, padded, real = 1, lengths[0], lengths[0]
    for length in lengths[1:]:
        wasteful = (count + 1) * padded > (1 + PADDING) * (real + length)
        if wasteful and count * padded >= batch_tokens // _BUSY:
            break
        count, real = count + 1, real + length
    return count


def is_scored_so(batch: Batch, batch_tokens: int, most: int | None = None) -> bool:
    """Whether ``score_batches`` would give each row of a batch the same shape and path: the same bits, then."""
    size, padded = batch.mask.shape
    lengths = batch.mask.sum(1).tolist()
    full = {length == padded for length in lengths}
    return (
        len(batch.rows) == size == rows_per_batch(padded, batch_tokens)
        and len(full) == 1
        and all(bucket(length, most) == padded for length in lengths)
    )


def score_batches(rows: Sequence[TokenRow], batch_tokens: int, most: int | None = None) -> list[Batch]:
    """All rows in batches whose shape depends on the rows' own length only.

    Args:
        rows: the sequences to run.
        batch_tokens: padded tokens of a batch, at most (one row is always allowed).
        most: the length that padding does not exceed, as ``longest`` gives it.
    """
    batches = []
    for padded, places in _by_shape(rows, most):
        size = rows_per_batch(padded, batch_tokens)
        for start in range(0, len(places), size):
            chosen = places[start : start + size]
            batches.append(collate([rows[place] for place in chosen], chosen, padded, size=size))
    return batches


def query_shape(length: int, tokens: int, most: int | None = None) -> tuple[int, int]:
    """Rows and padded length of the batch in which a row of a query runs: a function of its own length.

    Args:
        length: of the row.
        tokens: padded tokens of a batch, at most; 0: each row by itself.
        most: the length that padding does not exceed, as ``longest`` gives it.
    """
    padded = bucket(length, most)
    rows = rows_per_batch(padded, tokens) if tokens else 1
    return (1, length) if rows == 1 else (rows, padded)


def query_batches(rows: Sequence[TokenRow], tokens: int, most: int | None = None) -> list[Batch]:
    """Rows of queries in batches of a fixed shape, filled up; by themselves and without padding where that is one row.

    By itself a row needs the logits of its labelled tokens alone, so that is the way of long ones and of few.

    Args:
        rows: of the queries.
        tokens: see ``query_shape``; ``most`` too.
        most: see ``tokens``.
    """
    alone = [place for place, row in enumerate(rows) if query_shape(len(row.tokens), tokens, most)[0] == 1]
    batches = [collate([rows[place]], [place], len(rows[place].tokens)) for place in alone]
    together = sorted(set(range(len(rows))) - set(alone))
    for batch in score_batches([rows[place] for place in together], tokens, most):
        batches.append(replace(batch, rows=tuple(together[at] for at in batch.rows)))
    return batches


def _by_shape(rows: Sequence[TokenRow], most: int | None) -> list[tuple[int, list[int]]]:
    """Padded length, and the places of the rows that are padded so; a row without padding takes a path of its own."""
    by_shape: dict[tuple[int, bool], list[int]] = {}
    for place, row in enumerate(rows):
        padded = bucket(len(row.tokens), most)
        by_shape.setdefault((padded, padded == len(row.tokens)), []).append(place)
    return [(padded, places) for (padded, _), places in sorted(by_shape.items())]
