"""What is decided once for a run, from model, data and config alone, and what a cluster must have for it.

Everything here that changes bits (unit sizes, batches, threads, device) is frozen in run.yaml; the number of
workers and shards is not, it follows the cluster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from raylux.batches import longest
from raylux.config import Config
from raylux.engine import choices
from raylux.layers import TrackedLayer
from raylux.sampling import sequence_key

GIB = 1 << 30

# Nominal rates by which units are sized: a unit's compute is to outweigh the moving of its sums. They are
# constants, not measurements, so that the same run is cut alike everywhere.
_FLOPS = {"cpu": 1e11, "cuda": 2e14}
_BYTES = {"cpu": 5e8, "cuda": 8e9}
_MOVE_SHARE = 20.0

# A process with torch and transformers loaded, before any model.
_PROCESS_BYTES = GIB // 2
QUERY_BLOCK = 16
_BLOCK_BYTES = 2 * GIB


@dataclass(frozen=True)
class Plan:
    """The frozen choices of a run.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of the model.
        threads: CPU threads of a worker.
        batch_tokens: padded tokens of a batch, at most.
        fit_unit_tokens: tokens of a fit unit, at least.
        score_unit_size: corpus rows of a score unit.
        typical_tokens: mean tokens of a sequence, by which contractions are chosen.
        longest: padding does not go beyond: the tokens of the longest sequence in whole blocks of rows.
        contraction: dtype of the products of captured tensors, unless its measured error speaks against it.
        rows: sequences of a product against dense queries.
        tile: dense queries of such a product.
        query_basis: "standard", or "eigen": queries stay in the eigenbasis and the candidates' tokens are rotated.
        low_rank: compress s_test; dense queries that fit the memory are left as they are.
    """

    device: str
    dtype: str
    threads: int
    batch_tokens: int
    fit_unit_tokens: int
    score_unit_size: int
    typical_tokens: float
    longest: int
    contraction: str = "float32"
    rows: int = 16
    tile: int = 8
    query_basis: str = "standard"
    low_rank: bool = True

    def dump(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    config: Config,
    device: str,
    layers: Sequence[TrackedLayer],
    groups: Mapping[str, str],
    parameters: int,
    lengths: np.ndarray,
    context: int | None = None,
    queries: int = 1,
) -> Plan:
    """Resolve every "auto" that changes bits."""
    batch = config.engine.batch_tokens
    if batch == "auto":
        batch = _batch_tokens(device, layers)
    unit = config.fit.unit_tokens
    if unit == "auto":
        fitted = min(config.fit.sequences, len(lengths)) / max(1, len(lengths)) * int(lengths.sum())
        unit = _unit_tokens(device, layers, groups, parameters, fitted, int(batch))
    size = config.score.unit_size
    if size == "auto":
        size = int(min(4096, max(256, len(lengths) // 16)))
    chosen = choices.products(config, device, layers, groups, float(lengths.mean()), queries, len(lengths))
    return Plan(
        device,
        config.model.dtype,
        config.engine.threads,
        int(batch),
        int(unit),
        int(size),
        float(lengths.mean()),
        longest(lengths, context),
        choices.contraction(config, device, layers),
        chosen.rows,
        chosen.tile,
        chosen.query_basis,
        chosen.low_rank,
    )


def _batch_tokens(device: str, layers: Sequence[TrackedLayer]) -> int:
    if device == "cuda":
        return 16_384
    # On a CPU a layer of half a million weights keeps a core busy with a single sequence; below that,
    # the overhead of small operations counts.
    return 128 if max(layer.parameters for layer in layers) > 400_000 else 1024


def _unit_tokens(
    device: str,
    layers: Sequence[TrackedLayer],
    groups: Mapping[str, str],
    parameters: int,
    fitted_tokens: float,
    batch_tokens: int,
) -> int:
    flops_per_token = 4.0 * parameters + 2.0 * sum(_covariance_sizes(layers, groups))
    moving = covariance_bytes(layers, groups) / _BYTES[device]
    cheap = _MOVE_SHARE * moving * _FLOPS[device] / flops_per_token
    return math.ceil(max(cheap, fitted_tokens / 64, 2 * batch_tokens))


def _covariance_sizes(layers: Sequence[TrackedLayer], groups: Mapping[str, str]) -> list[int]:
    """Entries of each A (one per input group) and each S."""
    leaders = set(groups.values())
    return [layer.inputs**2 for layer in layers if layer.name in leaders] + [layer.outputs**2 for layer in layers]


def covariance_bytes(layers: Sequence[TrackedLayer], groups: Mapping[str, str], itemsize: int = 4) -> int:
    """One set of sums of A and S."""
    return itemsize * sum(_covariance_sizes(layers, groups))


def layer_bytes(layers: Sequence[TrackedLayer], itemsize: int = 4) -> int:
    """One gradient, or one Λ, over all tracked layers."""
    return itemsize * sum(layer.parameters for layer in layers)


def worker_bytes(
    layers: Sequence[TrackedLayer], groups: Mapping[str, str], parameters: int, itemsize: int, queries: int
) -> int:
    """Memory of a gradient worker at its peak: the model with the largest of what it holds beside it."""
    covariance = covariance_bytes(layers, groups, itemsize)
    moments = covariance + layer_bytes(layers, itemsize)
    scoring = queries * layer_bytes(layers, itemsize)
    return _PROCESS_BYTES + parameters * itemsize + max(covariance, moments, scoring)


def shards_bytes(layers: Sequence[TrackedLayer], groups: Mapping[str, str], itemsize: int, queries: int) -> int:
    """Memory of all factor shards together at their peak: sums in float64, or bases with a block of s_test."""
    sums = covariance_bytes(layers, groups, 8)
    solving = covariance_bytes(layers, groups, itemsize) + min(_BLOCK_BYTES, queries * layer_bytes(layers, itemsize))
    return max(sums, solving)


def probe_count(setting: int | str, parameters: int) -> int:
    """Sequences on which compression is measured: as many as a second or so of a small model's time allows."""
    return setting if isinstance(setting, int) else int(min(128, max(32, 2e9 // parameters)))


def query_block(layers: Sequence[TrackedLayer], itemsize: int) -> int:
    """Queries that are solved together."""
    return int(max(1, min(QUERY_BLOCK, _BLOCK_BYTES // max(1, layer_bytes(layers, itemsize)))))


def choose_fit_rows(ids: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Rows of the sequences to fit on, in the order of the fit: those whose keyed hash is smallest.

    The choice and its order depend on the ids alone, not on the order of the corpus.
    """
    keys = np.array([sequence_key(f"fit {seed} {name}") for name in ids], np.int64)
    return np.argsort(keys, kind="stable")[:count]


def fit_units(lengths: Sequence[int] | np.ndarray, unit_tokens: int) -> list[slice]:
    """Cut a list of sequences into runs of at least ``unit_tokens`` tokens (the last may be shorter)."""
    units, start, held = [], 0, 0
    for place, length in enumerate(lengths):
        held += int(length)
        if held >= unit_tokens:
            units.append(slice(start, place + 1))
            start, held = place + 1, 0
    if start < len(lengths):
        units.append(slice(start, len(lengths)))
    return units


def assign(layers: Sequence[TrackedLayer], groups: Mapping[str, str], shards: int) -> list[list[str]]:
    """Layer names of each shard; layers of one input group stay together, cubic costs are evened out."""
    cost: dict[str, float] = {}
    members: dict[str, list[str]] = {}
    for layer in layers:
        leader = groups[layer.name]
        inputs = layer.inputs**3 if leader == layer.name else 0.0
        cost[leader] = cost.get(leader, 0.0) + inputs + layer.outputs**3
        members.setdefault(leader, []).append(layer.name)
    loads = [0.0] * shards
    result: list[list[str]] = [[] for _ in range(shards)]
    for leader in sorted(members, key=lambda name: (-cost[name], name)):
        lightest = loads.index(min(loads))
        loads[lightest] += cost[leader]
        result[lightest] += members[leader]
    return result
