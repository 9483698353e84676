"""What is decided once for a run, from model, data and config alone, and what a cluster must have for it.

Everything here that changes bits (unit sizes, batches, threads, device) is frozen in run.yaml; the number of
workers and shards is not, it follows the cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from raylux.batches import longest
from raylux.config import Config
from raylux.cost.sizes import (
    GIB,
    QUERY_BLOCK,
    covariance_bytes,
    fitted_tokens,
    layer_bytes,
    probe_count,
    query_block,
    score_unit_size,
    shards_bytes,
    unit_tokens,
    worker_bytes,
)
from raylux.engine import choices
from raylux.layers import TrackedLayer, matrices
from raylux.sampling import sequence_key

__all__ = [
    "GIB",
    "QUERY_BLOCK",
    "Plan",
    "assign",
    "choose_fit_rows",
    "covariance_bytes",
    "fit_units",
    "layer_bytes",
    "make_plan",
    "probe_count",
    "query_block",
    "shards_bytes",
    "worker_bytes",
]


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
        query_tokens: padded tokens of a batch of queries, at most; 0: each runs by itself.
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
    query_tokens: int = 0

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
    asked: Sequence[Sequence[int]] = (),
) -> Plan:
    """Resolve every "auto" that changes bits.

    Args:
        config: with its "auto"s.
        device: "cpu" or "cuda".
        layers: tracked.
        groups: layer -> leader of its input group.
        parameters: of the model.
        lengths: [N] tokens of each sequence of the corpus.
        context: the longest sequence that the model takes.
        queries: how many there are.
        asked: tokens of each part of each of them, as far as they are known.
    """
    layers = matrices(layers)
    batch = config.engine.batch_tokens
    if batch == "auto":
        batch = _batch_tokens(device, layers)
    unit = config.fit.unit_tokens
    if unit == "auto":
        fitted = fitted_tokens(config.fit.sequences, len(lengths), int(lengths.sum()))
        unit = unit_tokens(device, layers, groups, parameters, fitted, int(batch), config.curvature.blocks)
    size = config.score.unit_size
    if size == "auto":
        size = score_unit_size(len(lengths))
    chosen = choices.products(config, device, layers, groups, float(lengths.mean()), queries, len(lengths))
    most = longest(lengths, context)
    return Plan(
        device,
        config.model.dtype,
        config.engine.threads,
        int(batch),
        int(unit),
        int(size),
        float(lengths.mean()),
        most,
        choices.contraction(config, device, layers),
        chosen.rows,
        chosen.tile,
        chosen.query_basis,
        chosen.low_rank,
        choices.query_tokens(device, int(batch), asked, most),
    )


def _batch_tokens(device: str, layers: Sequence[TrackedLayer]) -> int:
    if device == "cuda":
        return 16_384
    # On a CPU a layer of half a million weights keeps a core busy with a single sequence; below that,
    # the overhead of small operations counts.
    return 128 if max((layer.parameters for layer in layers), default=0) > 400_000 else 1024


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


# Score units in a stretch of the corpus within which sequences are taken by length.
_STRETCH = 256


def score_units(lengths: np.ndarray, size: int) -> np.ndarray:
    """The score unit of each corpus row [n], a function of the lengths alone; the longest rows of a stretch come first.

    A batch holds rows of one padded length, filled up where there are too few (``score_batches``): in a unit of
    sequences of like length that is seldom. Cut by tokens, so that units take about the same time.

    Args:
        lengths: [n] tokens of each corpus row.
        size: rows of mean length in a unit.
    """
    units = np.zeros(len(lengths), np.int64)
    first = 0
    for start in range(0, len(lengths), _STRETCH * size):
        stretch = np.asarray(lengths[start : start + _STRETCH * size], np.int64)
        order = np.argsort(-stretch, kind="stable")
        before = np.cumsum(stretch[order]) - stretch[order]
        units[start + order] = first + (before / (size * stretch.mean())).astype(np.int64)
        first = int(units[start : start + len(stretch)].max()) + 1
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
