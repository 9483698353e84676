"""Answers to query files: what a run keeps of a file once all of it is scored, and how that is read back.

While a file is worked on, its candidates, s_test and scores lie where those of any query lie. Its answer takes over
what is to stay, in one commit; then the rest is let go. So what a pass has to look at does not grow with the files that
were answered before, and an answer holds what a run of its own would: the file's own queries on their own candidates.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raylux.engine.numerics import distinct
from raylux.engine.quarantine import given_up
from raylux.engine.stages import prefilter
from raylux.ledger import ANSWER, CANDIDATES, QUERY, SCORE, TOKENS
from raylux.store import Manifest, RunFolder, ScoreBlock, best_rows, score_blocks

if TYPE_CHECKING:
    from raylux.engine.context import Context
    from raylux.queries import Query

# Best sequences of each query that are kept apart, for what is said across queries.
BEST = 64
# Scores that are written as one group, in bytes.
_PART = 1 << 27
_HELD = (TOKENS, SCORE, CANDIDATES, QUERY)


@dataclass(frozen=True)
class AskedFile:
    """A query file.

    Attributes:
        name: of the file, and its name in the ledger.
        digest: of its bytes.
        queries: with the ids that they have in the run: ``NAME/ID``.
    """

    name: str
    digest: str
    queries: tuple[Query, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(query.id for query in self.queries)


def full_id(name: str, query: str) -> str:
    """The id in the run of a query of a file."""
    return f"{name}/{query}"


def keep(ctx: Context, file: AskedFile) -> Manifest:
    """Commit the answer to a file all of whose pairs are scored or given up.

    The manifest's ``meta``:
        digest: of the file. ids, queries: of its queries, and what was asked, f (nats) and ‖∇f‖ of each.
        parts: keys of groups with ``rows`` [n], ``total`` [Q, n], and where kept ``layers`` [Q, L, n], ``norms`` [n].
        index: key of a group with each query's ``BEST`` best (``best``, ``best_scores`` [Q, k], −1 and NaN where
        there are fewer) and its own candidates (``rows``, ``scores``, ``offsets`` [Q + 1]).
        tokens: query, key and rows of per-token scores. lost: pairs without a score. given_up: ids of queries without.
    """
    folder, ids = ctx.folder, list(file.ids)
    own = prefilter.own_rows(ctx)
    blocks = [block for block in score_blocks(folder) if not set(ids).isdisjoint(block.queries)]
    rows = own[ids[0]]
    objects: dict[str, tuple[int, str]] = {}
    parts, lost = [], 0
    for chunk in _chunks(rows, len(ids) * (1 + ctx.config.score.layers * len(ctx.coverage.tracked)) * ctx.itemsize):
        arrays = _gathered(ctx, blocks, ids, chunk)
        lost += int(np.isnan(arrays["total"]).sum())
        key, more = folder.write(f"batch/{file.digest}", {"rows": chunk, **arrays})
        parts.append(key)
        objects |= more
    index, more = folder.write(f"batch/{file.digest}.index", _index(ctx, ids, own))
    objects |= more
    tokens = [manifest for manifest in folder.units(TOKENS).values() if manifest.meta["query"] in ids]
    for manifest in tokens:
        objects |= manifest.objects
    heads, numerics = _heads(folder, ids)
    out = given_up(folder, QUERY)
    setting = ctx.config.prefilter
    return folder.commit(
        ANSWER,
        file.name,
        objects,
        digest=file.digest,
        time=round(time.time(), 3),
        ids=ids,
        queries=[
            {"measurement": query.measurement, "record": query.record, "head": heads.get(query.id)}
            for query in file.queries
        ],
        parts=parts,
        index=index,
        tokens=[{name: manifest.meta[name] for name in ("query", "key", "rows")} for manifest in tokens],
        layers=ctx.config.score.layers,
        lost=lost,
        given_up=[query for query in ids if query in out],
        prefilter={"kind": setting.kind, "top": setting.top},
        plan=ctx.plan.dump(),
        numerics=distinct([*numerics, *_tags(folder, SCORE, ids), *_tags(folder, TOKENS, ids)]),
    )


def let_go(folder: RunFolder, answered: Iterable[str]) -> None:
    """Remove what lies in the stages of queries that are all answered: the answers have what is to stay."""
    done = set(answered)
    for stage in _HELD:
        for unit, manifest in folder.units(stage).items():
            if _asked(manifest) <= done:
                folder.forget(stage, unit)
                if stage != TOKENS:  # those objects went over to the answer as they are
                    folder.delete(list(manifest.objects))


def _asked(manifest: Manifest) -> set[str]:
    return {manifest.meta["query"]} if "query" in manifest.meta else set(manifest.meta["queries"])


def _tags(folder: RunFolder, stage: str, ids: Sequence[str]) -> list[dict[str, Any]]:
    units = (manifest for manifest in folder.units(stage).values() if not _asked(manifest).isdisjoint(ids))
    return [tag for manifest in units for tag in manifest.meta["numerics"]]


def _heads(folder: RunFolder, ids: Sequence[str]) -> tuple[dict[str, Mapping[str, float]], list[dict[str, Any]]]:
    """f and ‖∇f‖ of each query, and the numerics they were computed with."""
    heads: dict[str, Mapping[str, float]] = {}
    numerics: list[dict[str, Any]] = []
    for manifest in folder.units(QUERY).values():
        found = dict(zip(manifest.meta["queries"], manifest.meta["heads"], strict=True))
        heads |= {query: head for query, head in found.items() if query in ids}
        numerics += manifest.meta["numerics"] if not found.keys().isdisjoint(ids) else []
    return heads, numerics


def _chunks(rows: np.ndarray, width: int) -> list[np.ndarray]:
    """The rows in runs of about ``_PART`` bytes of scores; one run at least."""
    size = max(1, _PART // max(1, width))
    return [rows[start : start + size] for start in range(0, max(1, len(rows)), size)]


def _gathered(
    ctx: Context, blocks: Sequence[ScoreBlock], ids: Sequence[str], rows: np.ndarray
) -> dict[str, np.ndarray]:
    """The scores of ``ids`` on ``rows`` (ascending) from all blocks; NaN where none has a pair."""
    dtype = np.float64 if ctx.plan.dtype == "float64" else np.float32
    shapes: dict[str, tuple[int, ...]] = {"total": (len(ids), len(rows))}
    if ctx.config.score.layers:
        shapes["layers"] = (len(ids), len(ctx.coverage.tracked), len(rows))
    if ctx.kind.normalised:
        shapes["norms"] = (len(rows),)
    found = {name: np.full(shape, np.nan, dtype) for name, shape in shapes.items()}
    for block in blocks:
        hit = np.isin(block.rows, rows)
        if not hit.any() or (ctx.config.score.layers and not block.layers):
            continue
        at = np.searchsorted(rows, block.rows[hit])
        theirs = [place for place, query in enumerate(block.queries) if query in ids]
        mine = [ids.index(block.queries[place]) for place in theirs]
        group = ctx.folder.group(block.key)
        for name, array in found.items():
            part = group.read(name)[..., hit]
            if name == "norms":
                array[at] = part
            else:
                # With a slice between them, advanced indices would come first: queries, then rows.
                for own, place in zip(mine, theirs, strict=True):
                    array[own][..., at] = part[place]
    return found


def _index(ctx: Context, ids: Sequence[str], own: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    best = best_rows(ctx.folder, ids, BEST, own)
    rows, scores = np.full((len(ids), BEST), -1, np.int64), np.full((len(ids), BEST), np.nan)
    for place, query in enumerate(ids):
        count = len(best[query][0])
        rows[place, :count], scores[place, :count] = best[query]
    setting = ctx.config.prefilter
    nobody = np.zeros(0, np.int64), np.zeros(0)
    known = {} if setting.kind == "none" else prefilter.candidates(ctx.folder, setting.kind, setting.top)
    found = [known.get(query, nobody) for query in ids]
    return {
        "best": rows,
        "best_scores": scores,
        "rows": np.concatenate([rows for rows, _ in found]),
        "scores": np.concatenate([scores for _, scores in found]),
        "offsets": np.concatenate([[0], np.cumsum([len(rows) for rows, _ in found])]).astype(np.int64),
    }


def answers(folder: RunFolder, known: dict[str, Manifest]) -> list[Manifest]:
    """All answers, in the order in which they were given; those that are not ``known`` yet are read and added there."""
    names = folder.committed(ANSWER)
    known |= {name: folder.manifest(ANSWER, name) for name in names - known.keys()}
    return sorted((known[name] for name in names), key=lambda manifest: (manifest.meta["time"], manifest.unit))


def own_candidates(folder: RunFolder, answer: Manifest, query: str) -> tuple[np.ndarray, np.ndarray]:
    """(corpus rows best first, prefilter scores) of a query of an answer, as ``prefilter.candidates``."""
    group = folder.group(answer.meta["index"])
    place = answer.meta["ids"].index(query)
    start, stop = group.read("offsets")[place : place + 2]
    return group.read("rows", slice(start, stop)), group.read("scores", slice(start, stop))


def token_rows(answer: Manifest, query: str) -> dict[int, tuple[str, int]]:
    """Corpus row -> (key, place) of the per-token scores of a query of an answer, as ``raylux.store.token_rows``."""
    return {
        int(row): (part["key"], place)
        for part in answer.meta["tokens"]
        if part["query"] == query
        for place, row in enumerate(part["rows"])
    }


def best(folder: RunFolder, answer: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """(corpus rows, scores) of the best of each query of an answer, [Q, ``BEST``] each; −1 and NaN beyond the last."""
    group = folder.group(answer.meta["index"])
    return group.read("best"), group.read("best_scores")
