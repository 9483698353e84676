"""Bytes of sums, factors, queries and workers, and how long a fit unit is: what the engine is sized by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from raylux.blocks import block_entries
from raylux.cost.costs import Passes
from raylux.cost.passes import covariance_held, largest, moments_held, split, triangles_held
from raylux.layers import TrackedLayer

GIB = 1 << 30
# A process with torch and transformers loaded, before any model.
PROCESS_BYTES = 5 * GIB // 8
QUERY_BLOCK = 16
_BLOCK_BYTES = 2 * GIB
# Dense queries of a block, at most, and what their tokens may take.
_DENSE_BLOCK, _WAITING_BYTES = 64, GIB // 4
# Solution, residual, direction, G times it, the residual preconditioned, and the product's sum in float64: by their
# size those of so many gradients.
SOLVE_STATE = 7

# Dense queries up to so many bytes a worker holds in memory, more of them on its disk, read once for each product.
_IN_MEMORY = 256 << 20
# Bytes of a layer's queries that are used as they were read, once, before they rest on the disk.
_ONCE = 384 << 20
# Bytes of kept sequences in a layer, and of what is formed of them, that are held at a time; of the others, in all
# layers, as they were captured.
_TOGETHER, _CAPTURED_TOGETHER = 192 << 20, 512 << 20
# The latter on a GPU that is lent queries for each company of sequences; and where all queries are read for each, as
# two stages do, a share of their bytes, up to a bound.
_LENT_TOGETHER = 8 << 30
_SHARE_TOGETHER, _MOST_TOGETHER = 1 / 8, 2 << 30
# Entries of a gradient that are formed and multiplied at a time: the buffer stays small however large the layer, and
# what is rounded to bf16 is a part of a sum, not the whole. A GPU wants large products, and rounds no sum.
SLICE, GPU_SLICE = 1 << 19, 1 << 22

# Nominal rates by which units are sized: a unit's compute is to outweigh the moving of its sums. They are
# constants, not measurements, so that the same run is cut alike everywhere.
_FLOPS = {"cpu": 1e11, "cuda": 2e14}
_BYTES = {"cpu": 5e8, "cuda": 8e9}
_MOVE_SHARE = 20.0
_MOST_UNITS = 64


def covariance_sides(layers: Sequence[TrackedLayer], groups: Mapping[str, str]) -> list[int]:
    """Rows of each A (one per input group) and each S."""
    leaders = set(groups.values())
    return [layer.inputs for layer in layers if layer.name in leaders] + [layer.outputs for layer in layers]


def covariance_entries(layers: Sequence[TrackedLayer], groups: Mapping[str, str], blocks: int = 1) -> list[int]:
    """Entries of each A and S, in ``blocks`` blocks."""
    return [block_entries(side, blocks) for side in covariance_sides(layers, groups)]


def covariance_products(layers: Sequence[TrackedLayer], groups: Mapping[str, str], blocks: int = 1) -> float:
    """Multiplications of a token for all A and S, an expert's by its share of the tokens."""
    leaders = set(groups.values())
    return sum(
        layer.share
        * (block_entries(layer.outputs, blocks) + (block_entries(layer.inputs, blocks) if layer.name in leaders else 0))
        for layer in layers
    )


def covariance_bytes(
    layers: Sequence[TrackedLayer], groups: Mapping[str, str], itemsize: int = 4, blocks: int = 1
) -> int:
    """One set of sums of A and S."""
    return itemsize * sum(covariance_entries(layers, groups, blocks))


def triangle_bytes(
    layers: Sequence[TrackedLayer], groups: Mapping[str, str], itemsize: int = 4, blocks: int = 1
) -> int:
    """One triangle of each A and S: what is sent to the shards and held there."""
    return int(sum(map(triangles_held(groups, itemsize, blocks), layers)))


def layer_bytes(layers: Sequence[TrackedLayer], itemsize: int = 4) -> int:
    """One gradient, or one Λ, over all tracked layers."""
    return itemsize * sum(layer.parameters for layer in layers)


def projected_bytes(layers: int, size: int, itemsize: int = 8) -> int:
    """What whitens the projections to [size, size] of so many layers."""
    return itemsize * layers * size**4


def worker_bytes(
    layers: Sequence[TrackedLayer],
    groups: Mapping[str, str],
    parameters: int,
    itemsize: int,
    queries: int,
    iterative: bool = False,
    passes: Passes = Passes(),  # noqa: B008 (frozen)
    blocks: int = 1,
) -> int:
    """Memory of a gradient worker at its peak: the model with the largest of what it holds beside it.

    ``iterative``: queries are solved by products with G, and directions and their products held for a block.
    ``passes``: in which the fit sums. ``blocks``: of A and S.
    """
    covariance = int(largest(split(layers, groups, passes.covariance), covariance_held(groups, itemsize, blocks)))
    moments = int(largest(split(layers, groups, passes.moments), moments_held(groups, itemsize, itemsize, blocks)))
    scoring = queries * layer_bytes(layers, itemsize)
    products = 2 * min(queries, solve_block(layers, itemsize)) * layer_bytes(layers, itemsize) if iterative else 0
    return PROCESS_BYTES + parameters * itemsize + max(covariance, moments, scoring, products)


def shards_bytes(
    layers: Sequence[TrackedLayer],
    groups: Mapping[str, str],
    itemsize: int,
    queries: int,
    iterative: bool = False,
    passes: Passes = Passes(),  # noqa: B008 (frozen)
    blocks: int = 1,
) -> int:
    """Memory of all factor shards together at their peak: a pass's sums in float64, or bases with a block of s_test."""
    sums = int(largest(split(layers, groups, passes.covariance), triangles_held(groups, 8, blocks)))
    sums = max(sums, int(largest(split(layers, groups, passes.moments), moments_held(groups, 0, 8))))
    held = queries * layer_bytes(layers, itemsize)
    if iterative:
        held = SOLVE_STATE * min(queries, solve_block(layers, itemsize)) * layer_bytes(layers, itemsize)
    else:
        held = min(_BLOCK_BYTES, held)
    solving = covariance_bytes(layers, groups, itemsize, blocks) + held
    return max(sums, solving)


def query_block(layers: Sequence[TrackedLayer], itemsize: int, waiting: float = 0.0, bases: float = math.inf) -> int:
    """Queries that are solved together.

    Args:
        layers: tracked.
        itemsize: of an entry of s_test.
        waiting: bytes of a query's tokens, which wait for its block's turn at each layer, where s_test is dense and is
            written layer by layer; 0: all of it is held. More queries share the reading of a layer's bases then.
        bases: bytes of all bases. Where the tokens of a usual block would take more room than they are to, and these
            less than is spared, half of it is solved at a time; by default they are too many.
    """
    room = _BLOCK_BYTES // max(1, layer_bytes(layers, itemsize))
    usual = min(QUERY_BLOCK, room)
    if waiting:
        usual = max(usual, QUERY_BLOCK * int(min(_DENSE_BLOCK, room, _WAITING_BYTES // waiting) // QUERY_BLOCK))
        if usual * waiting > max(_WAITING_BYTES, 2 * bases):
            usual //= 2
    return int(max(1, usual))


def solve_block(layers: Sequence[TrackedLayer], itemsize: int) -> int:
    """Queries that are solved together by iterations, each with ``SOLVE_STATE`` gradients of state."""
    room = _BLOCK_BYTES // max(1, SOLVE_STATE * layer_bytes(layers, itemsize))
    return int(max(1, min(QUERY_BLOCK, room)))


def queries_rest(layers: Sequence[TrackedLayer], queries: int, itemsize: int) -> bool:
    """Whether a worker has no memory for so many dense queries: they rest on its disk, on a CPU."""
    return queries * layer_bytes(layers, itemsize) > _IN_MEMORY


def used_once(layer: TrackedLayer, queries: int, itemsize: int) -> bool:
    """Whether so many queries, which rest, are used in a layer as they were read before they are put to rest."""
    return queries * layer.parameters * itemsize <= _ONCE


def products_together(layers: Sequence[TrackedLayer], tokens: float, rows: int, itemsize: int) -> int:
    """Of how many products kept sequences are taken together, so that queries that rest are read once for them.

    Their tokens in one layer, and what is formed of them, are held at a time.

    Args:
        layers: dense ones.
        tokens: of a sequence, padding included.
        rows: sequences of a product.
        itemsize: of an operand.
    """
    entries = max((tokens * (layer.inputs + layer.outputs) for layer in layers), default=1)
    formed = max((layer.parameters for layer in layers), default=1)
    return max(1, int(_TOGETHER // (itemsize * rows * max(entries, min(formed, SLICE)))))


def captured_together(
    layers: Sequence[TrackedLayer],
    groups: Mapping[str, str],
    tokens: float,
    rows: int,
    itemsize: int,
    lent: bool = False,
    read: float = 0.0,
) -> int:
    """``products_together`` of sequences that are not kept: all their a and g are held.

    ``lent``: on a GPU, which is lent queries for them. ``read``: bytes of the queries that are read for each company.
    """
    widths = {groups[layer.name]: layer.inputs for layer in layers}
    entries = tokens * (sum(widths.values()) + sum(layer.outputs for layer in layers))
    most = _LENT_TOGETHER if lent else max(_CAPTURED_TOGETHER, min(_SHARE_TOGETHER * read, _MOST_TOGETHER))
    return max(1, int(most // (entries * itemsize * rows)))


def probe_count(setting: int | str, parameters: int) -> int:
    """Sequences on which compression is measured: as many as a second or so of a small model's time allows."""
    return setting if isinstance(setting, int) else int(min(128, max(32, 2e9 // parameters)))


def rank_limit(setting: int, layer: TrackedLayer) -> int:
    """Largest rank of a layer's s_test that is no larger than ``setting`` and still halves its memory."""
    return min(setting, layer.parameters // (2 * (layer.outputs + layer.inputs)))


def unit_tokens(
    device: str,
    layers: Sequence[TrackedLayer],
    groups: Mapping[str, str],
    parameters: int,
    fitted_tokens: float,
    batch_tokens: int,
    blocks: int = 1,
) -> int:
    """Tokens of a fit unit: computing its sums takes ``_MOVE_SHARE`` times as long as moving them."""
    active = parameters - sum((1 - layer.share) * layer.parameters for layer in layers)
    flops_per_token = 4.0 * active + 2.0 * covariance_products(layers, groups, blocks)
    moving = covariance_bytes(layers, groups, blocks=blocks) / _BYTES[device]
    cheap = _MOVE_SHARE * moving * _FLOPS[device] / flops_per_token
    return math.ceil(max(cheap, fitted_tokens / _MOST_UNITS, 2 * batch_tokens))


def fitted_tokens(sequences: int, corpus_sequences: int, corpus_tokens: float) -> float:
    """Tokens of the sequences of a fit, by the corpus's mean."""
    return min(sequences, corpus_sequences) / max(1, corpus_sequences) * corpus_tokens


def score_unit_size(corpus_sequences: int) -> int:
    """Corpus rows of a score unit."""
    return int(min(4096, max(256, corpus_sequences // 16)))


def factor_bytes(
    layers: Sequence[TrackedLayer],
    groups: Mapping[str, str],
    itemsize: int,
    basis: bool,
    moments: bool,
    blocks: int = 1,
    projection: int = 0,
) -> int:
    """Factors at rest: covariances and eigenvectors where there is a basis (eigenvalues are left out), and Λ.

    ``projection``: K of a kind that projects gradients, which keeps what whitens them.
    """
    found = 2 * covariance_bytes(layers, groups, itemsize, blocks) if basis else 0
    found += projected_bytes(len(layers), projection, itemsize)
    return found + (layer_bytes(layers, itemsize) if moments else 0)
