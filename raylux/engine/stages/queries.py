"""The queries that a run knows: what was asked, and that an id always means the same question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raylux.fingerprints import of_query
from raylux.ledger import QUERIES
from raylux.store import RunFolder

if TYPE_CHECKING:
    from raylux.queries import Query


def records(folder: RunFolder) -> list[dict[str, Any]]:
    """id, fingerprint, measurement and record of every registered query, in the order they came."""
    return [entry for manifest in folder.units(QUERIES).values() for entry in manifest.meta["queries"]]


def changed(folder: RunFolder, queries: Sequence[Query]) -> str | None:
    """The first id that stands for another question in the run folder."""
    known = {entry["id"]: entry["fingerprint"] for entry in records(folder)}
    return next((query.id for query in queries if known.get(query.id, of_query(query)) != of_query(query)), None)


def register(folder: RunFolder, queries: Sequence[Query]) -> None:
    """Commit the queries that are new."""
    known = {entry["id"] for entry in records(folder)}
    new = [
        {"id": query.id, "fingerprint": of_query(query), "measurement": query.measurement, "record": query.record}
        for query in queries
        if query.id not in known
    ]
    if new:
        folder.commit(QUERIES, folder.unused(QUERIES, "q"), queries=new)
