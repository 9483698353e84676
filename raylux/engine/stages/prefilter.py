"""Prefilter: candidates of each query, over shards of the corpus in parallel."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raylux import prefilter
from raylux.ledger import CANDIDATES
from raylux.store import RunFolder

if TYPE_CHECKING:
    from raylux.engine.context import Context
    from raylux.queries import Query

# Corpus rows of a shard of the prefilter: some seconds of work, some hundred megabytes.
_SHARD_ROWS = 50_000


def run(ctx: Context) -> None:
    """Find and commit the candidates of every query that has none for the present kind and size."""
    setting = ctx.config.prefilter
    if setting.kind == "none":
        return
    known = candidates(ctx.folder, setting.kind, setting.top)
    todo = [query for query in ctx.queries if query.id not in known]
    if not todo:
        return
    with ctx.reporter.task("prefilter", len(todo), "queries") as task:
        found = find(ctx, todo, setting.kind, setting.top)
        task.advance(len(todo))
    _commit(ctx, todo, found)


def find(ctx: Context, queries: Sequence[Query], kind: str, top: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(corpus rows best first, scores) of each query: the ``top`` sequences by a kind of prefilter."""
    place, bounds = ctx.folder.files.place, _bounds(len(ctx.reader))
    terms = prefilter.merge_counts(_spread(ctx, _count, [(place, *bound, ctx.vocabulary) for bound in bounds]))
    tokens = [query.search_tokens for query in queries]
    parts = _spread(ctx, _score, [(place, *bound, kind, terms, tokens, top) for bound in bounds])
    return [prefilter.merge_top([part[number] for part in parts], top) for number in range(len(queries))]


def _commit(ctx: Context, queries: Sequence[Query], found: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    setting = ctx.config.prefilter
    offsets = np.concatenate([[0], np.cumsum([len(rows) for rows, _ in found])]).astype(np.int64)
    arrays = {
        "rows": np.concatenate([rows for rows, _ in found]).astype(np.int64),
        "scores": np.concatenate([scores for _, scores in found]).astype(np.float64),
        "offsets": offsets,
    }
    key, objects = ctx.folder.write("candidates/block", arrays)
    ids = [query.id for query in queries]
    name = hashlib.blake2b("\n".join(ids).encode(), digest_size=6).hexdigest()
    ctx.folder.commit(
        CANDIDATES,
        f"{setting.kind}-{setting.top}-{name}",
        objects,
        key=key,
        kind=setting.kind,
        top=setting.top,
        queries=ids,
    )


def candidates(folder: RunFolder, kind: str, top: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Query -> (corpus rows best first [n] int64, prefilter scores [n]) as committed for this kind and size."""
    result = {}
    for manifest in folder.units(CANDIDATES).values():
        if (manifest.meta["kind"], manifest.meta["top"]) != (kind, top):
            continue
        group = folder.group(manifest.meta["key"])
        rows, scores, offsets = (group.read(name) for name in ("rows", "scores", "offsets"))
        for place, query in enumerate(manifest.meta["queries"]):
            span = slice(offsets[place], offsets[place + 1])
            result[query] = rows[span], scores[span]
    return result


def union(ctx: Context) -> np.ndarray:
    """Corpus rows that are a candidate of some query, ascending."""
    # Queries of a set share an array: each is looked at once.
    distinct = {id(rows): rows for rows in own_rows(ctx).values()}
    return np.unique(np.concatenate([np.zeros(0, np.int64), *distinct.values()]))


def own_rows(ctx: Context) -> dict[str, np.ndarray]:
    """Query -> the corpus rows that it is answered on, ascending: the candidates of all queries of its set."""
    sets = ctx.apart or (tuple(query.id for query in ctx.queries),)
    setting = ctx.config.prefilter
    if setting.kind == "none":
        return dict.fromkeys((query for ids in sets for query in ids), np.arange(len(ctx.reader)))
    known = candidates(ctx.folder, setting.kind, setting.top)
    found: dict[str, np.ndarray] = {}
    for ids in filter(None, sets):
        found |= dict.fromkeys(ids, np.unique(np.concatenate([known[query][0] for query in ids])))
    return found


def missing(ctx: Context) -> list[str]:
    """Ids of the queries without candidates."""
    setting = ctx.config.prefilter
    if setting.kind == "none":
        return []
    known = candidates(ctx.folder, setting.kind, setting.top)
    return [query.id for query in ctx.queries if query.id not in known]


def _bounds(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + _SHARD_ROWS, count)) for start in range(0, count, _SHARD_ROWS)]


def _spread(ctx: Context, function: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> list[Any]:
    """Run over the shards; a single one here, sooner than a process of the cluster could start."""
    return ctx.backend.tasks(function, jobs) if len(jobs) > 1 else [function(*jobs[0])]


def _slice(path: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    folder = RunFolder(path)
    group = folder.group(folder.manifest("corpus", "corpus").meta["key"])
    offsets = group.read("offsets", slice(start, stop + 1))
    return group.read("tokens", slice(int(offsets[0]), int(offsets[-1]))), offsets - offsets[0]


def _count(path: str, start: int, stop: int, vocabulary: int) -> prefilter.TermCounts:
    return prefilter.count_terms(*_slice(path, start, stop), vocabulary)


def _score(
    path: str, start: int, stop: int, kind: str, terms: prefilter.TermCounts, queries: list[np.ndarray], top: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    tokens, offsets = _slice(path, start, stop)
    return prefilter.score_shard(kind, tokens, offsets, terms, queries, top, start)
