"""Leads of Wikipedia in three languages about the same subjects, which are found by equal titles.

A *twin* of a lead is that of the same title in another language. It is no translation: two people wrote the two, and
what they share is the subject, its name, and names and numbers that belong to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from raylux.demo.corpus import read_entries
from raylux.errors import UserError

LANGUAGES = {"en": "en-us", "fr": "fr-fr", "es": "es-es"}
# What stands in the place of a topic where there is none.
NO_TOPIC = "Uncategorized"
# The four probes of a subject and a language: whose text, and whose name stands in it.
PROBES = ("own text, own name", "own text, other name", "other text, own name", "other text, other name")


@dataclass(frozen=True)
class Lead:
    """The beginning of an article."""

    language: str
    title: str
    topic: str
    text: str

    def called(self, title: str) -> Lead:
        """The same text with another name wherever its own stands."""
        return replace(self, title=title, text=self.text.replace(self.title, title))


@dataclass(frozen=True)
class Drawn:
    """What is trained on, asked and scored.

    Attributes:
        train: [N] as many of each language.
        held: [H] asked, not trained on; their twins are.
        apart: [S] subjects, language -> lead: asked in every language, trained on in none.
    """

    train: list[Lead]
    held: list[Lead]
    apart: list[dict[str, Lead]]

    @property
    def queries(self) -> list[Lead]:
        """[Q] ``held``, then of each subject apart the lead in each language."""
        return [*self.held, *(lead for subject in self.apart for lead in subject.values())]

    @property
    def probes(self) -> list[Lead]:
        """Scored beside the training sequences: of each subject apart and language those of ``PROBES``, in order."""
        return [
            lead
            for own, other in zip(self.apart, self.others, strict=True)
            for one, two in zip(own.values(), other.values(), strict=True)
            for lead in (one, one.called(two.title), two.called(one.title), two)
        ]

    @property
    def others(self) -> list[dict[str, Lead]]:
        """[S] of each subject apart the one it is compared with: the next."""
        return [*self.apart[1:], *self.apart[:1]]


def draw(each: int, held: int, apart: int, characters: int, seed: int) -> Drawn:
    """Choose subjects and leads.

    Args:
        each: training sequences of each language.
        held: queries of each language whose twins are trained on.
        apart: subjects of which nothing is trained on; their name stands in their text in each language.
        characters: of a lead; shorter ones are left out.
        seed: of the choice.

    Raises:
        UserError: there are not enough leads, or their package is missing.
    """
    pools = {language: _pool(language, characters) for language in LANGUAGES}
    shared = sorted(set.intersection(*(set(pool) for pool in pools.values())))
    named = [title for title in shared if all(title in pool[title].text for pool in pools.values())]
    asked = len(LANGUAGES) * held
    if apart > len(named) or asked > len(shared) - apart or each < asked:
        raise UserError(f"cross-lingual: {asked + apart} subjects are wanted, {len(shared)} stand in all languages and "
                        f"--each is {each}; lower --held or --apart, or raise --each")  # fmt: skip
    random = np.random.default_rng(seed)
    chosen = {str(title) for title in random.choice(named, apart, replace=False)}
    rest = [str(title) for title in random.permutation([title for title in shared if title not in chosen])]
    owner = dict(zip(rest[:asked], (language for language in LANGUAGES for _ in range(held)), strict=True))
    train: list[Lead] = []
    for language, pool in pools.items():
        others = [str(title) for title in random.permutation(sorted(set(pool) - set(shared)))]
        # Twins of what is asked come first, so that none of them is left out.
        titles = [title for title in [*rest, *others] if owner.get(title) != language][:each]
        if len(titles) < each:
            raise UserError(f"cross-lingual: {each} leads are wanted in '{language}', there are {len(titles)}; "
                            "lower --each")  # fmt: skip
        train += [pool[title] for title in titles]
    return Drawn(
        train,
        [pools[language][title] for title, language in owner.items()],
        [{language: pool[title] for language, pool in pools.items()} for title in sorted(chosen)],
    )


@cache
def _pool(language: str, characters: int) -> dict[str, Lead]:
    """Title -> lead."""
    found: dict[str, Lead] = {}
    for entry in read_entries(LANGUAGES[language]):
        text = " ".join(entry["extract"].split())
        if len(text) >= characters:
            found.setdefault(entry["title"], Lead(language, entry["title"], entry["topic"], text[:characters]))
    return found
