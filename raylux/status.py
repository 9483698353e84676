"""What a run folder holds, stage by stage, and the command that makes what it lacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raylux.curvature import KINDS
from raylux.engine.stages.prefilter import candidates
from raylux.engine.stages.queries import records
from raylux.ledger import ASIDE, COVARIANCE, EIGEN, MOMENTS, PROJECTED, QUERY, SCORE, TAKEN, WAVES
from raylux.shown import redacted
from raylux.store import ScoreBlock, score_blocks

if TYPE_CHECKING:
    from raylux.results import Run


@dataclass(frozen=True)
class StageStatus:
    """One line of ``raylux inspect``: a stage, whether it is done, what is there, and what makes the rest."""

    name: str
    done: bool
    detail: str
    command: str


def stages(run: Run) -> list[StageStatus]:
    """Every stage, in order; a line for the query files of a batch where there are any."""
    return [_corpus(run), _fit(run), *_queries(run), *_batch(run)]


def _command(run: Run, stage: str) -> str:
    return f"raylux {stage} {run.settings.get('config_path') or 'CONFIG'}"


def _corpus(run: Run) -> StageStatus:
    stored = run.store.committed("corpus")
    corpus = run.store.manifest("corpus", "corpus").meta if stored else None
    detail = "nothing yet"
    if corpus is not None:
        detail = f"{corpus['sequences']:,} sequences, {corpus['tokens']:,} tokens{_dropped(corpus['dropped'])}"
    return StageStatus("corpus", corpus is not None, detail, _command(run, "fit"))


def _fit(run: Run) -> StageStatus:
    present = run.store.committed
    kind = KINDS[run.config.curvature.kind]
    layers = run.settings["model"]["layers"]
    matrices = len(set(run.settings["model"]["groups"].values())) + len(layers)
    parts, wanted = [], []
    if kind.basis:
        parts += [
            f"covariances {len(present(COVARIANCE))} of {matrices}",
            f"eigenbases {len(present(EIGEN))} of {matrices}",
        ]
        wanted += [len(present(COVARIANCE)) >= matrices, len(present(EIGEN)) >= matrices]
    if kind.moments:
        parts.append(f"Λ {len(present(MOMENTS))} of {len(layers)} layers")
        wanted.append(len(present(MOMENTS)) >= len(layers))
    if kind.projected:
        parts.append(f"whitening {len(present(PROJECTED))} of {len(layers)} layers")
        wanted.append(len(present(PROJECTED)) >= len(layers))
    detail = ", ".join(parts) or f"nothing to fit for {kind.name}"
    return StageStatus("fit", all(wanted), detail, _command(run, "fit"))


def _queries(run: Run) -> list[StageStatus]:
    """The stages of the run's own queries; those of a batch's files are in their answers."""
    asked = {entry["id"] for entry in records(run.store)}
    setting = run.config.prefilter
    known = candidates(run.store, setting.kind, setting.top)
    found = {query: own for query, own in known.items() if query in asked}
    filtered = setting.kind == "none" or (bool(asked) and asked <= set(found))
    union = len(np.unique(np.concatenate([rows for rows, _ in found.values()]))) if found else 0
    solved = {query for manifest in run.store.units(QUERY).values() for query in manifest.meta["queries"]} & asked
    blocks = [block for block in score_blocks(run.store) if not asked.isdisjoint(block.queries)]
    scored = _complete(run, blocks, found) & asked
    rows = np.unique(np.concatenate([np.zeros(0, np.int64), *(block.rows for block in blocks)]))
    detail = "none: every sequence" if setting.kind == "none" else f"{union:,} candidates of {len(found)} queries"
    page = run.store.files.exists("report/index.html")
    # What was given up is missing for good: no command makes it, so the stage is done without it.
    unsolved, unscored = _given_up(run, QUERY), _given_up(run, SCORE)
    return [
        StageStatus("prefilter", filtered, detail, _command(run, "prefilter")),
        StageStatus(
            "query",
            bool(asked) and asked <= solved | unsolved,
            f"{len(solved)} of {len(asked)} queries solved{_how(run)}{_quarantined(len(unsolved))}",
            _command(run, "query"),
        ),
        StageStatus(
            "score",
            bool(asked) and asked <= scored | unsolved,
            f"{len(scored)} of {len(asked)} queries, {len(rows):,} sequences{_two_stage(run)}{_squares(run)}"
            f"{_quarantined(len(unscored))}",
            _command(run, "score"),
        ),
        StageStatus("report", page, "report/index.html" if page else "nothing yet", _command(run, "report")),
    ]


def _batch(run: Run) -> list[StageStatus]:
    taken, out = run.store.committed(TAKEN), run.store.committed(ASIDE)
    if not taken and not out:
        return []
    done = {answer.unit for answer in run.answers}
    queries = sum(len(answer.meta["ids"]) for answer in run.answers)
    aside = f"; put aside: {', '.join(sorted(out))}" if out else ""
    detail = f"{len(done)} of {len(taken)} query files answered, {queries:,} queries{aside}"
    return [StageStatus("batch", taken <= done, detail, f"raylux batch {redacted(run.folder)} --queries FOLDER")]


def _complete(run: Run, blocks: list[ScoreBlock], found: dict[str, tuple[np.ndarray, np.ndarray]]) -> set[str]:
    """Queries that have a score for each of their own candidates (without a prefilter: for every sequence).

    A row is scored for all queries at once, so where all queries are complete the union of candidates is too.
    """
    lost = _given_up(run, SCORE)
    gone = np.flatnonzero(run.sequences["sequence"].isin(list(lost))) if lost else np.zeros(0, np.int64)
    rows: dict[str, list[np.ndarray]] = {}
    for block in blocks:
        for query in block.queries:
            rows.setdefault(query, [gone]).append(block.rows)
    if run.config.prefilter.kind == "none":
        wanted = dict.fromkeys(rows, np.arange(len(run.sequences)))
    else:
        wanted = {query: found[query][0] for query in rows if query in found}
    return {query for query, own in wanted.items() if np.isin(own, np.concatenate(rows[query])).all()}


def _given_up(run: Run, stage: str) -> set[str]:
    """Ids of what was quarantined in a stage."""
    return {name for unit in run.quarantined if unit.stage == stage for name in unit.sequences}


def _how(run: Run) -> str:
    """What an iterative solver reached."""
    solves = run.solves()
    if solves.empty:
        return ""
    short = int((~solves["solved"].astype(bool)).sum())
    text = f" by {solves['solver'].iloc[0]}, residual at most {solves['residual'].max():.1e}"
    return f"{text}; {short} above curvature.tolerance" if short else text


def _two_stage(run: Run) -> str:
    """What two stages came to (``score.best``)."""
    if run.config.score.best is None:
        return ""
    found = [x.meta for x in run.store.units(WAVES).values() if x.meta.get("best") == run.config.score.best]
    if not found:
        return ""
    recall = "" if found[-1]["recall"] is None else f", {found[-1]['recall']:.1%} of the best among them"
    return f"; two stages: {found[-1]['share']:.1%} of the pairs scored{recall}"


def _squares(run: Run) -> str:
    """Of how many sequences the self-influence is known."""
    count = len(run.squares[0])
    return f", self-influence of {count:,}" if count else ""


def _quarantined(count: int) -> str:
    return f"; {count:,} quarantined" if count else ""


def _dropped(dropped: dict[str, int]) -> str:
    parts = [f"{count:,} {name.replace('_', ' ')}" for name, count in dropped.items() if count]
    return f"; dropped: {', '.join(parts)}" if parts else "; nothing dropped"
