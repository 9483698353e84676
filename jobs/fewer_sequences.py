"""How few sequences the eigenbases need: scores with A and S of a part of the fit against those with A and S of all.

A small Llama is trained on Wikipedia leads (the study of ``jobs/datamodel.py``, one model), then scored for each
``fit.covariance_sequences``, and, for comparison, with the whole fit, Λ included, on as many: the same model, drawn
labels and λ. Another draw of the fitted sequences tells how far two fits on all of them are apart.

    python jobs/fewer_sequences.py --write
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
from jobs.blocks import BEST, SIZES, agreement
from jobs.lds import methods
from jobs.lds.retrain import FIRST_SEED
from jobs.lds.study import Settings, Study
from raylux.demo.training import train_model

NAME = "fewer-sequences"

# Of the fitted sequences: those that A and S are summed over.
SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
BASES, ALL, ANOTHER = "A and S", "A, S and Λ", "all, other labels"


def cases(train: int) -> dict[tuple[str, int], list[str]]:
    """(what is fitted on so many sequences, how many) -> keys of the config; the first is what others are held to."""
    cut = "fit.unit_tokens=64"  # small units, as A and S take whole ones
    few = [round(train * share) for share in SHARES]
    found = {(ALL, train): [cut], (ANOTHER, train): [cut, "fit.seed=1"]}
    found |= {(BASES, count): [cut, f"fit.covariance_sequences={count}"] for count in few}
    return found | {(ALL, count): [cut, f"fit.sequences={count}"] for count in few}


def page(settings: Settings, scores: Mapping[tuple[str, int], np.ndarray], command: str) -> str:
    """docs/results/fewer-sequences.md."""
    wanted = scores[ALL, settings.train]
    rows = []
    for (what, count), found in scores.items():
        linear, ranked, least, shared = agreement(found, wanted)
        size = float(np.linalg.norm(found) / np.linalg.norm(wanted))
        rows.append(f"| {what} | {count} | {linear:.4f} | {ranked:.4f} | {least:.4f} | {shared:.2f} | {size:.3f} |")
    return f"""# How few sequences the eigenbases need: `fit.covariance_sequences`

    {command}

A Llama of {settings.layers} layers, width {settings.width}, trained on {settings.train:,} Wikipedia leads (their first
{settings.characters} characters); {settings.queries} held-out ones as queries (f = log p of the last three quarters),
every lead scored. *{BASES}*: these of the first so many sequences of the fit, in whole fit units, and Λ of all
{settings.train:,}; *{ALL}*: the whole fit on so many. Correlations are between a query's scores and its scores with
everything fitted on all, then means over the queries; the best are its {BEST} highest scores. *{ANOTHER}*: what
another draw of the sampled labels makes of the same fit.

| fitted on so many | sequences | Pearson | Spearman | least Pearson of a query | best shared | size of the scores |
| --- | --: | --: | --: | --: | --: | --: |
{chr(10).join(rows)}
"""


def measured(options: dict[str, Any], command: str) -> pages.Page:
    """Train, score, compare."""
    study = Study.of(Settings(**options))
    model = train_model(study.texts, study.tokenizer, study.settings.training(FIRST_SEED))
    asked = {case: (methods.EKFAC, keys) for case, keys in cases(study.settings.train).items()}
    scores = methods.each(study, model, asked)
    return pages.Page(page(study.settings, scores, command))


def main(arguments: Sequence[str] | None = None) -> int:
    """The study as a program."""
    own = [field for field in fields(Settings) if field.name in SIZES]
    return pages.run(pages.parser(__doc__, NAME, own), arguments, NAME, measured)


if __name__ == "__main__":
    sys.exit(main())
