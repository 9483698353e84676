"""kronfluence's EK-FAC of a model (``make peers`` installs it)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from raylux.batches import TokenRow
from raylux.errors import UserError
from raylux.layers import coverage

# Sequences that it takes together.
_BATCH = 32


def is_installed() -> bool:
    """Whether it can be asked at all."""
    return importlib.util.find_spec("kronfluence") is not None


def scores(model: PreTrainedModel, rows: Sequence[TokenRow], asked: Sequence[TokenRow], folder: Path) -> np.ndarray:
    """Scores on the layers that raylux tracks, labels sampled and λ as its defaults have it.

    Args:
        model: left as it is, but that its parameters want gradients.
        rows: [N] sequences, fitted and scored.
        asked: [Q] queries, whose measurement is their log-probability.
        folder: where it keeps its files.

    Returns:
        [Q, N] in raylux's sign and unit ``raw``.

    Raises:
        UserError: it is not installed.
    """
    if not is_installed():
        raise UserError("kronfluence is missing: `make peers` installs it; or compare without it")
    from jobs.bench.batches import Rows, batch_of
    from jobs.bench.peer import Kronfluence

    layers = [layer.name for layer in coverage(model).tracked]
    train, queries = (
        Rows(batch_of([row.tokens for row in some], [row.labels for row in some])) for some in (rows, asked)
    )
    # It samples labels by torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = Kronfluence(model.requires_grad_(True), layers, train, folder, _BATCH)
        found.fit()
    return found.scores(queries, query_batch=_BATCH)["all_modules"]
