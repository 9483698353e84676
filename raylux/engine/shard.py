"""The stateful half: owns some tracked layers, adds the workers' sums in order, solves for the queries.

A plain class: the same code runs in process and as a Ray actor. It reads and writes the run folder; the
driver commits what it wrote.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylux import gpu, profiling
from raylux.blocks import Blocks, block_sizes, triangle_entries
from raylux.curvature import square_eigenbasis
from raylux.engine import numerics
from raylux.engine.behind import Behind
from raylux.engine.jointly import JointSolves
from raylux.engine.querying import QuerySolves
from raylux.engine.records import (
    input_matrix,
    output_matrix,
    read_square,
)
from raylux.errors import NumericsError
from raylux.influence.words import WordGradient
from raylux.layers import TrackedLayer
from raylux.memory import give_back
from raylux.store import RunFolder
from raylux.triangles import pack, unpack_blocks

Objects = dict[str, tuple[int, str]]
Written = dict[str, tuple[str, Objects, dict[str, Any]]]


@dataclass(frozen=True)
class ShardSpec:
    """What a shard is made from.

    ``blocks``: in which the workers summed A and S. ``shapes``: (P, M) of all tracked layers, in the model's order.
    """

    folder: str
    layers: tuple[TrackedLayer, ...]
    groups: dict[str, str]
    kind: str
    damping: float | str
    dtype: str
    threads: int
    device: str
    blocks: int = 1
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class FactorShard(QuerySolves, JointSolves):
    """Curvature factors of the layers it owns."""

    def __init__(self, spec: ShardSpec) -> None:
        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.folder = RunFolder(spec.folder)
        self.layers = {layer.name: layer for layer in spec.layers}
        self.compute = torch.float64 if spec.dtype == "float64" else torch.float32
        self.clock = profiling.Clock(torch.cuda.synchronize if spec.device == "cuda" else None)
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, int] = {}
        self._next = 0
        self._ahead: dict[int, Mapping[str, Any] | None] = {}
        self._block: dict[str, list[Tensor]] = {}
        self._factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._written: dict[str, Future[tuple[str, Objects]]] = {}
        self._behind, self._memory = Behind(), None
        self._words: dict[str, list[WordGradient]] = {}
        self._solves = {}

    def pid(self) -> int:
        """The process it lives in."""
        return os.getpid()

    def timed(self, method: str, *args: Any) -> Any:
        """Call one of the other methods; its value comes as ``profiling.Timed``."""
        with gpu.pinned(self.spec.device):
            return profiling.timed(self, self.clock, method, False, args)

    # sums

    def begin(
        self, cursor: int = 0, keys: Mapping[str, str] | None = None, counts: Mapping[str, int] | None = None
    ) -> None:
        """Start a pass, or go on with one from a snapshot.

        Args:
            cursor: the unit that is due next.
            keys: matrix -> key of its sum in the snapshot; those of other shards are left alone.
            counts: layer -> token rows summed, and "" -> sequences summed.
        """
        own = set(self._own())
        self._sums = {name: self._snapshotted(name, key) for name, key in (keys or {}).items() if name in own}
        self._counts = {name: count for name, count in (counts or {}).items() if not name or name in self.layers}
        self._next, self._ahead = cursor, {}
        give_back()

    def _snapshotted(self, name: str, key: str) -> np.ndarray:
        """A sum from a snapshot; raylux wrote both triangles of covariances before it summed one."""
        total: np.ndarray = self.folder.group(key).read("sum")
        if name in self.layers:
            return total.copy()
        if total.size == triangle_entries(self._sizes(name)):
            return total.flatten()
        whole = Blocks.of(torch.from_numpy(total.copy()).flatten(), self._sizes(name))
        return torch.cat([pack(block) for block in whole.parts]).numpy()

    def add(self, unit: int, part: Mapping[str, Any] | None) -> int:
        """Take a unit's part; None: the unit was given up. A unit that is in the sums already is dropped.

        Units may come in any order and are added in theirs, the order of float sums being part of the result: one
        that is not yet due is kept, and may be given again.

        Returns:
            The unit that is due next.
        """
        if unit >= self._next:
            self._ahead[unit] = part
        while self._next in self._ahead:
            due = self._ahead.pop(self._next)
            if due is not None:
                with profiling.of("add"):
                    self._add(self._next, due)
            self._next += 1
        return self._next

    def _add(self, unit: int, part: Mapping[str, Any]) -> None:
        arrays = _matrices(part)
        for name, array in arrays:
            if not np.isfinite(array).all():
                raise NumericsError(f"fit unit {unit}: NaN or infinity in {name}")
        profiling.count(size=sum(array.nbytes for _, array in arrays))
        for name, array in arrays:
            if name in self._sums:
                self._sums[name] += array
            else:
                self._sums[name] = array.astype(np.float64)
        for name, count in {**part.get("rows", {}), "": part["sequences"]}.items():
            self._counts[name] = self._counts.get(name, 0) + int(count)

    def snapshot(self, prefix: str) -> tuple[dict[str, str], dict[str, int], Objects]:
        """Write the running sums: matrix -> key, counts, and the objects written."""
        keys: dict[str, str] = {}
        objects: Objects = {}
        for name, total in self._sums.items():
            keys[name], more = self.folder.write(f"{prefix}/{_tidy(name)}", {"sum": total})
            objects |= more
        return keys, dict(self._counts), objects

    def write_covariances(self) -> Written:
        """Write A of each input group and S of each layer as means over tokens: name -> key, objects, counts."""
        written = {}
        for name, total in self._sums.items():
            rows, sizes = self._counts[name.partition(":")[2]], self._sizes(name)
            # To an expert perhaps no token was routed: its sums are zeros.
            triangles: np.ndarray = (total / max(1, rows)).astype(self._storage())
            square = unpack_blocks(torch.from_numpy(triangles), sizes)
            mean = (square.flat() if isinstance(square, Blocks) else square).numpy()
            facts = {} if mean.ndim == 2 else {"sizes": sizes}
            key, objects = self.folder.write(f"factors/{_tidy(name)}/covariance", {"matrix": mean}, facts)
            eigenvalue = _trace(mean, sizes) / sum(sizes)
            written[name] = key, objects, {"rows": rows, "sequences": self._counts[""], "mean": eigenvalue}
        return written

    def write_moments(self) -> Written:
        """Write Λ of each layer: the mean over sequences."""
        written = {}
        for name, total in self._sums.items():
            mean: np.ndarray = (total / self._counts[""]).astype(self._storage())
            key, objects = self.folder.write(f"factors/{name}/lambda", {"matrix": mean})
            facts = {"sequences": self._counts[""], "mean": float(mean.mean(dtype=np.float64))}
            written[name] = key, objects, facts
        return written

    def _own(self) -> list[str]:
        """Every name under which a sum of this shard may stand."""
        leaders = {self.spec.groups[name] for name in self.layers}
        inputs, outputs = map(input_matrix, leaders), map(output_matrix, self.layers)
        return [*inputs, *outputs, *self.layers]

    def _sizes(self, name: str) -> list[int]:
        """Rows of each block of a covariance."""
        layer = name.partition(":")[2]
        shape = self.layers[layer]
        return list(block_sizes(shape.outputs if output_matrix(layer) == name else shape.inputs, self.spec.blocks))

    def decompose(self, name: str, key: str, quick: bool) -> tuple[str, Objects, numerics.Numerics]:
        """Eigenvalues and eigenvectors of a written covariance; ``quick``: but for the leading ones in float32.

        Any shard may do it.
        """
        matrix = read_square(self.folder, key, "matrix", self.compute, self.spec.device)
        with profiling.of("eigendecomposition"):
            values, basis = square_eigenbasis(matrix, name, quick and self.compute is torch.float32)
        vectors, facts = (basis.flat(), {"sizes": basis.sizes}) if isinstance(basis, Blocks) else (basis, {})
        found = {"values": values, "vectors": vectors.to(self.compute)}
        arrays = {kind: gpu.to_host(x).numpy() for kind, x in found.items()}
        return *self.folder.write(f"factors/{_tidy(name)}/eigen", arrays, facts), numerics.here(self.spec.device)

    def _storage(self) -> type:
        return np.float64 if self.compute is torch.float64 else np.float32


def _matrices(part: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    for kind in ("moments", "products"):
        if kind in part:
            return list(part[kind].items())
    inputs = [(input_matrix(name), array) for name, array in part["inputs"].items()]
    return inputs + [(output_matrix(name), array) for name, array in part["grads"].items()]


def _trace(matrix: np.ndarray, sizes: Sequence[int]) -> float:
    """Of a covariance [n, n], or of the entries of its blocks, one after the other."""
    if matrix.ndim == 2:
        return float(np.trace(matrix, dtype=np.float64))
    ends = np.cumsum([size * size for size in sizes])[:-1]
    parts = zip(np.split(matrix, ends), sizes, strict=True)
    return float(sum(part[:: size + 1].sum(dtype=np.float64) for part, size in parts))


def _tidy(name: str) -> str:
    """A matrix's name as a folder: its layer, then which side of it, if one is named."""
    side, colon, layer = name.partition(":")
    return f"{layer}/{side}" if colon else f"{name}/lambda"
