"""The scores of a run: blocks of (queries × candidates), one per commit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from raylux.store.folder import Manifest, RunFolder

PILOT, ESTIMATED, CHOSEN = "pilot", "estimated", "chosen"
"""Stages of a block of two-stage scoring."""


@dataclass(frozen=True)
class ScoreBlock:
    """Scores that were committed together: a unit of the score stage, or a part of the answer to a query file.

    Attributes:
        key: the group that holds ``total`` [Q, n] and, where kept, ``layers`` [Q, L, n], ``norms`` [n].
        queries: ids of its rows.
        rows: [n] int64, the sequences' rows in the corpus.
        layers: whether per-layer scores are kept.
        stage: of two-stage scoring: ``pilot``, whose pairs have all their scores beside their estimates;
            ``estimated``: ``estimate`` and ``error`` [Q, n] of all pairs, ``total`` NaN where it is no more than that;
            ``chosen``: a ``total`` of some of these. Empty: every pair is scored.
    """

    key: str
    queries: tuple[str, ...]
    rows: np.ndarray
    layers: bool
    stage: str = ""


def score_blocks(folder: RunFolder) -> list[ScoreBlock]:
    """All committed score blocks."""
    return [
        ScoreBlock(
            manifest.meta["key"],
            tuple(manifest.meta["queries"]),
            np.asarray(manifest.meta["rows"], np.int64),
            bool(manifest.meta["layers"]),
            manifest.meta.get("two_stage", ""),
        )
        for manifest in folder.units("score").values()
    ]


def answer_blocks(folder: RunFolder, answers: Iterable[Manifest]) -> list[ScoreBlock]:
    """The scores of answers to query files."""
    return [
        ScoreBlock(key, tuple(manifest.meta["ids"]), folder.group(key).read("rows"), bool(manifest.meta["layers"]))
        for manifest in answers
        for key in manifest.meta["parts"]
    ]
