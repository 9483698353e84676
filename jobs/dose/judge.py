"""What was measured, held against what was predicted and against what other methods' sets did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.dose.choose import KINDS, RANDOM, best
from jobs.dose.retrain import Measured
from jobs.dose.study import DOSES, PROXIMAL, RETRAINED, Members, Settings, Study
from raylux.evaluate import Agreement, Estimate, agreement

_LEVEL, _DRAWS = 0.9, 2000


@dataclass(frozen=True)
class Sets:
    """Every set that is tried, once, and whose it is.

    Attributes:
        members: of each set.
        own: method -> place of each query's set [Q].
        random: places of the sets drawn at random.
    """

    members: list[Members]
    own: dict[str, list[int]]
    random: list[int]

    @classmethod
    def of(cls, study: Study, methods: Mapping[str, np.ndarray]) -> Sets:
        """What the methods choose, and what was drawn; a set that two of them choose is one."""
        chosen = {name: best(scores, study.settings.size) for name, scores in methods.items()}
        members = list(dict.fromkeys([*(own for sets in chosen.values() for own in sets), *study.random]))
        place = {own: at for at, own in enumerate(members)}
        return cls(
            members, {name: [place[own] for own in sets] for name, sets in chosen.items()},
            [place[own] for own in study.random],
        )  # fmt: skip

    def proximal(self, settings: Settings) -> list[int]:
        """Places of those that are measured at the proximal optimum."""
        first = settings.proximal
        return sorted({at for places in (*self.own.values(), self.random) for at in places[:first]})


@dataclass(frozen=True)
class Gap:
    """Mean of paired differences over the queries, and its standard error."""

    mean: float
    error: float

    @property
    def errors(self) -> float:
        """The mean in standard errors; 0 where the two are the same, query by query."""
        return self.mean / self.error if self.error else 0.0

    def text(self, digits: int = 2) -> str:
        """Mean ± error, and in brackets the one over the other."""
        return f"{self.mean:+.{digits}f} ± {self.error:.{digits}f} ({self.errors:+.1f})"


@dataclass(frozen=True)
class Outcome:
    """The study's numbers.

    Attributes:
        methods: that chose sets -> scores [Q, N].
        sets: what they chose.
        measured: what it did.
    """

    methods: dict[str, np.ndarray]
    sets: Sets
    measured: Measured

    @property
    def rows(self) -> list[str]:
        """The methods, and chance."""
        return [*self.methods, RANDOM]

    @property
    def ways(self) -> list[str]:
        """The ways in which something was measured."""
        return [way for way, change in self.measured.change.items() if not np.isnan(change).all()]

    @property
    def retrained(self) -> list[str]:
        """Those of them that train."""
        return [way for way in self.ways if way in RETRAINED]

    def moved(self, name: str, way: str, dose: float) -> np.ndarray:
        """Change of each query by a dose of its own set [Q] in nats, NaN where it was not measured.

        By chance: the mean over the sets drawn at random.
        """
        change = self._change(way, dose)
        if name == RANDOM:
            known = change[self.sets.random]
            known = known[~np.isnan(known).any(1)]
            return known.mean(0) if len(known) else np.full(change.shape[1], np.nan)
        return change[self.sets.own[name], range(change.shape[1])]

    def elsewhere(self, name: str, way: str, dose: float) -> np.ndarray:
        """Change of each query by the sets that the method chose for the other ones, their mean [Q]."""
        change = self._change(way, dose)[self.sets.own[name]]
        others = np.where(np.eye(len(change), dtype=bool), np.nan, change)
        return np.nanmean(others, 0)

    def predicted(self, name: str, dose: float) -> np.ndarray:
        """What a method says of every set and query [sets, Q]: dose times the sum of its scores of the set."""
        scores = self.methods[name]
        return dose * np.stack([scores[:, own].sum(1) for own in map(list, self.sets.members)])

    def predicted_own(self, name: str, dose: float) -> np.ndarray:
        """What a method says of each query and its own set [Q]."""
        own = self.sets.own[name]
        return self.predicted(name, dose)[own, range(len(own))]

    def mean(self, name: str, way: str, dose: float) -> Estimate:
        """Over the queries, with a percentile interval of a bootstrap over them."""
        return mean(self.moved(name, way, dose))

    def more(self, name: str, other: str, way: str, dose: float) -> Gap:
        """By how much the one's sets move their queries more than the other's, in the direction of the dose."""
        return gap(np.sign(dose) * (self.moved(name, way, dose) - self.moved(other, way, dose)))

    def own_slope(self, name: str, way: str, dose: float) -> Agreement:
        """Measured per predicted, each query with its own set."""
        return agreement(self.predicted_own(name, dose)[:, None], self.moved(name, way, dose)[:, None], _LEVEL, _DRAWS)

    def all_pairs(self, name: str, way: str, dose: float) -> Agreement:
        """Measured per predicted over every set, whoever chose it, and every query."""
        return agreement(self.predicted(name, dose).T, self._change(way, dose).T, _LEVEL, _DRAWS)

    def linear(self) -> tuple[float, float]:
        """Of the pair of doses at the proximal optimum: RMS of the change's odd part, and of its even part."""
        less, more = self.measured.change[PROXIMAL]
        return _rms((more - less) / 2), _rms((more + less) / 2)

    def noise(self) -> float:
        """RMS of what the searches left open over RMS of what was measured, at the worst dose."""
        return max(
            _rms(noise) / _rms(change)
            for noise, change in zip(self.measured.noise, self.measured.change[PROXIMAL], strict=True)
        )

    def _change(self, way: str, dose: float) -> np.ndarray:
        return self.measured.change[way][DOSES[way].index(dose)]


def mean(values: np.ndarray) -> Estimate:
    """Of the values that are there, with a percentile interval of a bootstrap."""
    known = values[~np.isnan(values)]
    if not len(known):
        return Estimate(np.nan, np.nan, np.nan)
    draws = np.random.default_rng(0).integers(0, len(known), (_DRAWS, len(known)))
    low, high = np.quantile(known[draws].mean(1), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(float(known.mean()), float(low), float(high))


def gap(differences: np.ndarray) -> Gap:
    """Of the differences that are there; at least two for an error."""
    known = differences[~np.isnan(differences)]
    if len(known) < 2:
        return Gap(float(known.mean()) if len(known) else np.nan, np.nan)
    return Gap(float(known.mean()), float(known.std(ddof=1) / np.sqrt(len(known))))


def counts(gaps: Sequence[Gap], errors: float = 2.0) -> tuple[int, int]:
    """How many of them are above 0 by so many standard errors, and how many below."""
    ratios = [one.errors for one in gaps]
    return sum(ratio >= errors for ratio in ratios), sum(ratio <= -errors for ratio in ratios)


def in_nats(methods: Mapping[str, np.ndarray]) -> list[str]:
    """The methods whose scores predict a size."""
    return [name for name in methods if KINDS[name].nats]


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.nanmean(np.square(x))))
