"""What two-stage scoring is measured on: a model, candidates and very many queries.

``A`` is the benchmark's workload A with more of its language, ``demo`` the demo's model on its own corpus and further
Wikipedia leads, ``tiny`` the benchmark's smallest, to see that the job runs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.bench.batches import IGNORED
from jobs.bench.workloads import WORKLOADS, Workload, query_ids, write_lines
from raylux.demo.corpus import CorpusSettings, build_corpus, read_leads
from raylux.demo.training import TrainingSettings, train_cached
from raylux.errors import UserError

CASES = {
    "A": "Workload A: GPT-2, 4 layers, d = 256, 128 tokens",
    "demo": "The demo's model: Llama, 4 layers, d = 128, on Wikipedia leads",
    "tiny": "The benchmark's smallest workload",
}
# Leads beside those of the demo's corpus: shortest and longest, in characters.
_LEADS = (60, 800)


@dataclass(frozen=True)
class Case:
    """Sections of a config, and the records of corpus and queries."""

    sections: dict[str, dict[str, Any]]
    documents: list[dict[str, Any]]
    queries: list[dict[str, Any]]

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        """The files of corpus and queries, and the sections that name them."""
        folder.mkdir(parents=True, exist_ok=True)
        corpus, queries = folder / "corpus.jsonl", folder / "queries.jsonl"
        write_lines(corpus, ({"id": f"s{place}", **record} for place, record in enumerate(self.documents)))
        ids = query_ids(len(self.queries))
        write_lines(queries, ({"id": name, **record} for name, record in zip(ids, self.queries, strict=True)))
        own = {**self.sections.get("corpus", {}), "path": str(corpus), "id": "id"}
        return {**self.sections, "corpus": own, "queries": {"path": str(queries)}}


def prepare(name: str, sequences: int, queries: int) -> Case:
    """The case of that name.

    Args:
        name: of ``CASES``.
        sequences: candidates, N.
        queries: Q.

    Raises:
        UserError: there are not so many leads.
    """
    if name == "demo":
        return _demo(sequences, queries)
    workload = WORKLOADS[name]
    assert isinstance(workload, Workload)
    sections = workload.prepare().sections
    asked = [{"input_ids": row, "labels": [IGNORED, *row[1:]]} for row in workload.text(queries, 3)]
    documents = [{"input_ids": row} for row in workload.text(sequences, 2)]
    return Case({name: sections[name] for name in ("model", "corpus")}, documents, asked)


def _demo(sequences: int, queries: int) -> Case:
    """The demo's documents and other leads as candidates; its questions and openings of leads not among them."""
    corpus = build_corpus(CorpusSettings())
    texts = [document.text for document in corpus.documents]
    settings = TrainingSettings()
    folder, _ = train_cached(texts, settings)
    known = set(texts)
    others = sorted({" ".join(text.split()) for _, text in read_leads()} - known)
    others = [text for text in others if _LEADS[0] <= len(text) <= _LEADS[1]]
    random.Random(1).shuffle(others)
    used = max(0, sequences - len(texts))
    asked = [{"prompt": x.prompt, "completion": x.completion} for x in corpus.questions]
    asked += [_opening(text) for text in others[used:]]
    if len(asked) < queries:
        raise UserError(f"there are leads for {len(asked)} queries beside {sequences} candidates, {queries} wanted")
    sections = {"model": {"path": str(folder), "device": "cpu"}, "corpus": {"max_length": settings.context}}
    return Case(sections, [{"text": text} for text in (texts + others)[:sequences]], asked[:queries])


def _opening(text: str) -> dict[str, str]:
    """A lead's first words as prompt, the next four as completion, as the demo asks."""
    words = text.split(" ")
    start = max(4, min(10, len(words) // 3))
    return {"prompt": " ".join(words[:start]), "completion": " " + " ".join(words[start : start + 4])}
