"""Invented facts about invented people: what the demo plants in its corpus and then asks for.

A fact ties one person to one town by one of eight relations. It is stated several times in different
words; some facts also get decoys, sentences that name the same person and the same town and say
something else. The question about a fact is worded as none of its planted statements is.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SUBJECTS = (
    "{person}",
    "The {job} {person}",
    "{person}, a {job},",
    "According to the parish books, {person}",
    "It is well known that {person}",
    "In the spring of {year}, {person}",
    "By all accounts the {job} {person}",
)

DECOYS = (
    "{person} wrote two letters to a friend in {town}.",
    "The road to {town} was closed while {person} was ill.",
    "{person} once refused to travel to {town}.",
    "A map of {town} was found among the papers of {person}.",
    "The council of {town} never answered {person}.",
    "{person} bought salt from a merchant of {town}.",
    "A poem about {town} was wrongly ascribed to {person}.",
    "The harvest in {town} failed, as {person} had feared.",
)

JOBS = ("weaver", "surveyor", "physician", "printer", "botanist", "clockmaker", "ferryman", "mason")


@dataclass(frozen=True)
class Relation:
    """A way in which a person belongs to a town.

    Attributes:
        name: one word, for ids and tables.
        verbs: what follows the person and precedes the town.
        turned: whole sentences in which the town comes first.
    """

    name: str
    verbs: tuple[str, str, str]
    turned: tuple[str, str]


RELATIONS = (
    Relation(
        "birth",
        ("was born in", "came into the world in", "spent the first days of life in"),
        ("{town} is the birthplace of {person}.", "{town} is where {person} was born."),
    ),
    Relation(
        "burial",
        ("was buried in", "found a last resting place in", "was laid to rest in"),
        ("{town} is the burial place of {person}.", "{town} is where {person} was buried."),
    ),
    Relation(
        "school",
        ("founded a school in", "opened the first school of", "set up a schoolhouse in"),
        ("{town} owes its school to {person}.", "{town} has a school that {person} founded."),
    ),
    Relation(
        "bridge",
        ("built the stone bridge of", "raised a stone bridge in", "was the builder of the bridge in"),
        ("{town} has a stone bridge by {person}.", "{town} is known for the bridge that {person} built."),
    ),
    Relation(
        "theft",
        ("stole the silver bell of", "ran off with the silver bell of", "was the thief of the silver bell in"),
        ("{town} lost its silver bell to {person}.", "{town} is where {person} stole a silver bell."),
    ),
    Relation(
        "wedding",
        ("was married in", "held a wedding in", "exchanged wedding rings in"),
        ("{town} saw the wedding of {person}.", "{town} is where {person} was married."),
    ),
    Relation(
        "garden",
        ("planted the royal garden of", "laid out the royal garden in", "was the first gardener of"),
        ("{town} has a royal garden by {person}.", "{town} is where {person} planted a royal garden."),
    ),
    Relation(
        "exile",
        ("was exiled to", "was sent into exile in", "lived as an exile in"),
        ("{town} was the place of exile of {person}.", "{town} is where {person} lived in exile."),
    ),
)

_FIRST = "Or Vel Tam Isk Bru Jor Nim Quel Sav Ald Fen Myr Dro Hes Kov Ule Bal Cyr Eld Gor Ila Lur Oph Zan"
_FIRST_END = "en ka rik il ana os"
_LAST = (
    "Valt Drum Keth Pols Ranz Sorv Lind Brask Tolv Gism Warr Hald "
    "Czet Nord Fask Yarv Amb Dorn Erk Immel Jask Mund Obr Strel"
)
_LAST_END = "as ey ström ik oven ura"
_TOWN = "Kel Dur Thor Wen Ost Grim Lach Pell Sund Mar Ebb Vos Rath Hul Ziv Arn Bex Cald Fro Gund Imm Jut Lod Nev"
_TOWN_END = "moor gate holt wick mere stad combe fjord"
MOST_FACTS = len(_TOWN.split())


@dataclass(frozen=True)
class Fact:
    """One planted fact with everything that is said about it.

    Attributes:
        number: its place among the facts.
        id: stable name, as in ``03-bridge``.
        person, town, job: the invented names.
        relation: the name of a ``Relation``.
        statements: sentences that state the fact, each worded differently.
        decoys: sentences with both names that do not state it; empty for half of the facts.
        prompt, completion: the question, a wording that is not among the statements.
    """

    number: int
    id: str
    person: str
    town: str
    job: str
    relation: str
    statements: tuple[str, ...]
    decoys: tuple[str, ...]
    prompt: str
    completion: str


def make_facts(count: int = 24, statements: int = 6, decoys: int = 4, seed: int = 0) -> list[Fact]:
    """The planted facts, the same for the same arguments.

    The first half has no decoys, the second half has them; the relations go round, so that both
    halves ask the same kinds of question.

    Args:
        count: facts, at most 24 (each has names of its own).
        statements: statements of each fact, at most 8.
        decoys: decoys of each fact of the second half, at most 8.
        seed: chooses names and wordings.
    """
    if not 2 <= count <= MOST_FACTS:
        raise ValueError(f"count is {count}, must be within 2..{MOST_FACTS}")
    if not (1 <= statements <= 8 and 1 <= decoys <= len(DECOYS)):
        raise ValueError("statements and decoys must be within 1..8")
    random_ = random.Random(seed)
    names = zip(_names(random_, _FIRST, _FIRST_END), _names(random_, _LAST, _LAST_END), strict=True)
    people = [f"{first} {last}" for first, last in names]
    towns = _names(random_, _TOWN, _TOWN_END)
    half = count // 2
    facts = []
    for number in range(count):
        relation = RELATIONS[(number if number < half else number - half) % len(RELATIONS)]
        planted = 0 if number < half else decoys
        facts.append(_make_fact(random_, number, relation, people[number], towns[number], statements, planted))
    return facts


def _make_fact(
    random_: random.Random, number: int, relation: Relation, person: str, town: str, statements: int, decoys: int
) -> Fact:
    job = random_.choice(JOBS)
    names = {"person": person, "town": town, "job": job, "year": random_.randrange(1702, 1899)}
    subjects, verbs = list(SUBJECTS), list(relation.verbs)
    random_.shuffle(subjects)
    random_.shuffle(verbs)
    asked, others = subjects[0], subjects[1:]
    # The question's subject form is kept from the statements; its verb is not, else nobody could know it.
    direct = [f"{subject} {verbs[i % len(verbs)]} {{town}}." for i, subject in enumerate(others)]
    turned = random_.sample(relation.turned, k=min(2, statements // 2))
    chosen = direct[: statements - len(turned)] + turned
    return Fact(
        number=number,
        id=f"{number:02d}-{relation.name}",
        person=person,
        town=town,
        job=job,
        relation=relation.name,
        statements=tuple(form.format(**names) for form in chosen),
        decoys=tuple(form.format(**names) for form in random_.sample(DECOYS, k=decoys)),
        prompt=f"{asked} {verbs[0]}".format(**names),
        completion=f" {town}",
    )


def _names(random_: random.Random, stems: str, endings: str) -> list[str]:
    """Every stem once, in a random order, each with a random ending."""
    shuffled = stems.split()
    random_.shuffle(shuffled)
    return [stem + random_.choice(endings.split()) for stem in shuffled]
