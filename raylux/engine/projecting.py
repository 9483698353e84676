"""Workers' and shards' part of the kind that projects gradients: sums that whiten, and queries in that metric."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylux import gpu, profiling
from raylux.capture import Captured
from raylux.curvature import Spectral
from raylux.curvature.squares import each_gradient
from raylux.engine.fitting import FitSums
from raylux.engine.iterating import Objects
from raylux.engine.parts import ShardPart
from raylux.engine.records import Fitted, LoadedCurvature, read_projected
from raylux.engine.solve import Form, Solved, Tokens, solve_layer
from raylux.engine.weighing import Curvatures
from raylux.routed import Rows


class ProjectedSums(FitSums):
    """Sums of the fit of a kind that projects gradients."""

    _curvatures: Curvatures

    @abstractmethod
    def _widened(self, captured: Captured) -> tuple[dict[str, Rows], dict[str, Rows]]: ...

    def projected_unit(
        self, rows: np.ndarray, labels: np.ndarray | None, shards: Sequence[Sequence[str]], loaded: LoadedCurvature
    ) -> tuple[Any, ...]:
        """Sums of φ φᵀ of a fit unit: ``raylux.curvature.projected``.

        Args:
            rows: corpus rows of the unit.
            labels: of no use here: the data's own are taken.
            shards: layer names of each shard, those of the pass.
            loaded: what projects, not whitened yet.

        Returns:
            None, then a part per shard with each layer's sum [K·K, K·K] under ``moments``.
        """
        wanted = frozenset(name for names in shards for name in names)
        names = tuple(layer.name for layer in self.spec.layers if layer.name in wanted)
        metrics, groups = self._curvatures.projected(loaded, names), self.spec.groups
        sequences = self.reader.rows(rows)
        totals: dict[str, Tensor] = {}
        for batch in self._fit_batches(sequences):
            inputs, grads = self._widened(self._run(batch, sampled=False, wanted=wanted))
            for name, metric in metrics.items():
                with profiling.of("rotate"):
                    found = [metric.features(v) for _, v in each_gradient(inputs[groups[name]], grads[name])]
                    phi = torch.stack(found)
                    product = phi.T @ phi
                totals[name] = totals[name].add_(product) if name in totals else product
        parts = [
            {"moments": {name: gpu.to_host(totals[name]).numpy() for name in own}, "sequences": len(sequences)}
            for own in shards
        ]
        return (None, *parts)


class ProjectedFactors(ShardPart):
    """What a shard makes of them."""

    def write_projected(self) -> dict[str, tuple[str, Objects, dict[str, Any]]]:
        """Write the mean outer product of each layer's projections [K·K, K·K]."""
        written = {}
        for name, total in self._sums.items():
            mean: np.ndarray = (total / self._counts[""]).astype(self._storage())
            key, objects = self.folder.write(f"factors/{name}/projected", {"matrix": mean})
            written[name] = key, objects, {"sequences": self._counts[""]}
        return written

    def solve_projected(
        self, name: str, fitted: Fitted, tokens: Sequence[Tokens], form: Form, checked: bool
    ) -> tuple[Solved, float]:
        """Queries of a block in a layer, whose squares are those in its metric; and λ.

        Raises:
            NumericsError: the metric is singular.
        """
        spec = self.spec
        metric = read_projected(self.folder, fitted, name, spec.damping, self.compute, spec.device)
        with profiling.of("solve"):
            gradients = [g.to(self.compute).T @ a.to(self.compute) for a, g in tokens]
            given = [metric.solve(v) for v in gradients]
            # Of no curvature: what the solution is put against is a gradient as it is.
            found = solve_layer(Spectral(), tokens, 0.0, form, given, checked)
        return replace(found, squares=[float(metric.square(v)) for v in gradients]), metric.damping
