"""SOURCE (Bae et al. 2024) over epochs of a training: raylux's runs of its segments, the last of them first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

import raylux
from jobs.lds import methods
from jobs.lds.study import Study
from jobs.lds.trained import Checkpoint

# Segments of equally many epochs.
SEGMENTS = 3


def scores(
    study: Study, points: Sequence[Checkpoint], folder: Path, kind: str, adapted: bool, several: bool = False
) -> np.ndarray:
    """Of every text for every query [Q, N].

    Args:
        study: whose model it is.
        points: the model after each epoch.
        folder: of the runs.
        kind: of curvature.
        adapted: one rate stands for AdamW's of all weights (``lengths``); otherwise as if it were SGD.
        several: the models after all of its epochs stand for a segment; otherwise the one at its end.
    """
    stops = bounds(len(points))
    parts = [points[start:stop] if several else [points[stop - 1]] for start, stop in pairwise([0, *stops])]
    runs: list[raylux.Run] = []
    after: list[str] = []
    if several:
        after = [methods.run(study, points[-1].model, folder / "end", "identity").folder]
    ends = [part[-1] for part in parts]
    for place, length in reversed(list(enumerate(lengths(study, ends, adapted)))):
        options = [f"curvature.segment={length!r}", *([f"query.carried_from={json.dumps(after)}"] if after else [])]
        found = [
            methods.run(study, point.model, folder / f"{place}.{at}", kind, options)
            for at, point in enumerate(parts[place])
        ]
        runs += found
        after = [run.folder for run in found]
    return methods.array(study, raylux.combine(runs))


def bounds(epochs: int) -> list[int]:
    """The last epoch of each segment, from 1 on."""
    return sorted({round(epochs * part / SEGMENTS) or 1 for part in range(1, SEGMENTS + 1)})


def lengths(study: Study, ends: Sequence[Checkpoint], adapted: bool) -> list[float]:
    """``curvature.segment`` of each segment: Σ rate over its steps, per summed loss of a sequence.

    A step goes down the mean loss of a batch's tokens: 1/T̄ of a sequence's summed loss. AdamW divides a step by the
    root of each weight's second moment v; what stands for that is the root of v's mean over the tracked weights.
    """
    tokens = float(np.mean([len(row.tokens) - 1 for row in study.rows]))
    found = []
    for before, after in pairwise([0.0, *(point.spent for point in ends)]):
        found.append((after - before) / tokens)
    if not adapted:
        return found
    sums = [(sum(float(v.double().sum()) for v in end.moments.values()), sum(v.numel() for v in end.moments.values()))
            for end in ends]  # fmt: skip
    return [length / (total / count) ** 0.5 for length, (total, count) in zip(found, sums, strict=True)]
