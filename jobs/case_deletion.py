"""Case deletion: does training without the sequences that a method puts first undo what a classifier thinks of a text?

Yeh et al. 2022 (TracIn-WE) found that gradients of the word embedding choose them four to ten times better than those
of the last layer. Here both, EK-FAC and chance on sentences of film reviews, by what trainings without them really do.

    python jobs/case_deletion.py --write
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from jobs import pages
from jobs.deletion.reviews import PACKAGE, read_reviews
from jobs.deletion.study import LAST, METHODS, SIGNS, WORDS, Outcome, Settings, study

NAME = "case-deletion"

# What is wanted of TracIn-WE's proponents: so many times the last layer's effect, and so many s.e. beyond chance.
TIMES, ERRORS = 2.0, 2.0


@dataclass(frozen=True)
class Mean:
    """A mean over questions and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: np.ndarray) -> Mean:
        """Of one value per question [Q]."""
        return cls(float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5))

    def __str__(self) -> str:
        return f"{self.value:+.3f} ± {self.error:.3f}"


def effect(found: Outcome, method: str, sign: str = SIGNS[0]) -> np.ndarray:
    """[Q] change of f, the mean over repeats."""
    return found.changes[method, sign].mean(0)


def chance(found: Outcome) -> np.ndarray:
    """[Q] the same by leaving out a random set, the mean over sets too."""
    return found.random.mean((0, 1))


def beyond(found: Outcome, method: str, sign: str = SIGNS[0]) -> Mean:
    """The effect beyond chance's on the same questions."""
    return Mean.of(effect(found, method, sign) - chance(found))


def verdict(found: Outcome) -> str:
    """Whether the two things that are wanted hold, in bold, and their figures."""
    words, last = Mean.of(effect(found, WORDS)), Mean.of(effect(found, LAST))
    times = words.value <= TIMES * min(last.value, 0.0) and words.value < 0
    more = beyond(found, WORDS)
    far = more.value <= -ERRORS * more.error
    ratio = f"{words.value / last.value:.1f} times" if last.value < 0 else "the last layer's is not even negative"
    return (
        f"Wanted of {WORDS}'s proponents: at least {TIMES:g} times the last layer's effect: "
        f"**{'met' if times else 'missed'}** ({ratio}); beyond chance by {ERRORS:g} s.e.: "
        f"**{'met' if far else 'missed'}** ({-more.value / more.error:.1f})."
    )


def page(settings: Settings, found: Outcome, command: str) -> str:
    """docs/results/case-deletion.md."""
    rows = []
    for method in METHODS:
        cells = [f"{Mean.of(effect(found, method, sign))} | {beyond(found, method, sign)}" for sign in SIGNS]
        rows.append(f"| {method} | {' | '.join(cells)} |")
    rows.append(f"| at random | {Mean.of(chance(found))} | | {Mean.of(chance(found))} | |")
    spread = found.random.mean(1).std(0, ddof=1).mean() if len(found.random) > 1 else float("nan")
    difference = Mean.of(effect(found, WORDS) - effect(found, LAST))
    signs = {method: int((effect(found, method) < 0).sum()) for method in METHODS}
    half, newline = max(1, settings.epochs // 2), "\n"
    first, *others = found.accuracy
    after = ", ".join(f"{one:.3f}" for one in others)
    return f"""# Case deletion: proponents and opponents left out

    {command}

Sentences of film reviews (Rotten Tomatoes, of the package {PACKAGE}), positive or negative:
{settings.train:,} to train on. A BERT of {settings.layers} layer{"s" * (settings.layers > 1)}, width {settings.width},
from scratch on the {settings.words:,} most frequent words: {settings.epochs} epochs of Adam at a constant rate of
{settings.rate:g}, batches of {settings.batch}, no dropout. Its accuracy on the other sentences is {first:.3f}. f is the
probability of a test sentence's class, of {found.probability.shape[1]} drawn among those that it classifies rightly.

Scores are of the checkpoints after epoch {half} and {settings.epochs}, added up by `raylux.combine` (TracIn; the rate
is the same at both), of the word embedding alone and of the last layer alone; EK-FAC's are of the last checkpoint, on
the layers that raylux tracks by itself. The {settings.count:,} sentences ({settings.removed:g} %) with the largest
scores (proponents), or the smallest (opponents), are left out of {settings.repeats} new trainings each, from other
seeds than the scored one; before and after share initial weights and batches. {settings.random} sets are drawn at
random. After training on everything f is {found.probability.mean():.3f} in the mean (accuracies {after}).

Mean change of f over the questions ± s.e.:

| left out by | proponents | beyond chance | opponents | beyond chance |
| --- | --: | --: | --: | --: |
{newline.join(rows)}

{verdict(found)} {WORDS} less the last layer, question by question: {difference}.

- Questions whose f falls without their proponents: {", ".join(f"{name} {count}" for name, count in signs.items())} of
  {found.probability.shape[1]}.
- One random set moves f of a question by {spread:.3f} (standard deviation over sets): a single deletion says little.
- `[CLS]`, `[SEP]` and unknown words, which every sentence has, make {found.special.mean():.0%} of the influence of
  {WORDS}'s ten best sentences (`Run.word_scores`): what is left is of words that the two share.
"""


def measured(options: dict[str, Any], command: str) -> pages.Page:
    """Train, score, leave out, train again."""
    settings = Settings(**options)
    pages.require(
        min(settings.questions, settings.random, settings.epochs) >= 2 and settings.repeats >= 1,
        "--questions, --random and --epochs are at least 2, --repeats at least 1",
    )
    pages.require(1 <= settings.count < settings.train, "--removed is a share of --train in percent")
    reviews = read_reviews()
    pages.require(
        2 * settings.questions <= len(reviews) - settings.train, f"--train: {len(reviews):,} sentences are there"
    )
    with tempfile.TemporaryDirectory() as folder:
        return pages.Page(page(settings, study(settings, reviews, Path(folder)), command))


def main(arguments: Sequence[str] | None = None) -> int:
    """The study as a program."""
    return pages.run(pages.parser(__doc__, NAME, fields(Settings)), arguments, NAME, measured)


if __name__ == "__main__":
    sys.exit(main())
