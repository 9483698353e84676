"""What a test has at hand, and where what it found goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from raylux.evaluate import Judgement, ceiling, compare, judge, mean_of_each
from raylux.evaluate.datamodel import agreement_of_repeats
from raylux.evaluation.estimators import Scored
from raylux.evaluation.inputs import Inputs
from raylux.evaluation.outcome import Curve, Verdict
from raylux.evaluation.retraining import Retraining, Way

LEVEL = 0.9
NOBODY = np.zeros(0, np.int64)


@dataclass
class Found:
    """What the tests add to, one after the other."""

    verdicts: list[Verdict] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What a test has at hand.

    Attributes:
        inputs: of the evaluation.
        scored: of each estimator.
        retraining: trains without some sequences.
        found: where figures go.
    """

    inputs: Inputs
    scored: Mapping[str, Scored]
    retraining: Retraining
    found: Found

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """Estimator -> [Q, N]."""
        return {name: one.scores for name, one in self.scored.items()}

    def draw(self, salt: int) -> np.random.Generator:
        """Random numbers of a test of its own."""
        return np.random.default_rng((self.inputs.chosen.seed, salt))

    def add(
        self, test: str, figure: str, what: str, found: Judgement, rows: str = "estimator", against: str = ""
    ) -> None:
        """A figure more; ``rows`` and ``against`` as of ``Verdict``."""
        self.found.verdicts.append(Verdict(test, figure, what, found, rows, against))

    def judged(self, members: np.ndarray, measured: np.ndarray) -> Judgement:
        chosen = self.inputs.chosen
        return judge(self.scores, members, measured, self.inputs.against, LEVEL, chosen.draws, chosen.seed)

    def compared(
        self,
        pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
        figure: Callable[[np.ndarray, np.ndarray], np.ndarray | float],
        against: str = "",
    ) -> Judgement:
        """A figure of pairs of arrays [n, Q]; ``against``: another than the estimator that others are compared with."""
        chosen = self.inputs.chosen
        return compare(pairs, against or self.inputs.against, figure, LEVEL, chosen.draws, chosen.seed)

    def means(self, values: Mapping[str, np.ndarray]) -> Judgement:
        """Of the queries' values [Q] of each estimator."""
        chosen = self.inputs.chosen
        return mean_of_each(values, self.inputs.against, LEVEL, chosen.draws, chosen.seed)


def seeds(count: int) -> str:
    """So many of them, in words."""
    return f"{count} seed{'s' * (count != 1)}"


def repeats(measured: np.ndarray) -> str:
    """How far two seeds agree; ``measured``: [S, seeds, Q]."""
    one = agreement_of_repeats(measured)
    if not np.isfinite(one):
        return "With one seed nobody knows how far models of the same set agree."
    return (
        f"Models of the same set that differ in their seed agree by a ρ of {one:.3f}; the true effect itself would "
        f"reach about {ceiling(measured):.3f}."
    )


def answers(bench: Bench, rows: np.ndarray, way: Way, damping: Mapping[str, float] | None = None) -> np.ndarray:
    """f [1 + n, seeds, Q] of models trained with all sequences, and without each of some."""
    sets = [NOBODY, *(np.array([row]) for row in rows)]
    return bench.retraining.answers(sets, f"models for loo, {way}", way, damping)
