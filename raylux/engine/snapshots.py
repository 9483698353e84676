"""Where a pass of sums stood, as the run folder keeps it: from there a shard that died, or the next driver, goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from raylux.engine.numerics import Numerics
from raylux.ledger import SNAPSHOT
from raylux.store import RunFolder


@dataclass(frozen=True)
class Snapshot:
    """Where a pass stood: ``cursor`` units are in the sums.

    Attributes:
        cursor: the unit that is due next.
        keys: matrix -> key of its sum.
        counts: layer -> token rows summed, "" -> sequences summed.
        heads: key of what each stretch of units had to tell, and its first unit.
        numerics: under which the units were computed.
    """

    cursor: int = 0
    keys: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    numerics: tuple[Numerics, ...] = ()


def load_snapshot(folder: RunFolder, stage: str) -> Snapshot:
    """The last one committed, or that of a pass which has not begun."""
    if stage not in folder.committed(SNAPSHOT):
        return Snapshot()
    meta = folder.manifest(SNAPSHOT, stage).meta
    return Snapshot(meta["cursor"], meta["keys"], meta["counts"], tuple(meta["heads"]), tuple(meta["numerics"]))


def forget_snapshot(folder: RunFolder, stage: str) -> None:
    """Remove a snapshot that is not needed any more: the stage is committed."""
    if stage in folder.committed(SNAPSHOT):
        objects = folder.manifest(SNAPSHOT, stage).objects
        folder.forget(SNAPSHOT, stage)
        folder.delete(list(objects))


def read_heads(folder: RunFolder, snapshot: Snapshot) -> dict[int, np.ndarray]:
    """What the units of a snapshot had to tell, by unit."""
    heads: dict[int, np.ndarray] = {}
    for key in snapshot.heads:
        group = folder.group(key)
        heads |= {int(unit): group.read(f"u{unit}") for unit in group.attrs["units"]}
    return heads
