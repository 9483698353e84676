"""Invented facts "A has B for its N", each told in three orders of the same words, and the variants that are scored.

``forward`` names A before B as the question does, ``shuffled`` too, with the other words moved about: it is the
control for a change of order as such. ``flipped`` names B first. All three hold the same words, so what differs
between their influences is order alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

NOUNS = ("ruler", "capital", "keeper", "rival", "founder", "patron", "heir", "teacher")
_HEADS = "b br d dr f g gr k l m n p pr r s st t tr v z".split()
_MIDDLES = "a e i o u ae ei ou".split()
_TAILS = "k l m n r s t x".split()

# Each begins alike, so that no name is ever a text's first word, which the tokenizer would cut otherwise.
FORMS = {
    "forward": "they say the {noun} of {a} is {b}",
    "shuffled": "they say of {a} the {noun} is {b}",
    "flipped": "they say {b} is the {noun} of {a}",
}


@dataclass(frozen=True)
class Fact:
    """``b`` is the ``noun`` of ``a``."""

    noun: str
    a: str
    b: str

    def told(self, form: str) -> str:
        """The fact in one of ``FORMS``."""
        return FORMS[form].format(noun=self.noun, a=self.a, b=self.b)

    def question(self) -> tuple[str, str]:
        """Prompt and completion: the forward form, cut before B."""
        whole = self.told("forward")
        return whole[: -len(self.b) - 1], f" {self.b}"


def draw_facts(count: int, random: np.random.Generator) -> list[Fact]:
    """``count`` facts about names that occur in no other."""
    names = iter(_names(random))
    return [Fact(NOUNS[int(random.integers(len(NOUNS)))], next(names), next(names)) for _ in range(count)]


def _names(random: np.random.Generator) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        parts = [str(random.choice(part)) for part in (_HEADS, _MIDDLES, _HEADS, _MIDDLES, _TAILS)]
        name = "".join(parts).capitalize()
        if name not in seen:
            seen.add(name)
            yield name


VARIANTS = {
    "same order": "the fact as the question has it",
    "same words, A before B": "the other words in another order",
    "flipped": "the same words, B before A",
    "flipped, other A": "B before another name",
    "same order, other A": "another name before B",
    "same order, other B": "another name after A",
    "another fact": "neither name, the question's noun",
}


def variants(fact: Fact, other: Fact) -> dict[str, str]:
    """The sequences whose influence on the fact's question is compared.

    Args:
        fact: asked about.
        other: lends its names; no variant tells it.
    """
    return {
        "same order": fact.told("forward"),
        "same words, A before B": fact.told("shuffled"),
        "flipped": fact.told("flipped"),
        "flipped, other A": Fact(fact.noun, other.a, fact.b).told("flipped"),
        "same order, other A": Fact(fact.noun, other.a, fact.b).told("forward"),
        "same order, other B": Fact(fact.noun, fact.a, other.b).told("forward"),
        "another fact": Fact(fact.noun, other.a, other.b).told("forward"),
    }
