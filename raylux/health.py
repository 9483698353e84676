"""The state of a run folder: units that were given up, and unlike machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raylux.ledger import ANSWER, COVARIANCE, EIGEN, MOMENTS, PROJECTED, QUARANTINE, QUERY, SCORE, SQUARES, TOKENS
from raylux.store import RunFolder


@dataclass(frozen=True)
class Quarantined:
    """A unit that was given up: the run went on without it.

    Attributes:
        stage: of the ledger, as "score".
        unit: its name within the stage.
        sequences: ids of its sequences (or queries): what is missing in the results.
        deaths: how many workers died while they executed it.
        reason: of the last death.
    """

    stage: str
    unit: str
    sequences: tuple[str, ...]
    deaths: int
    reason: str


def quarantined(store: RunFolder) -> list[Quarantined]:
    """The units of the ledger's stage ``quarantine``, in the order of their names."""
    found = (manifest.meta for manifest in store.units(QUARANTINE).values())
    return [
        Quarantined(
            str(meta["stage"]),
            str(meta["unit"]),
            tuple(str(name) for name in meta["sequences"]),
            int(meta["deaths"]),
            str(meta["reason"]),
        )
        for meta in found
    ]


def mixed_numerics(store: RunFolder) -> dict[str, list[str]]:
    """What differs among the numerics tags of all committed units: as "threads" -> ["1", "2"]; empty: nothing."""
    found: dict[str, set[str]] = {}
    for stage in (COVARIANCE, EIGEN, MOMENTS, PROJECTED, QUERY, SCORE, TOKENS, SQUARES, ANSWER):
        for manifest in store.units(stage).values():
            for tag in _tags(manifest.meta.get("numerics")):
                for name, value in tag.items():
                    found.setdefault(name, set()).add(str(value))
    return {name: sorted(values) for name, values in found.items() if len(values) > 1}


def _tags(numerics: Any) -> list[Mapping[str, Any]]:
    """The numerics tags of a manifest: it holds one, several or none."""
    if numerics is None:
        return []
    return [numerics] if isinstance(numerics, Mapping) else list(numerics)
