"""Layer passes: which layers a worker holds the sums (and bases) of at a time, so that they fit beside the model.

A pass runs the model over all fitted sequences for its own layers; the last layers of the model come first. Layers
that read the same tensor stay together, as they share one A. Which layers stand in a pass changes no bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from raylux.blocks import block_entries, block_sizes, triangle_entries
from raylux.layers import TrackedLayer

Layers = Sequence[TrackedLayer]
Held = Callable[[TrackedLayer], float]
"""Bytes that a worker holds for a layer of its pass."""

# Each runs the model over all sequences of the fit.
MOST_PASSES = 64


def covariance_held(groups: Mapping[str, str], itemsize: int, blocks: int = 1) -> Held:
    """S of a layer, and A where the layer leads its input group, in ``blocks`` blocks each."""
    return _sides_held(groups, lambda side: itemsize * block_entries(side, blocks))


def triangles_held(groups: Mapping[str, str], itemsize: int, blocks: int = 1) -> Held:
    """As ``covariance_held``, one triangle of each block: what the shards hold of A and S while they are summed."""
    return _sides_held(groups, lambda side: itemsize * triangle_entries(block_sizes(side, blocks)))


def _sides_held(groups: Mapping[str, str], size: Callable[[int], int]) -> Held:
    """``size`` of the outputs of a layer, and of its inputs where it leads its input group."""
    leaders = frozenset(groups.values())

    def held(layer: TrackedLayer) -> float:
        return float(size(layer.outputs) + (size(layer.inputs) if layer.name in leaders else 0))

    return held


def moments_held(groups: Mapping[str, str], basis_itemsize: int, itemsize: int, blocks: int = 1) -> Held:
    """Λ of a layer, and its bases (``basis_itemsize`` 0: there are none) in ``blocks`` blocks."""
    bases = covariance_held(groups, basis_itemsize, blocks)
    return lambda layer: bases(layer) + itemsize * layer.parameters


def split(
    layers: Layers, groups: Mapping[str, str], count: int, devices: Mapping[str, str] | None = None
) -> list[Layers]:
    """``count`` runs of about equally many input groups, the last of the model first; no more than there are groups.

    Where layers lie on several ``devices``, each is cut so, and a pass takes a run of each: all have their part of it.
    """
    if devices is not None and len({devices[layer.name] for layer in layers}) > 1:
        own: dict[str, list[TrackedLayer]] = {}
        for layer in layers:
            own.setdefault(devices[layer.name], []).append(layer)
        each = [split(those, groups, count) for those in own.values()]
        return [list(itertools.chain(*some)) for some in itertools.zip_longest(*each, fillvalue=())]
    families: dict[str, list[TrackedLayer]] = {}
    for layer in layers:
        families.setdefault(groups[layer.name], []).append(layer)
    runs, count = list(families.values()), max(1, min(count, len(families)))
    ends = [round(len(runs) * place / count) for place in range(count + 1)]
    blocks = [list(itertools.chain(*runs[start:stop])) for start, stop in itertools.pairwise(ends)]
    return list(reversed(blocks))


@dataclass(frozen=True)
class Rooms:
    """Bytes that a pass may take on each device of a worker, and the device on which each layer lies."""

    of: Mapping[str, float]
    devices: Mapping[str, str]

    @classmethod
    def one(cls, room: float, layers: Layers) -> Rooms:
        """Of a worker with a single device."""
        return cls({"": room}, {layer.name: "" for layer in layers})

    @property
    def total(self) -> float:
        return sum(self.of.values())

    def short(self, blocks: Sequence[Layers], held: Held) -> float:
        """Bytes that some device lacks in one of these passes; none where that is no more than 0."""
        return max(self._short(block, held) for block in blocks)

    def _short(self, block: Layers, held: Held) -> float:
        sums: dict[str, float] = {}
        for layer in block:
            where = self.devices[layer.name]
            sums[where] = sums.get(where, 0.0) + held(layer)
        return max(size - self.of[where] for where, size in sums.items())


def cut(layers: Layers, groups: Mapping[str, str], held: Held, rooms: Rooms, least: int = 1) -> list[Layers] | None:
    """The fewest runs of layers, at least ``least``, of which each fits the worker's devices; None: they do not."""
    if rooms.short(split(layers, groups, len(layers), rooms.devices), held) > 0:
        return None
    least = max(least, math.ceil(sum(map(held, layers)) / rooms.total))
    for count in range(least, min(MOST_PASSES, len({groups[layer.name] for layer in layers})) + 1):
        blocks = split(layers, groups, count, rooms.devices)
        if rooms.short(blocks, held) <= 0:
            return blocks
    return None


def largest(blocks: Sequence[Layers], held: Held) -> float:
    """Bytes that a worker holds in the largest of these passes."""
    return max(sum(map(held, block)) for block in blocks)
