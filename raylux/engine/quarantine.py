"""Units that were given up: their workers died of them again and again, alone in fresh processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raylux.engine.work import Failure
from raylux.ledger import QUARANTINE
from raylux.shown import redacted
from raylux.store import RunFolder


@dataclass(frozen=True)
class Pairs:
    """Every one of some queries with every one of some corpus rows."""

    queries: tuple[str, ...]
    rows: tuple[int, ...]


def give_up(
    folder: RunFolder, stage: str, unit: str, sequences: Sequence[str], failure: Failure, pairs: Pairs | None = None
) -> None:
    """Commit that a unit of a stage is left out, with the ids of its sequences (or queries) and the reason.

    Args:
        folder: the run.
        stage: of the ledger.
        unit: its name within the stage.
        sequences: what people are told is missing.
        failure: why.
        pairs: of scores: what is missing exactly, as the same pairs come in other units with other workers.
    """
    folder.commit(
        QUARANTINE,
        f"{stage} {unit}",
        stage=stage,
        unit=unit,
        sequences=list(sequences),
        deaths=failure.deaths,
        reason=redacted(failure.reason),
        **({} if pairs is None else {"queries": list(pairs.queries), "rows": list(pairs.rows)}),
    )


def given_up(folder: RunFolder, *stages: str) -> dict[str, list[str]]:
    """Units of these stages that are left out, with the ids that they stand for."""
    return {
        manifest.meta["unit"]: manifest.meta["sequences"]
        for manifest in folder.units(QUARANTINE).values()
        if manifest.meta["stage"] in stages
    }


def lost_pairs(folder: RunFolder, stage: str) -> list[Pairs]:
    """The pairs of queries and rows of a stage that are left out, a unit of them after the other."""
    return [
        Pairs(tuple(manifest.meta["queries"]), tuple(manifest.meta["rows"]))
        for manifest in folder.units(QUARANTINE).values()
        if manifest.meta["stage"] == stage
    ]
