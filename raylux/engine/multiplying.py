"""A gradient worker's part of an iterative solve: products of the Gauss-Newton matrix with a block of directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylux import gpu, profiling
from raylux.batches import fit_batches
from raylux.curvature.gauss_newton import add_products, energy
from raylux.engine.parts import WorkerPart
from raylux.engine.records import Directions, read_state, tensor


class GaussNewtonProducts(WorkerPart):
    """Products with the Gauss-Newton matrix of the fitted sequences."""

    _aimed: tuple[Directions, list[dict[str, Tensor]]] | None

    def product_unit(
        self, rows: np.ndarray, shards: Sequence[Sequence[str]], directions: Directions
    ) -> tuple[Any, ...]:
        """Sums over sequences of the Gauss-Newton matrix times each direction of a block of queries.

        Args:
            rows: corpus rows of the unit.
            shards: layer names of each shard.
            directions: where they are, and of which queries.

        Returns:
            None, then a part per shard with ``products`` [P, M] by "PLACE:LAYER".
        """
        assert self._capture is not None, "prepare() comes first"
        vectors = self._directions(directions)
        totals = [
            {
                layer.name: torch.zeros(layer.shape, dtype=self.compute, device=self.devices[layer.name])
                for layer in self.spec.layers
            }
            for _ in vectors
        ]
        sequences = self.reader.rows(rows)
        for batch in fit_batches(sequences, self.spec.plan.batch_tokens, most=self.spec.plan.longest):
            profiling.count(tokens=batch.tokens)
            add_products(self._capture, batch.to(self.device), vectors, totals)
        named = list(zip(directions.places, totals, strict=True))
        parts = [
            {
                "products": {
                    f"{place}:{name}": gpu.to_host(total[name]).numpy() for place, total in named for name in names
                },
                "sequences": len(sequences),
            }
            for names in shards
        ]
        return (None, *parts)

    def own_curvatures(self, rows: np.ndarray, directions: Directions) -> list[float]:
        """xᵀ H x of each direction x and the Gauss-Newton matrix H of one sequence, its own, by itself.

        Args:
            rows: corpus row of each of ``directions.places``.
            directions: where x is.
        """
        assert self._capture is not None, "prepare() comes first"
        found = []
        for vector, sequence in zip(self._directions(directions), self.reader.rows(rows), strict=True):
            (batch,) = fit_batches([sequence], self.spec.plan.batch_tokens, most=self.spec.plan.longest)
            profiling.count(tokens=batch.tokens)
            found.append(energy(self._capture, batch.to(self.device), vector))
        return found

    def _directions(self, wanted: Directions) -> list[dict[str, Tensor]]:
        """Each query's direction by layer, read unless it is held: a pass asks all its units with the same."""
        if self._aimed is None or self._aimed[0] != wanted:
            self._aimed = None
            vectors: list[dict[str, Tensor]] = [{} for _ in wanted.places]
            for layer in self.spec.layers:
                found = read_state(self.folder, wanted.keys[layer.name], wanted.name)
                for vector, place in zip(vectors, wanted.places, strict=True):
                    vector[layer.name] = tensor(found[place], self.compute, self.devices[layer.name])
            self._aimed = wanted, vectors
        return self._aimed[1]
