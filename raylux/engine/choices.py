"""How products are taken: what the planner decides by cost, from model, data and number of queries."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from raylux.batches import MOST_ROWS, bucket, rows_per_batch
from raylux.config import Config
from raylux.cost.contraction import candidate_rotation, captured_width, query_rotation
from raylux.curvature import KINDS
from raylux.layers import TrackedLayer

# Below so many tracked parameters the conversions cost what bf16 products save.
_BF16_FROM = 1_000_000
# Captured sequences that are held until a product has enough rows, in bytes.
_PACK_BYTES = {"cpu": 256 << 20, "cuda": 8 << 30}
# Dense s_test of all queries together, in bytes: beyond, they are compressed.
_DENSE_BYTES = 4 << 30
_TILES = (8, 32, 64, 256)
# Queries from which on it is worth a look whether they fill batches, padded tokens of one on a CPU, and rows of it for
# each that is a query: a batch's shape is fixed, and rows that no query fills are computed all the same.
_MANY_QUERIES, _QUERY_TOKENS, _FILLED = 32, 512, 1.25


@dataclass(frozen=True)
class Products:
    """The part of the plan that says how queries and sequences meet; fields as those of ``Plan``."""

    rows: int
    tile: int
    query_basis: str
    low_rank: bool


def contraction(config: Config, device: str, layers: Sequence[TrackedLayer]) -> str:
    """The dtype of products: that of the config, or bfloat16 where hardware and model gain by it."""
    if config.model.dtype == "float64":
        return "float64"
    if config.engine.contraction_dtype != "auto":
        return config.engine.contraction_dtype
    pays = has_bfloat16(device) and sum(layer.parameters for layer in layers) >= _BF16_FROM
    return "bfloat16" if pays else "float32"


def has_bfloat16(device: str) -> bool:
    """Whether this machine multiplies bf16 faster than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    facts = torch.backends.cpu.get_cpu_capability(), _supports("_is_avx512_bf16_supported"), _supports("_is_amx_tile")
    return facts[0].startswith("AVX512") and (facts[1] or facts[2])


def query_tokens(device: str, batch_tokens: int, asked: Sequence[Sequence[int]], most: int) -> int:
    """Padded tokens of a batch of queries, or 0: each by itself, as where they are few or all of different lengths.

    Args:
        device: "cpu" or "cuda".
        batch_tokens: of a batch of sequences.
        asked: tokens of each part of each query.
        most: what padding need not exceed.
    """
    size = batch_tokens if device == "cuda" else _QUERY_TOKENS
    shapes = Counter((bucket(length, most), bucket(length, most) == length) for parts in asked for length in parts)
    rows = {shape: rows_per_batch(shape[0], size) for shape in shapes}
    run = sum(math.ceil(count / rows[shape]) * rows[shape] for shape, count in shapes.items())
    if len(asked) < _MANY_QUERIES or run > _FILLED * shapes.total() or max(rows.values()) == 1:
        return 0
    return size


def _supports(name: str) -> bool:
    for attribute in (name, f"{name}_supported"):
        check = getattr(torch.cpu, attribute, None)
        if check is not None:
            return bool(check())
    return False


def products(
    config: Config,
    device: str,
    layers: Sequence[TrackedLayer],
    groups: Mapping[str, str],
    tokens: float,
    queries: int,
    sequences: int,
) -> Products:
    """Decide how queries are stored and how many stand in a product.

    Args:
        config: its prefilter says how many candidates there will be.
        device: "cpu" or "cuda".
        layers: tracked.
        groups: layer -> leader of its input group.
        tokens: per sequence, on average.
        queries: asked for now; later ones are served with what is decided here.
        sequences: of the corpus.
    """
    halved = contraction(config, device, layers) == "bfloat16"
    itemsize = 2 if halved else 4
    large = queries * itemsize * sum(layer.parameters for layer in layers) > _DENSE_BYTES
    low_rank = config.query.max_error > 0 and (large or config.query.low_rank == "always")
    top = sequences if config.prefilter.kind == "none" else min(sequences, config.prefilter.top * queries)
    # Sequences are rotated in the precision of products, queries always in full.
    rotation = candidate_rotation(layers, groups, tokens) / (2 if halved else 1)
    cheaper = top * rotation < queries * query_rotation(layers)
    wanted = {"auto": cheaper and not low_rank, "standard": False, "eigen": True}[config.query.basis]
    eigen = wanted and KINDS[config.curvature.kind].basis
    captured = itemsize * tokens * sum(captured_width(layer, groups) for layer in layers)
    rows = max((size for size in (8, MOST_ROWS, 32) if size * captured <= _PACK_BYTES[device]), default=1)
    tile = max(size for size in _TILES if size <= max(_TILES[0], queries))
    return Products(rows, tile, "eigen" if eigen else "standard", low_rank and not eigen)
