"""What it costs a score to keep A and S in blocks: correlation with the scores of whole factors, by number of blocks.

A small Llama is trained on Wikipedia leads (the study of ``jobs/datamodel.py``, one model), then scored once for each
``curvature.blocks``: the same model, labels and λ, in full precision.

    python jobs/blocks.py --write
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from jobs import pages
from jobs.lds import methods
from jobs.lds.retrain import FIRST_SEED
from jobs.lds.study import Settings, Study
from raylux.demo.training import train_model
from raylux.evaluate.datamodel import pearson, spearman

NAME = "blocks"

SIZES = ("train", "queries", "layers", "width", "epochs")
BLOCKS = (1, 2, 4)
KINDS = ("ekfac", "kfac")
# Best sequences of a query that are compared as a set.
BEST = 10


def agreement(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float, float, float]:
    """Of scores [Q, N] with others: means over queries of Pearson's r and Spearman's ρ, the least r, shared best."""
    own = pearson(found.T, wanted.T)
    ranked = float(np.mean(spearman(found.T, wanted.T)))
    best = [set(np.argsort(-row)[:BEST]) for row in (*found, *wanted)]
    shared = [len(mine & its) / BEST for mine, its in zip(best[: len(found)], best[len(found) :], strict=True)]
    return float(own.mean()), ranked, float(own.min()), float(np.mean(shared))


def page(settings: Settings, scores: Mapping[tuple[str, int], np.ndarray], command: str) -> str:
    """docs/results/blocks.md."""
    rows = []
    for (kind, blocks), found in scores.items():
        linear, ranked, least, shared = agreement(found, scores[kind, 1])
        size = float(np.linalg.norm(found) / np.linalg.norm(scores[kind, 1]))
        rows.append(f"| {kind} | {blocks} | {linear:.4f} | {ranked:.4f} | {least:.4f} | {shared:.2f} | {size:.3f} |")
    dots = scores["identity", 1]
    linear, ranked, least, shared = agreement(dots, scores["ekfac", 1])
    table = "\n".join(row for row in rows if not row.startswith("| identity"))
    return f"""# What blocks cost: scores of `curvature.blocks` 2 and 4 against whole factors

    {command}

A Llama of {settings.layers} layers, width {settings.width}, trained on {settings.train:,} Wikipedia leads (their first
{settings.characters} characters); {settings.queries} held-out ones as queries (f = log p of the last three quarters),
every lead scored; λ is 0.1 × the mean of Λ. Correlations are between a query's scores with so many blocks and its
scores with one, then means over the queries; the best are its {BEST} highest scores.

| kind | blocks | Pearson | Spearman | least Pearson of a query | best shared | size of the scores |
| --- | --: | --: | --: | --: | --: | --: |
{table}

For comparison, gradient dot products against `ekfac` with whole factors: Pearson {linear:.4f}, Spearman {ranked:.4f},
least {least:.4f}, best shared {shared:.2f}.
"""


def measured(options: dict[str, Any], command: str) -> pages.Page:
    """Train, score, compare."""
    study = Study.of(Settings(**options))
    model = train_model(study.texts, study.tokenizer, study.settings.training(FIRST_SEED))
    cases = [("identity", 1), *((kind, blocks) for kind in KINDS for blocks in BLOCKS)]
    asked = {case: (case[0], [f"curvature.blocks={case[1]}"]) for case in cases}
    scores = methods.each(study, model, asked)
    return pages.Page(page(study.settings, scores, command))


def main(arguments: Sequence[str] | None = None) -> int:
    """The study as a program."""
    own = [field for field in fields(Settings) if field.name in SIZES]
    return pages.run(pages.parser(__doc__, NAME, own), arguments, NAME, measured)


if __name__ == "__main__":
    sys.exit(main())
