"""Handwritten digits of scikit-learn, split by a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """Features [n, 64] in [0, 1] and classes [n], float64 and int64, of a training set and of the rest."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def split(cls, seed: int, train: int) -> Digits:
        """``train`` examples drawn by the seed, and all others."""
        data, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(data))
        x, y = torch.as_tensor(data[order] / 16.0), torch.as_tensor(labels[order]).long()
        return cls(x[:train], y[:train], x[train:], y[train:])

    def pairs(self) -> list[tuple[Tensor, int]]:
        """The training set as raylux takes it."""
        return list(zip(self.x, self.y.tolist(), strict=True))

    def questions(self, places: Tensor) -> list[tuple[Tensor, int]]:
        """Points of the test set, each with its class, as raylux takes queries."""
        return list(zip(self.test_x[places], self.test_y[places].tolist(), strict=True))
