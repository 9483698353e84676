"""What the stages leave in the run folder and how it is read back: factors and preconditioned queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylux.blocks import Blocks, Rotation, Square
from raylux.curvature import KINDS, Spectral
from raylux.curvature.joint import Joint
from raylux.curvature.projected import Projected
from raylux.errors import NumericsError
from raylux.gpu import to_host
from raylux.influence.words import WordGradient
from raylux.layers import TrackedLayer
from raylux.ledger import EIGEN, QUERY
from raylux.products import rotation
from raylux.scratch import Scratch
from raylux.store import RunFolder

# Of a block that is being solved, [S, Q, P, M] for each layer; its group's ``names`` says what each S is.
STATE = "state"


@dataclass(frozen=True)
class FactorFiles:
    """Keys of the eigenbases by matrix name (``A:group`` and ``S:layer``); empty for the standard basis."""

    eigen: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Projection:
    """How a kind that projects gradients does it, and what the fit has of it.

    Attributes:
        size: K.
        seed: of the signs.
        second: layer -> key of the mean outer product of what is projected; empty: not summed yet.
    """

    size: int
    seed: int
    second: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fitted:
    """What a fit left for the shards to make a layer's curvature of.

    Attributes:
        files: the eigenbases.
        moments: layer -> key of its Λ.
        rows_per_sequence: layer -> T̄.
        least: expert's layer -> the mean Λ below which that of its own does not count for its damping.
        segment: h of the segment of training that the run stands for, if it does.
        projection: of a kind that projects gradients.
    """

    files: FactorFiles
    moments: dict[str, str]
    rows_per_sequence: dict[str, float]
    least: dict[str, float]
    segment: float | None = None
    projection: Projection | None = None


@dataclass(frozen=True)
class Contraction:
    """How products of captured tensors are taken.

    Attributes:
        dtype: of their operands and results: "float32", "float64" or "bfloat16"; sums over products are wider.
        scored: sequences of the fit are scored too, so their gradients on the given labels are worth keeping.
    """

    dtype: str
    scored: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}[self.dtype]


@dataclass(frozen=True)
class QueryFiles:
    """One committed block of s_test: its query ids and the key of each layer's group."""

    queries: tuple[str, ...]
    layers: dict[str, str]


@dataclass(frozen=True)
class LoadedCurvature:
    """The damped curvature that a worker is to hold, some layers of it at a time.

    Attributes:
        fitted: what the fit left.
        kind: of curvature.
        damping: its setting.
        passes: names of layers, those of each part in the order of the model.
    """

    fitted: Fitted
    kind: str
    damping: float | str
    passes: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Directions:
    """What a block of queries wants G's product with.

    Attributes:
        keys: layer -> key of the block's state.
        name: of the part of it, [Q, P, M].
        places: of the queries that go on.
    """

    keys: dict[str, str]
    name: str
    places: tuple[int, ...]


def read_state(folder: RunFolder, key: str, name: str) -> np.ndarray:
    """One part of a layer's state in a solve, [Q, P, M]."""
    group = folder.group(key)
    return group.read(STATE, group.attrs["names"].index(name))


def input_matrix(group: str) -> str:
    """The name of an input group's A among the matrices of the fit."""
    return f"A:{group}"


def output_matrix(layer: str) -> str:
    """The name of a layer's S among the matrices of the fit."""
    return f"S:{layer}"


def factor_files(folder: RunFolder) -> FactorFiles:
    """The committed eigenbases."""
    return FactorFiles({unit: manifest.meta["key"] for unit, manifest in folder.units(EIGEN).items()})


def query_files(folder: RunFolder) -> list[QueryFiles]:
    """The committed blocks of s_test."""
    return [
        QueryFiles(tuple(manifest.meta["queries"]), manifest.meta["layers"])
        for manifest in folder.units(QUERY).values()
    ]


def each_query(parts: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """A shard's parts of queries, whether they come one by one or in lists, as queries that were run together do."""
    return [query for part in parts for query in ([part] if isinstance(part, Mapping) else part)]


def tensor(array: np.ndarray, dtype: torch.dtype, device: str, own: bool = True) -> Tensor:
    """A tensor in memory of torch's own alignment, whatever the array's: alignment can change bits.

    ``own`` False: in the array's memory, where nothing has to be converted; for what is only copied.
    """
    x = torch.from_numpy(np.ascontiguousarray(array))
    # Onto a device it goes as it is and is converted there: a copy on the host takes longer than the way.
    x = x.to(device) if device != "cpu" else x.clone() if own else x
    x = x.view(torch.bfloat16) if x.dtype == torch.int16 else x
    return x.to(dtype)


def numpy_array(x: Tensor) -> np.ndarray:
    """A tensor for the store, which knows no bf16: int16 stands for it (and −1, the fill value, for a NaN)."""
    x = to_host(x)
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def read_basis(
    folder: RunFolder, files: FactorFiles, layer: str, group: str, dtype: torch.dtype, device: str
) -> tuple[Square | None, Square | None]:
    """(Q_A [M, M], Q_S [P, P]) of a layer, or (None, None)."""
    if not files.eigen:
        return None, None
    keys = files.eigen[input_matrix(group)], files.eigen[output_matrix(layer)]
    q_a, q_s = (read_square(folder, key, "vectors", dtype, device) for key in keys)
    return q_a, q_s


def read_rotation(
    folder: RunFolder, files: FactorFiles, layer: str, group: str, dtype: torch.dtype, device: str
) -> tuple[Rotation | None, Rotation | None]:
    """``read_basis`` as tokens are rotated by it in products of ``dtype``."""
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    q_a, q_s = read_basis(folder, files, layer, group, wide, device)
    return rotation(q_a, dtype), rotation(q_s, dtype)


def read_square(folder: RunFolder, key: str, name: str, dtype: torch.dtype, device: str) -> Square:
    """A covariance or its eigenvectors: whole, or where the group names ``sizes``, in blocks of so many rows."""
    group = folder.group(key)
    found = tensor(group.read(name), dtype, device)
    return Blocks.of(found, group.attrs["sizes"]) if "sizes" in group.attrs else found


def read_curvature(
    folder: RunFolder, fitted: Fitted, kind: str, layer: str, group: str, dtype: torch.dtype, device: str
) -> Spectral:
    """The curvature of a layer, of what a fit of this kind left."""

    def read(key: str, name: str) -> Tensor:
        return tensor(folder.group(key).read(name), dtype, device)

    eigen = fitted.files.eigen
    q_a, q_s = read_basis(folder, fitted.files, layer, group, dtype, device)
    values: list[Tensor | None] = [None, None]
    if eigen:
        values = [read(eigen[matrix], "values") for matrix in (input_matrix(group), output_matrix(layer))]
    lam = read(fitted.moments[layer], "matrix") if fitted.moments else None
    rows = fitted.rows_per_sequence.get(layer, 1.0)
    found = KINDS[kind].assemble(q_a, q_s, values[0], values[1], lam, rows)
    found.segment = fitted.segment
    return found


def read_projected(
    folder: RunFolder, fitted: Fitted, layer: str, damping: float | str, dtype: torch.dtype, device: str
) -> Projected:
    """The metric of a layer, of what a fit of a kind that projects left; not whitened before that is summed.

    Raises:
        NumericsError: it is singular.
    """
    projection = fitted.projection
    assert projection is not None, "a kind that projects"
    moments = tensor(folder.group(fitted.moments[layer]).read("matrix"), dtype, device)
    found = Projected.of(layer, moments, projection.size, projection.seed)
    if not projection.second:
        return found
    second = tensor(folder.group(projection.second[layer]).read("matrix"), dtype, device)
    try:
        return found.whitened(second, damping)
    except NumericsError as error:
        raise NumericsError(f"layer '{layer}': {error}") from None


def read_joint(
    folder: RunFolder,
    fitted: Fitted,
    kind: str,
    shapes: Mapping[str, tuple[int, int]],
    damping: float | str,
    device: str,
) -> Joint:
    """The exact matrix of all tracked layers with their damping, of what a fit of a joint kind left.

    Raises:
        UserError: it is the Hessian, and not positive definite.
        NumericsError: it is singular.
    """
    panels, dampings = {}, {}
    for name in shapes:
        group = folder.group(fitted.moments[name])
        panels[name] = tensor(group.read("panel"), torch.float64, device)
        values = tensor(group.read("matrix"), torch.float64, device)
        dampings[name] = Spectral(values).damping(damping, fitted.least.get(name, 0.0))
    return Joint.of(kind, shapes, panels, dampings)


def read_layer_queries(
    folder: RunFolder,
    files: Sequence[QueryFiles],
    layer: str,
    ids: Sequence[str],
    dtype: torch.dtype,
    device: str,
    scratch: Scratch | None = None,
) -> list[Tensor | tuple[Tensor, Tensor]]:
    """s_test of each query of ``ids`` in one layer of matrices: dense [P, M], or (left [P, R], right [M, R]).

    ``scratch``: memory for the dense ones, which the next layer takes over; not of torch's alignment.
    """
    found: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    for number, block in enumerate(files):
        if not set(block.queries) & set(ids):
            continue
        group = folder.group(block.layers[layer])
        ranks, places = group.read("rank"), group.read("place")
        arrays: dict[str, Any] = {name: group.read(name) for name in ("left", "right") if name in group}
        if "dense" in group:
            memory = partial(_bytes, scratch or Scratch(), f"dense {number}")
            arrays["dense"] = group.read_into("dense", memory)
        for index, query in enumerate(block.queries):
            if query not in ids:
                continue
            rank, place = int(ranks[index]), int(places[index])
            if rank < 0:
                found[query] = tensor(arrays["dense"][place], dtype, device, own=scratch is None)
            else:
                left, right = arrays["left"][place][:, :rank], arrays["right"][place][:, :rank]
                found[query] = tensor(left, dtype, device), tensor(right, dtype, device)
    return [found[query] for query in ids]


def _bytes(scratch: Scratch, use: str, count: int) -> np.ndarray:
    return scratch.take(use, (count,), torch.uint8, "cpu").numpy()


def read_word_queries(
    folder: RunFolder,
    files: Sequence[QueryFiles],
    layer: TrackedLayer,
    ids: Sequence[str],
    dtype: torch.dtype,
    device: str,
) -> list[WordGradient]:
    """s_test of each query of ``ids`` in the word embedding."""
    found: dict[str, WordGradient] = {}
    for block in files:
        if set(block.queries) & set(ids):
            group = folder.group(block.layers[layer.name])
            offsets, words, vectors = (group.read(name) for name in ("offsets", "words", "vectors"))
            for index, query in enumerate(block.queries):
                part = slice(int(offsets[index]), int(offsets[index + 1]))
                known = torch.from_numpy(words[part].copy()).to(device)
                found[query] = WordGradient(known, tensor(vectors[part], dtype, device))
    return [found[query] for query in ids]


def word_query_arrays(queries: Sequence[WordGradient]) -> dict[str, np.ndarray]:
    """The arrays of the word embedding of a query block: ``words`` and ``vectors`` [·, P] of all, from ``offsets``."""
    return {
        "words": np.concatenate([to_host(query.ids).numpy() for query in queries]),
        "vectors": np.concatenate([numpy_array(query.vectors) for query in queries]),
        "offsets": np.concatenate([[0], np.cumsum([len(query.ids) for query in queries])]).astype(np.int64),
    }


def query_arrays(
    dense: Sequence[Tensor] | Tensor, factors: Sequence[tuple[Tensor, Tensor]], is_dense: Sequence[bool]
) -> dict[str, np.ndarray]:
    """The arrays of one layer of a query block.

    ``rank`` [Q]: −1 where dense; ``place`` [Q]: the query's index in ``dense`` [n, P, M], or in ``left``
    [m, P, R] and ``right`` [m, M, R], which are filled with zeros up to the largest rank.
    """
    ranks, places, counts = [], [], [0, 0]
    low = iter(factors)
    for flag in is_dense:
        ranks.append(-1 if flag else next(low)[0].shape[1])
        places.append(counts[flag])
        counts[flag] += 1
    arrays = {"rank": np.array(ranks, np.int64), "place": np.array(places, np.int64)}
    if len(dense):
        arrays["dense"] = numpy_array(dense if isinstance(dense, Tensor) else torch.stack(list(dense)))
    if factors:
        most = max(1, *(left.shape[1] for left, _ in factors))
        for side, name in enumerate(("left", "right")):
            padded = [torch.nn.functional.pad(pair[side], (0, most - pair[side].shape[1])) for pair in factors]
            arrays[name] = np.stack([numpy_array(x) for x in padded])
    return arrays


def damping_of(folder: RunFolder) -> dict[str, float]:
    """Layer -> λ of a run whose queries are solved; it is the layer's, the same in every block of queries."""
    found: dict[str, float] = next((manifest.meta["damping"] for manifest in folder.units(QUERY).values()), {})
    return found
