"""The scores of a run: blocks of (queries × candidates), one per commit, and those of single tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raylux.ledger import SCORE, TOKENS
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
            ``estimated``: ``estimate`` [Q, n] of all pairs, ``total`` NaN where it is no more than that;
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
        for manifest in folder.units(SCORE).values()
    ]


def answer_blocks(folder: RunFolder, answers: Iterable[Manifest]) -> list[ScoreBlock]:
    """The scores of answers to query files."""
    return [
        ScoreBlock(key, tuple(manifest.meta["ids"]), folder.group(key).read("rows"), bool(manifest.meta["layers"]))
        for manifest in answers
        for key in manifest.meta["parts"]
    ]


def best_rows(
    folder: RunFolder, queries: Sequence[str], count: int, own: Mapping[str, np.ndarray] | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Query -> (corpus rows, scores) of its ``count`` largest scores, best first, reading one block at a time.

    Args:
        folder: the run.
        queries: ids.
        count: at most.
        own: query -> the rows that count, ascending; default: all.
    """
    held: dict[str, tuple[np.ndarray, np.ndarray]] = {query: (np.zeros(0, np.int64), np.zeros(0)) for query in queries}
    for block in score_blocks(folder):
        if held.keys().isdisjoint(block.queries):
            continue
        total = folder.group(block.key).read("total")
        norms = _norms(folder, block)
        for place, query in enumerate(block.queries):
            if query in held:
                counted = slice(None) if own is None else np.isin(block.rows, own[query])
                rows = np.concatenate([held[query][0], block.rows[counted]])
                scores = np.concatenate([held[query][1], (total[place] / norms)[counted]])
                there = ~np.isnan(scores)  # of two stages some pairs have none
                rows, scores = rows[there], scores[there]
                # A row may stand in two blocks, with the same bits.
                rows, first = np.unique(rows, return_index=True)
                keep = np.lexsort((rows, -scores[first]))[:count]
                held[query] = rows[keep], scores[first][keep]
    return held


def _norms(folder: RunFolder, block: ScoreBlock) -> np.ndarray | float:
    group = folder.group(block.key)
    return group.read("norms") if "norms" in group else 1.0


def token_rows(folder: RunFolder, query: str) -> dict[int, tuple[str, int]]:
    """Corpus row -> (key, place) of the committed per-token scores of a query."""
    return {
        int(row): (manifest.meta["key"], place)
        for manifest in folder.units(TOKENS).values()
        if manifest.meta["query"] == query
        for place, row in enumerate(manifest.meta["rows"])
    }
