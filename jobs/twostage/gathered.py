"""What a rescored pair costs in time: products of gathered pairs beside one matrix product of all pairs.

Rescoring has few multiplications, each of which needs numbers of its own from memory; a matrix product uses each number
hundreds of times.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_ENTRIES, _QUERIES, _SEQUENCES = 1 << 16, 1000, 128
_SLICES = (512, 4096, _ENTRIES)


def slowness(density: float) -> float:
    """Seconds per gathered pair over seconds per pair of a matrix product, in float32 with torch's current threads.

    Args:
        density: share of the pairs that are gathered; the fastest of several slicings counts.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(_QUERIES, _ENTRIES, generator=generator)
    g = torch.randn(_SEQUENCES, _ENTRIES, generator=generator)
    count = max(1, round(density * _QUERIES))
    places = torch.stack([torch.randperm(_QUERIES, generator=generator)[:count] for _ in range(_SEQUENCES)])

    def gather(width: int) -> None:
        out = torch.zeros(_SEQUENCES, count)
        for start in range(0, _ENTRIES, width):
            part = slice(start, start + width)
            held = v[:, part].contiguous() if width < _ENTRIES else v
            for n in range(_SEQUENCES):
                out[n] += held[places[n]] @ g[n, part]

    whole = _seconds(lambda: g @ v.T)
    pairs = min(_seconds(lambda width=width: gather(width)) for width in _SLICES)
    return (pairs / (_SEQUENCES * count)) / (whole / (_SEQUENCES * _QUERIES))


def _seconds(work: Callable[[], object]) -> float:
    """Processor time of the fastest of three."""
    taken = []
    for _ in range(3):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return min(taken)
