"""A factor shard's part of the exact kind: rows of the joint matrix, and the solve of a block with the whole of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Tensor

from raylux import gpu, profiling
from raylux.curvature.joint import joined, split
from raylux.engine import numerics
from raylux.engine.carrying import Later, mean_carried
from raylux.engine.iterating import Objects, Saved
from raylux.engine.parts import ShardPart
from raylux.engine.records import STATE, Fitted, each_query, read_joint


class JointSolves(ShardPart):
    """Solves by one matrix over all layers."""

    def write_joint(self) -> dict[str, tuple[str, Objects, dict[str, Any]]]:
        """Write each layer's rows of it [P · M, D], the mean over sequences, and its own diagonal [P, M] as its Λ."""
        sizes = [outputs * inputs for outputs, inputs in self.spec.shapes.values()]
        starts = dict(zip(self.spec.shapes, accumulate(sizes, initial=0), strict=False))
        written = {}
        for name, total in self._sums.items():
            panel: np.ndarray = (total / self._counts[""]).astype(self._storage())
            diagonal = np.diagonal(panel, starts[name]).reshape(self.spec.shapes[name])
            key, objects = self.folder.write(f"factors/{name}/lambda", {"matrix": diagonal.copy(), "panel": panel})
            facts = {"sequences": self._counts[""], "mean": float(diagonal.mean(dtype=np.float64))}
            written[name] = key, objects, facts
        return written

    def solve_jointly(
        self, fitted: Fitted, block: str, shards: int, later: Sequence[Later], *parts: Sequence[Mapping[str, Any]]
    ) -> Saved:
        """(G + λ)⁻¹ ∇f of a block of queries, over all layers: written as the state of a solve that is done.

        Any one shard does it, of what all of them have.

        Args:
            fitted: what the fit left.
            block: its name.
            shards: how many parts there are of each query.
            later: the runs that the queries are carried from, for which their own gradients give way.
            *parts: of each query one for each shard: a list of itself, ``inputs`` [T, M] by group and ``grads`` [T, P]
                by layer.

        Raises:
            UserError: the Hessian with λ is not positive definite.
            NumericsError: G + λ is singular.
        """
        shapes = self.spec.shapes
        with profiling.of("eigendecomposition"):
            matrix = read_joint(self.folder, fitted, self.spec.kind, shapes, self.spec.damping, self.spec.device)
        carried = {name: mean_carried(later, name, self.compute, self.spec.device) for name in shapes if later}
        solved = []
        with profiling.of("solve"):
            for place, start in enumerate(range(0, len(parts), shards)):
                gradients: dict[str, Tensor] = {}
                for part in each_query(parts[start : start + shards]):
                    tokens = {name: self._tokens(part, name) for name in part["grads"]}
                    gradients |= {name: g.T @ a for name, (a, g) in tokens.items()}
                gradients |= {name: queries[place] for name, queries in carried.items()}
                solved.append(split(matrix.solve(joined(gradients, shapes)).to(self.compute), shapes))
        keys: dict[str, str] = {}
        objects: Objects = {}
        for name in shapes:
            array = np.stack([gpu.to_host(x[name].contiguous()).numpy() for x in solved])[None]
            keys[name], more = self.folder.write(f"solves/{name}/{block}", {STATE: array}, {"names": ["x"]})
            objects |= more
        return keys, objects, numerics.here(self.spec.device)
