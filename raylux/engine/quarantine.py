"""Units that were given up: their workers died of them again and again, alone in fresh processes."""

from __future__ import annotations

from collections.abc import Sequence

from raylux.engine.records import QUARANTINE
from raylux.engine.work import Failure
from raylux.shown import redacted
from raylux.store import RunFolder


def give_up(folder: RunFolder, stage: str, unit: str, sequences: Sequence[str], failure: Failure) -> None:
    """Commit that a unit of a stage is left out, with the ids of its sequences (or queries) and the reason."""
    folder.commit(
        QUARANTINE,
        f"{stage} {unit}",
        stage=stage,
        unit=unit,
        sequences=list(sequences),
        deaths=failure.deaths,
        reason=redacted(failure.reason),
    )


def given_up(folder: RunFolder, *stages: str) -> dict[str, list[str]]:
    """Units of these stages that are left out, with the ids that they stand for."""
    return {
        manifest.meta["unit"]: manifest.meta["sequences"]
        for manifest in folder.units(QUARANTINE).values()
        if manifest.meta["stage"] in stages
    }
