"""How often each method finds a planted statement: numbers for the demo's last table.

Retrieval is not influence: a method that finds statements need not say what would change the model. The
comparison shows what each method puts first, no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from raylux.demo.corpus import Document, Question

if TYPE_CHECKING:
    import pandas as pd

TOP = 5
RECALL_TOP = 10
NEEDED = 0.8

LEGEND = (
    f"facts: share with a statement of theirs in the top {TOP}; leads: share with the lead itself in the top {TOP}; "
    f"decoys: how many in the top {TOP}, on average; statements: share of a fact's statements in the top {RECALL_TOP}"
)

Ranking = Mapping[str, Sequence[str]]
"""Per query the documents that were scored, best first."""


@dataclass(frozen=True)
class MethodResult:
    """What one method puts first. A share or mean over nothing is NaN.

    Attributes:
        method: its name.
        plain: share of facts without decoys that have a statement of theirs in the top 5.
        decoyed: the same over facts with decoys.
        decoys: mean number of decoys in the top 5, over facts with decoys.
        recall: mean share of a fact's statements in the top 10, over all facts.
        leads: share of questions on real leads that have the lead itself in the top 5.
    """

    method: str
    plain: float
    decoyed: float
    decoys: float
    recall: float
    leads: float

    def row(self) -> dict[str, Any]:
        """As a row of ``comparison_table``."""
        return {
            "method": self.method,
            "facts, no decoys": self.plain,
            "facts, decoys": self.decoyed,
            "leads": self.leads,
            "decoys": self.decoys,
            "statements": self.recall,
        }

    def as_json(self) -> dict[str, Any]:
        """Plain values, None for NaN."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


def judge(method: str, ranking: Ranking, documents: Sequence[Document], questions: Sequence[Question]) -> MethodResult:
    """Compare a ranking of candidates with what was planted."""
    known = {document.id: document for document in documents}
    plain = [q for q in questions if q.fact and not q.decoys]
    decoyed = [q for q in questions if q.fact and q.decoys]

    def kinds(question: Question, kind: str, top: int) -> int:
        found = (known[name] for name in ranking[question.id][:top])
        return sum(1 for document in found if document.kind == kind and document.fact == question.fact)

    def planted(question: Question) -> int:
        return sum(1 for document in documents if document.kind == "fact" and document.fact == question.fact)

    return MethodResult(
        method=method,
        plain=_mean([float(kinds(q, "fact", TOP) > 0) for q in plain]),
        decoyed=_mean([float(kinds(q, "fact", TOP) > 0) for q in decoyed]),
        decoys=_mean([float(kinds(q, "decoy", TOP)) for q in decoyed]),
        recall=_mean([kinds(q, "fact", RECALL_TOP) / planted(q) for q in plain + decoyed]),
        leads=_mean([float(q.source in ranking[q.id][:TOP]) for q in questions if q.source]),
    )


def by_influence(frames: Mapping[str, pd.DataFrame]) -> dict[str, list[str]]:
    """The ranking of ``Run.top`` frames as they stand; a document counts where its best piece stands."""
    return {name: _once(frame["document"]) for name, frame in frames.items()}


def by_prefilter(frames: Mapping[str, pd.DataFrame], documents: Sequence[Document]) -> dict[str, list[str]]:
    """The ranking of a query's own candidates by prefilter score.

    Equal scores stand in corpus order, as the prefilter itself breaks ties; what was scored only because it
    is a candidate of another query has no prefilter score here and is left out.
    """
    place = {document.id: position for position, document in enumerate(documents)}
    rankings = {}
    for name, frame in frames.items():
        own = frame[frame["prefilter"].notna()]
        scored = zip(own["prefilter"], own["document"], strict=True)
        rankings[name] = _once(ident for _, ident in sorted(scored, key=lambda pair: (-float(pair[0]), place[pair[1]])))
    return rankings


def _once(names: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(str(name) for name in names))


def check(ekfac: MethodResult, dot: MethodResult) -> tuple[bool, str]:
    """Whether EK-FAC finds what was planted, and more often than the dot product; and a line that says so."""
    held = ekfac.plain >= NEEDED and ekfac.plain > dot.plain
    line = (
        f"check: a planted statement in the top {TOP} for facts without decoys: {ekfac.method} {ekfac.plain:.2f} "
        f"(at least {NEEDED}), {dot.method} {dot.plain:.2f} (less): {'held' if held else 'NOT held'}"
    )
    return held, line


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
