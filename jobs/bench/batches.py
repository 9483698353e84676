"""Padded batches and the summed loss, as the bare pass, the training of the workloads and kronfluence take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IGNORED = -100


def batch_of(
    rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]] | None = None, length: int | None = None
) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` [N, T] int64, padded on the right.

    Args:
        rows: token ids.
        labels: like ``rows``, -100 where no loss counts; default: every token but the first.
        length: T; default: the longest row.
    """
    padded = length or max(map(len, rows))
    ids = torch.zeros(len(rows), padded, dtype=torch.int64)
    mask, wanted = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for place, row in enumerate(rows):
        tokens = torch.as_tensor(row, dtype=torch.int64)
        ids[place, : len(row)], mask[place, : len(row)] = tokens, 1
        wanted[place, : len(row)] = tokens if labels is None else torch.as_tensor(labels[place], dtype=torch.int64)
    wanted[:, 0] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": wanted}


def shifted(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [N × (T − 1), vocabulary] and the labels [N × (T − 1)] that they predict."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return logits.reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1)


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """−log p of the labelled tokens, summed over the batch."""
    logits, labels = shifted(model, batch)
    return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A padded batch, one sequence at a time."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {name: x[place] for name, x in self.batch.items()}
