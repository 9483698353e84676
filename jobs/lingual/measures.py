"""What scores say of languages: numbers by query or by subject, and their means with intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jobs.lingual.subjects import LANGUAGES, NO_TOPIC, PROBES, Drawn, Lead
from raylux.evaluate.datamodel import Estimate, interval

_LEVEL, _DRAWS = 0.9, 2000
# Sequences whose influence on a query is compared with that on the same subject in another language.
TOP = 10


def above(one: np.ndarray, others: np.ndarray) -> float:
    """Probability that one of the first [n] is above one of the others [m], equals half: the area under the ROC curve.

    NaN where either is empty.
    """
    if not (one.size and others.size):
        return float("nan")
    ordered = np.sort(others)
    counts = np.searchsorted(ordered, one, "left") + np.searchsorted(ordered, one, "right")
    return float(counts.mean() / 2 / len(others))


def mean(values: np.ndarray) -> Estimate:
    """Of the values [n] that are there, with 90 % of a bootstrap over all of them."""
    return _estimate(np.stack([np.nan_to_num(values), ~np.isnan(values)], 1))


def ratio(one: np.ndarray, other: np.ndarray) -> Estimate:
    """Of two means over the same rows [n], which are drawn together."""
    return _estimate(np.stack([one, other], 1))


def _estimate(pairs: np.ndarray) -> Estimate:
    """Sum of the first column over that of the second [n, 2]."""
    drawn = pairs[np.random.default_rng(0).integers(0, len(pairs), (_DRAWS, len(pairs)))].sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = pairs[:, 0].sum() / pairs[:, 1].sum()
        return interval(float(middle), drawn[:, 0] / drawn[:, 1], _LEVEL)


@dataclass(frozen=True)
class Scored:
    """Scores by one method of one model. Legend: Q queries, N training sequences and probes, S subjects apart.

    Attributes:
        drawn: what was scored.
        scores: [Q, N].
    """

    drawn: Drawn
    scores: np.ndarray

    def twins(self) -> np.ndarray:
        """Of each held query [H]: the place of its twins among the trained leads of their language, 0 last to 1 first.

        The mean over the two languages.
        """
        return self._of_twins(lambda query, twin: self._in(twin.language))

    def twins_at_home(self) -> np.ndarray:
        """The same among the trained leads of the query's language and topic [H]."""
        return self._of_twins(lambda query, twin: self._in(query.language) & self._about(query))

    def topics(self, abroad: bool) -> np.ndarray:
        """Of each held query [H]: are leads of its topic above others, in its own language or (``abroad``) the twins'?

        Topics are those of one language; which one a subject has in another is what its twin there says.
        """
        found = []
        for row, query in zip(self._held, self.drawn.held, strict=True):
            leads = [self.drawn.train[place] for place in self._twins(query)] if abroad else [query]
            areas = []
            for lead in leads:
                others = self._in(lead.language) & (self._titles != query.title)
                same = self._about(lead)
                areas.append(above(row[others & same], row[others & ~same]))
            found.append(areas)
        return np.mean(found, 1)

    def sizes(self) -> np.ndarray:
        """Of each held query [H, 3] mean scores: its twins, other leads of their languages, its language and topic."""
        found = []
        for row, query in zip(self._held, self.drawn.held, strict=True):
            twins = self._twins(query)
            # Every training sequence of the title is one of the twins: the query itself is not trained on.
            others = row[(self._languages != query.language) & (self._titles != query.title)].mean()
            at_home = row[self._in(query.language) & self._about(query)]
            found.append([row[twins].mean(), others, at_home.mean() if at_home.size else np.nan])
        return np.array(found)

    def languages(self) -> dict[str, np.ndarray]:
        """Language of a query -> [its queries, languages] share of each in its positive scores (training sequences)."""
        positive = np.maximum(self.scores[:, : len(self.drawn.train)], 0)
        sums = np.stack([positive[:, self._in(language)].sum(1) for language in LANGUAGES], 1)
        shares = sums / sums.sum(1, keepdims=True)
        asked = np.array([query.language for query in self.drawn.queries])
        return {language: shares[asked == language] for language in LANGUAGES}

    def probes(self) -> np.ndarray:
        """Mean score of each of ``PROBES`` in another language [S, 4], over the pairs of languages."""
        return self._abroad.mean(1)

    def names(self) -> np.ndarray:
        """How often a probe in another language is above the other text with the other name [S, 3]; equals half."""
        first, last = self._abroad[:, :, :-1], self._abroad[:, :, -1:]
        return ((first > last) + 0.5 * (first == last)).mean(1)

    def left(self) -> np.ndarray:
        """Of each subject apart [S, 4], the mean score of the best sequences of a query's language, on:

        the query itself; the same subject asked in another language; another subject in that language; another subject
        in the query's own language. Means over the languages.
        """
        asked = self._apart
        found = np.zeros((len(asked), 4))
        for subject, other in zip(range(len(asked)), np.roll(range(len(asked)), -1), strict=True):
            for home, language in enumerate(LANGUAGES):
                places = np.flatnonzero(self._in(language))
                best = places[np.argsort(-asked[subject, home, places], kind="stable")[:TOP]]
                abroad = [place for place in range(len(LANGUAGES)) if place != home]
                found[subject] += [
                    asked[subject, home, best].mean(), asked[subject, abroad][:, best].mean(),
                    asked[other, abroad][:, best].mean(), asked[other, home, best].mean(),
                ]  # fmt: skip
        return found / len(LANGUAGES)

    @property
    def _held(self) -> np.ndarray:
        return self.scores[: len(self.drawn.held), : len(self.drawn.train)]

    @property
    def _apart(self) -> np.ndarray:
        """[S, languages, N]."""
        return self.scores[len(self.drawn.held) :].reshape(len(self.drawn.apart), len(LANGUAGES), -1)

    @cached_property
    def _abroad(self) -> np.ndarray:
        """[S, pairs of languages, probes] scores of a subject's probes in the one for its query in the other."""
        own = self._apart[:, :, len(self.drawn.train) :]
        by_subject = own.reshape(*own.shape[:2], len(self.drawn.apart), len(LANGUAGES), len(PROBES))
        matching = np.stack([by_subject[place, :, place] for place in range(len(self.drawn.apart))])
        return matching[:, ~np.eye(len(LANGUAGES), dtype=bool)]

    @cached_property
    def _titles(self) -> np.ndarray:
        return np.array([lead.title for lead in self.drawn.train])

    @cached_property
    def _languages(self) -> np.ndarray:
        return np.array([lead.language for lead in self.drawn.train])

    @cached_property
    def _topics(self) -> np.ndarray:
        return np.array([lead.topic for lead in self.drawn.train])

    def _in(self, language: str) -> np.ndarray:
        """[N] bool, the training sequences of a language."""
        return self._languages == language

    def _about(self, lead: Lead) -> np.ndarray:
        """[N] bool, those of a lead's topic; none where it has none."""
        return (self._topics == lead.topic) & (lead.topic != NO_TOPIC)

    def _twins(self, query: Lead) -> np.ndarray:
        """Places of the leads of the same title in the other languages."""
        return np.flatnonzero(self._titles == query.title)

    def _of_twins(self, among: Callable[[Lead, Lead], np.ndarray]) -> np.ndarray:
        found = []
        for row, query in zip(self._held, self.drawn.held, strict=True):
            places = self._twins(query)
            others = self._titles != query.title
            chosen = [among(query, self.drawn.train[place]) & others for place in places]
            found.append(np.mean([above(row[[place]], row[own]) for place, own in zip(places, chosen, strict=True)]))
        return np.array(found)
