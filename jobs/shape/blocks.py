"""Where in a model influence lies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def block_shares(names: Sequence[str], layers: np.ndarray) -> np.ndarray:
    """Share of each block of a Llama in the influence of some sequences [blocks]; they sum to 1.

    Args:
        names: [L] of the tracked layers, as ``model.layers.2.mlp.up_proj``.
        layers: [L, n] their influences.
    """
    blocks = np.array([int(name.split(".layers.")[1].split(".")[0]) for name in names])
    sums = layers.sum(1)
    return np.bincount(blocks, weights=sums) / sums.sum()
