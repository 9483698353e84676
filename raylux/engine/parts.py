"""What the classes that ``GradientWorker`` and ``FactorShard`` are put together from know of the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylux.capture import Capture
from raylux.engine.records import Contraction
from raylux.engine.scorer import Pack
from raylux.layers import TrackedLayer
from raylux.store import CorpusReader, RunFolder


class WorkerPart(ABC):
    """Methods of ``GradientWorker``, which has the rest."""

    spec: Any
    device: str
    devices: dict[str, str]
    folder: RunFolder
    compute: torch.dtype
    _capture: Capture | None

    @property
    @abstractmethod
    def reader(self) -> CorpusReader:
        """The corpus of the run."""

    @abstractmethod
    def _packs(
        self,
        rows: np.ndarray,
        contraction: Contraction,
        kept: bool = True,
        wanted: Collection[str] | None = None,
        products: int = 1,
        fresh: int = 1,
    ) -> Iterator[Pack]:
        """Captured sequences, as many together as a product takes."""

    @abstractmethod
    def _captured_together(self, dtype: torch.dtype, lent: bool = False, read: float = 0.0) -> int:
        """Of how many products sequences are taken together that are not kept, as ``captured_together``."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of queries and bases."""


class ShardPart(ABC):
    """Methods of ``FactorShard``, which has the rest."""

    spec: Any
    folder: RunFolder
    layers: dict[str, TrackedLayer]
    compute: torch.dtype
    _sums: dict[str, np.ndarray]
    _counts: dict[str, int]

    @abstractmethod
    def _storage(self) -> type: ...

    @abstractmethod
    def _tokens(self, part: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
        """a [T, M] and g [T, P] of a query in a layer."""
