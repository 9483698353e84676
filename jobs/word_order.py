"""Does the order of words matter to influence? A fact told with its two names flipped, against the same order.

Grosse et al. 2023 (5.3.4) found that a sequence with the phrases of a query in flipped order has next to none of the
influence of one in the same order. Here every variant holds the same words, so that their order alone differs.

    python jobs/word_order.py --write
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from jobs import pages
from jobs.order.facts import FORMS, VARIANTS
from jobs.order.study import GROUPS, Outcome, Settings, outcome
from raylux.evaluate.datamodel import Estimate

NAME = "word-order"

# The largest share of the same order's influence that the flipped one may have, for the claim to have reproduced.
BOUND = 0.2
DRAWS = 2000


def shares(influence: np.ndarray) -> list[Estimate]:
    """Mean influence of each variant as a share of the first one's, with 90 % of a bootstrap over the questions.

    Args:
        influence: [questions, variants].
    """
    random = np.random.default_rng(0)
    drawn = influence[random.integers(0, len(influence), (DRAWS, len(influence)))].mean(1)
    low, high = np.quantile(drawn / drawn[:, :1], (0.05, 0.95), axis=0)
    middle = influence.mean(0) / influence[:, 0].mean()
    return [Estimate(*map(float, one)) for one in zip(middle, low, high, strict=True)]


def page(settings: Settings, outcomes: Sequence[Outcome], command: str) -> str:
    """docs/results/word-order.md."""
    tables = "\n\n".join(_table(group, outcomes) for group in GROUPS)
    forms = "\n".join(f"| {name} | {form.format(noun='keeper', a='A', b='B')} |" for name, form in FORMS.items())
    place = list(VARIANTS).index("flipped")
    found = {group: shares(np.concatenate([one.influence[group] for one in outcomes]))[place] for group in GROUPS}
    verdicts = "; ".join(
        f"{group}: {one.value:.3f}, {'met' if one.value <= BOUND else 'missed'}" for group, one in found.items()
    )
    return f"""# The order of words: the same words with the names flipped

    {command}

{settings.facts} invented facts about invented names, a third of them told in each of three forms with the same words:

| form | told as |
| --- | --- |
{forms}

A Llama of {settings.layers} layers, width {settings.width}, is trained on them for {settings.epochs} epochs, so that no
form is strange to it. A question is a fact in forward form, cut before B; f = log p(B). {settings.queries} questions of
each group and seed, {len(outcomes)} seeds of names, facts and weights. Influences are EK-FAC's, on the MLP layers; a
share is the mean influence of a variant over that of the same order, in brackets 90 % of a bootstrap over questions.

Wanted: flipped at most {BOUND} of the same order: **{verdicts}**.

{tables}

- *Same words, A before B* is the control: the order of the other words alone.
- Facts that were *not told* are new to the model, in every form; of those that were *told*, the forward form stood in
  its training.
- The curvature is fitted on the training texts and the variants of a group's questions together.
"""


def _table(group: str, outcomes: Sequence[Outcome]) -> str:
    influence = np.concatenate([one.influence[group] for one in outcomes])
    seeds = [shares(one.influence[group]) for one in outcomes]
    logprob = np.concatenate([one.logprob[group] for one in outcomes]).mean()
    lines = [
        f"| {name} | {what} | {share} | {', '.join(f'{seed[place].value:.3f}' for seed in seeds)} | "
        f"{influence[:, place].mean():+.4f} |"
        for place, ((name, what), share) in enumerate(zip(VARIANTS.items(), shares(influence), strict=True))
    ]
    return f"""## Facts that were {group} in training (mean log p(B) {logprob:.2f})

| variant | what | share of the same order | by seed | influence, nats |
| --- | --- | --- | --- | --: |
""" + "\n".join(lines)


def measured(options: dict[str, Any], command: str) -> pages.Page:
    """Train, score, compare."""
    settings = Settings(**options)
    pages.require(
        min(settings.queries, settings.repeats) >= 1 and settings.facts >= len(FORMS) * settings.queries,
        "--queries and --repeats are at least 1, --facts at least 3 times --queries",
    )
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [outcome(settings, seed, Path(folder) / str(seed)) for seed in range(settings.repeats)]
    return pages.Page(page(settings, outcomes, command))


def main(arguments: Sequence[str] | None = None) -> int:
    """The study as a program."""
    return pages.run(pages.parser(__doc__, NAME, fields(Settings)), arguments, NAME, measured)


if __name__ == "__main__":
    sys.exit(main())
