"""The stateful half: owns some tracked layers, adds the workers' sums in order, solves for the queries.

A plain class: the same code runs in process and as a Ray actor. It reads and writes the run folder; the
driver commits what it wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylux.curvature import KINDS, Spectral, eigenbasis
from raylux.engine.records import FactorFiles, input_matrix, output_matrix, query_arrays, read_basis, tensor
from raylux.errors import NumericsError
from raylux.influence.dots import sequence_gradients
from raylux.influence.lowrank import component_scores, factorise
from raylux.layers import TrackedLayer
from raylux.store import RunFolder

Objects = dict[str, tuple[int, str]]
Measured = dict[int, tuple[float, np.ndarray | None]]
"""Place of a query in its block -> its dense score on a probe, and what each component gives to it [R]."""


@dataclass(frozen=True)
class ShardSpec:
    """What a shard is made from."""

    folder: str
    layers: tuple[TrackedLayer, ...]
    groups: dict[str, str]
    kind: str
    damping: float | str
    dtype: str
    threads: int
    device: str


class FactorShard:
    """Curvature factors of the layers it owns."""

    def __init__(self, spec: ShardSpec) -> None:
        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.folder = RunFolder(spec.folder)
        self.layers = {layer.name: layer for layer in spec.layers}
        self.compute = torch.float64 if spec.dtype == "float64" else torch.float32
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, int] = {}
        self._next = 0
        self._block: dict[str, list[Tensor]] = {}
        self._factors: dict[str, list[tuple[Tensor, Tensor]]] = {}

    # sums

    def begin(self) -> None:
        """Start a pass: nothing summed, unit 0 comes first."""
        self._sums, self._counts, self._next = {}, {}, 0

    def add(self, unit: int, part: Mapping[str, Any]) -> None:
        """Add a unit's part. Units come in order: the order of float sums is part of the result."""
        if unit != self._next:
            raise RuntimeError(f"unit {unit} came where unit {self._next} was due")
        for name, array in _matrices(part):
            if not np.isfinite(array).all():
                raise NumericsError(f"fit unit {unit}: NaN or infinity in {name}")
            if name in self._sums:
                self._sums[name] += array
            else:
                self._sums[name] = array.astype(np.float64)
        for name, count in {**part.get("rows", {}), "": part["sequences"]}.items():
            self._counts[name] = self._counts.get(name, 0) + int(count)
        self._next += 1

    def write_covariances(self) -> dict[str, tuple[str, Objects, dict[str, Any]]]:
        """Write A of each input group and S of each layer as means over tokens: name -> key, objects, counts."""
        written = {}
        sequences = self._counts[""]
        for name, total in self._sums.items():
            rows = self._counts[name.partition(":")[2]]
            mean: np.ndarray = (total / rows).astype(self._storage())
            key, objects = self.folder.write(f"factors/{_tidy(name)}/covariance", {"matrix": mean})
            written[name] = key, objects, {"rows": rows, "sequences": sequences}
        self._sums = {}
        return written

    def decompose(self, name: str, key: str) -> tuple[str, Objects]:
        """Eigenvalues and eigenvectors of a written covariance, computed in float64."""
        matrix = tensor(self.folder.group(key).read("matrix"), torch.float64, self.spec.device)
        values, vectors = eigenbasis(matrix, name)
        arrays = {"values": values.cpu().numpy(), "vectors": vectors.cpu().numpy().astype(self._storage())}
        return self.folder.write(f"factors/{_tidy(name)}/eigen", arrays)

    def write_moments(self) -> dict[str, tuple[str, Objects, dict[str, Any]]]:
        """Write Λ of each layer: the mean over sequences."""
        written = {}
        sequences = self._counts[""]
        for name, total in self._sums.items():
            mean: np.ndarray = (total / sequences).astype(self._storage())
            key, objects = self.folder.write(f"factors/{name}/lambda", {"matrix": mean})
            written[name] = key, objects, {"sequences": sequences}
        self._sums = {}
        return written

    # queries

    def solve(
        self,
        files: FactorFiles,
        moments: Mapping[str, str],
        rows_per_sequence: Mapping[str, float],
        rank_limit: Mapping[str, int],
        *parts: Mapping[str, Any],
    ) -> dict[str, float]:
        """s_test of a block of queries in every layer of this shard, kept until ``write_block``.

        Args:
            files: the eigenbases.
            moments: layer -> key of its Λ.
            rows_per_sequence: layer -> T̄.
            rank_limit: layer -> largest rank to try; 0: dense only.
            *parts: per query, ``inputs`` [T, M] by group and ``grads`` [T, P] by layer.

        Returns:
            layer -> the damping λ that was used.
        """
        self._block, self._factors = {}, {}
        damping = {}
        for name in self.layers:
            curvature = self._curvature(name, files, moments, rows_per_sequence)
            damping[name] = curvature.damping(self.spec.damping)
            try:
                self._block[name] = [curvature.solve(self._gradient(part, name), damping[name]) for part in parts]
            except NumericsError as error:
                raise NumericsError(f"layer '{name}': {error}") from None
            if rank_limit[name]:
                self._factors[name] = [factorise(s_test, rank_limit[name]) for s_test in self._block[name]]
        return damping

    def measure(self, part: Mapping[str, Any], places: Sequence[int]) -> dict[str, Measured]:
        """Scores of queries of the kept block on one probe sequence, by layer.

        Args:
            part: the probe's ``inputs`` [T, M] by group and ``grads`` [T, P] by layer.
            places: of the queries in the block.
        """
        result = {}
        for name, queries in self._block.items():
            a, g = self._tokens(part, name)
            gradient = sequence_gradients(a, g)[0]
            result[name] = {
                place: (
                    float((queries[place] * gradient).sum(dtype=torch.float64)),
                    component_scores(*self._factors[name][place], a, g)[0].cpu().numpy()
                    if name in self._factors
                    else None,
                )
                for place in places
            }
        return result

    def write_block(self, block: str, ranks: Sequence[Mapping[str, int]]) -> tuple[dict[str, str], Objects]:
        """Write the kept block: per query the rank of each layer, dense where −1 or not named.

        Returns:
            layer -> key, and the objects written.
        """
        keys: dict[str, str] = {}
        objects: Objects = {}
        for name, queries in self._block.items():
            chosen = [rank.get(name, -1) for rank in ranks]
            dense = [s_test for s_test, rank in zip(queries, chosen, strict=True) if rank < 0]
            factors = [
                (self._factors[name][place][0][:, :rank], self._factors[name][place][1][:, :rank])
                for place, rank in enumerate(chosen)
                if rank >= 0
            ]
            arrays = query_arrays(dense, factors, [rank < 0 for rank in chosen])
            keys[name], more = self.folder.write(f"queries/{name}/{block}", arrays)
            objects |= more
        self._block, self._factors = {}, {}
        return keys, objects

    def _curvature(
        self, name: str, files: FactorFiles, moments: Mapping[str, str], rows_per_sequence: Mapping[str, float]
    ) -> Spectral:
        group = self.spec.groups[name]
        q_a, q_s = read_basis(self.folder, files, name, group, self.compute, self.spec.device)
        values: list[Tensor | None] = [None, None]
        if files.eigen:
            keys = files.eigen[input_matrix(group)], files.eigen[output_matrix(name)]
            values = [tensor(self.folder.group(key).read("values"), self.compute, self.spec.device) for key in keys]
        lam = (
            tensor(self.folder.group(moments[name]).read("matrix"), self.compute, self.spec.device) if moments else None
        )
        return KINDS[self.spec.kind].assemble(q_a, q_s, values[0], values[1], lam, rows_per_sequence.get(name, 1.0))

    def _tokens(self, part: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
        """a [1, T, M] and g [1, T, P]."""
        a = tensor(part["inputs"][self.spec.groups[name]], self.compute, self.spec.device)
        g = tensor(part["grads"][name], self.compute, self.spec.device)
        return a.unsqueeze(0), g.unsqueeze(0)

    def _gradient(self, part: Mapping[str, Any], name: str) -> Tensor:
        return sequence_gradients(*self._tokens(part, name))[0]

    def _storage(self) -> type:
        return np.float64 if self.compute is torch.float64 else np.float32


def _matrices(part: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    if "moments" in part:
        return list(part["moments"].items())
    inputs = [(input_matrix(name), array) for name, array in part["inputs"].items()]
    return inputs + [(output_matrix(name), array) for name, array in part["grads"].items()]


def _tidy(name: str) -> str:
    """A matrix's name as a folder: its layer, then which side."""
    side, _, layer = name.partition(":")
    return f"{layer}/{side}"
