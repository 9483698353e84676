"""Tables of a query's scored sequences: all of them, by document, and the best first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from raylux.engine.stages import answers
from raylux.engine.stages.prefilter import candidates
from raylux.errors import MissingStageError, UserError
from raylux.normalised import Normalise
from raylux.store import ESTIMATED, Manifest, answer_blocks

if TYPE_CHECKING:
    from raylux.results import Run

Rows = Literal["sequence", "document"]
"""What a row of a table is about."""


def scored(run: Run, query: str, by: Rows, normalise: Normalise) -> pd.DataFrame:
    """``Run.scored``."""
    if by == "document" and run.config.corpus.pack:
        raise UserError(f"{run.folder}: a packed corpus has no scores per document (corpus.pack is true)")
    if by == "document" and normalise != "none":
        raise UserError(f"{run.folder}: what a document's scores are divided by is known of its sequences alone")
    run.known(query)
    answer = run.answer(query)
    # A query of a batch's file has its scores in the answer, and there alone.
    blocks = answer_blocks(run.store, [answer]) if answer else run.own_blocks
    scored = np.unique(np.concatenate([np.zeros(0, np.int64), *(block.rows for block in blocks)]))
    values = run.lazy([query], scored, blocks, normalise).to_numpy()[0] if len(scored) else np.zeros(0)
    there = ~np.isnan(values)
    if not there.any():
        raise MissingStageError(f"{run.folder}: no scores of '{query}'; run `{run.command('score')}`")
    rows = scored[there]
    table = run.sequences.iloc[rows]
    prefilter = np.full(len(run.sequences), np.nan)
    setting = run.config.prefilter
    if answer:
        found, similarity = answers.own_candidates(run.store, answer, query)
    else:
        found, similarity = candidates(run.store, setting.kind, setting.top).get(query, (rows[:0], np.zeros(0)))
    prefilter[found] = similarity
    kept = [name for name in table.columns if name not in ("sequence", "document", "text")]
    columns = {"sequence": table["sequence"], "influence": values[there], "prefilter": prefilter[rows]}
    columns |= {name: table[name] for name in kept} | {"document": table["document"], "text": table["text"]}
    frame = pd.DataFrame({name: np.asarray(column) for name, column in columns.items()})
    frame = frame if (frame["document"] != frame["sequence"]).any() else frame.drop(columns="document")
    return by_document(frame) if by == "document" else frame


def check_best(run: Run, k: int, by: Rows) -> None:
    """Raise UserError where two stages left out scores that are wanted (``score.best``)."""
    best = run.config.score.best
    if best is None or not any(block.stage == ESTIMATED for block in run.own_blocks):
        return
    more = f"run `{run.command('score')}` with score.best=null for all scores"
    if by == "document":
        raise UserError(f"{run.folder}: score.best={best} left out scores that documents sum up; {more}")
    if k > best:
        raise UserError(
            f"{run.folder}: {k} sequences are asked for and the best {best} of a query were scored (score.best); ask "
            f"for those, or {more}"
        )


def best_of(run: Run, answer: Manifest) -> pd.DataFrame:
    """``Run.best`` of the queries of an answer."""
    rows, values = answers.best(run.store, answer)
    places, _ = np.nonzero(rows >= 0)
    ids = np.asarray(answer.meta["ids"], object)[places]
    influence = values[rows >= 0] * run.scale
    if run.unit == "cosine":
        influence = influence / run.measurements["norm"].loc[ids].to_numpy()
    names = run.sequences["sequence"].to_numpy()[rows[rows >= 0]]
    return pd.DataFrame({"query": ids, "sequence": names, "influence": influence})


def by_document(table: pd.DataFrame) -> pd.DataFrame:
    """A table of sequences with those of a document summed, in the order in which the documents come first."""
    if "document" not in table:
        return table.rename(columns={"sequence": "document"})
    rest = {name: "first" for name in table.columns if name not in ("document", "sequence", "influence", "prefilter")}
    grouped = table.groupby("document", sort=False).agg({"influence": "sum", "prefilter": "max", **rest})
    return grouped.reset_index()


def best(table: pd.DataFrame, k: int, by: str = "influence") -> pd.DataFrame:
    """The k rows with the largest influence (or what else is named), ranked; of equals the first in the table."""
    found = table.sort_values(by, ascending=False, kind="stable").head(k)
    found.insert(0, "rank", np.arange(1, len(found) + 1))
    return found.reset_index(drop=True)
