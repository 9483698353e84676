"""What a run folder says of where its queries were carried from, and of what other runs would take from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raylux.fingerprints import digest
from raylux.ledger import COVARIANCE, EIGEN, MOMENTS, QUERY
from raylux.store import Manifest, RunFolder

# Before the print of a run without curvature: it stands for the end of a training, and is no segment of it.
END = "end "


def prints_of(folder: RunFolder, ids: Sequence[str]) -> dict[str, str]:
    """Query id -> what changes with anything that a run would read of it here; of those that are solved."""
    factors = _checksums([m for stage in (COVARIANCE, EIGEN, MOMENTS) for m in folder.units(stage).values()])
    holds = holding(blocks_of(folder, ids))
    return {query: digest(factors, _checksums([holds[query]])) for query in ids if query in holds}


def taken(folder: RunFolder) -> dict[str, list[str]]:
    """Query id -> ``prints_of`` it in each of the runs that it was carried from; of those that were."""
    found: dict[str, Any] = {}
    for unit in folder.units(QUERY).values():
        found |= unit.meta.get("carried", {})
    # One run's stood there by itself, before there could be several.
    return {query: [own] if isinstance(own, str) else own for query, own in found.items()}


def blocks_of(folder: RunFolder, ids: Sequence[str]) -> dict[str, Manifest]:
    """Committed blocks of s_test that hold any of these queries."""
    units = folder.units(QUERY).items()
    return {unit: manifest for unit, manifest in units if set(ids) & set(manifest.meta["queries"])}


def holding(units: Mapping[str, Manifest]) -> dict[str, Manifest]:
    """Query id -> the block that holds it."""
    return {query: manifest for manifest in units.values() for query in manifest.meta["queries"]}


def _checksums(manifests: Sequence[Manifest]) -> dict[str, str]:
    """Of all objects that they vouch for, whatever these are called."""
    found = sorted(f"{size} {checksum}" for manifest in manifests for size, checksum in manifest.objects.values())
    return {"objects": " ".join(found)}
