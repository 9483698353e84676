"""A stage of the fit that sums: its units, run over once for each layer pass.

Every pass of a stage goes over the same units with the same labels, drawn in the first pass over a unit, and commits
its own layers. One
that was interrupted goes on from its snapshot, though the next command may cut the layers in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylux.batches import IGNORED
from raylux.cost.passes import Held, largest
from raylux.engine.context import Context
from raylux.engine.pace import Pace
from raylux.engine.plan import choose_fit_rows, fit_units
from raylux.engine.snapshots import forget_snapshot, load_snapshot
from raylux.engine.sums import Finished, SumPass, Units
from raylux.engine.work import ids_at
from raylux.errors import RayluxError
from raylux.layers import TrackedLayer
from raylux.ledger import LABELS


class FitUnits:
    """The sequences of the fit, cut into units: a function of ids and lengths alone."""

    def __init__(self, ctx: Context) -> None:
        self.rows = choose_fit_rows(ctx.ids, ctx.config.fit.sequences, ctx.config.fit.seed)
        lengths = ctx.reader.lengths[self.rows]
        self.slices = fit_units(lengths, ctx.plan.fit_unit_tokens)
        self.names = [f"f{index:06d}" for index in range(len(self.slices))]
        self.ends = np.concatenate([[0], np.cumsum(lengths)])

    def beyond(self, sequences: int | None) -> frozenset[str]:
        """Names of the units after those that hold the first ``sequences`` of the fit; None: there are none."""
        pairs = zip(self.names, self.slices, strict=True)
        return frozenset(name for name, part in pairs if sequences is not None and part.start >= sequences)

    def tokens(self, index: int) -> slice:
        """Where a unit's tokens lie among those of the fit, flat."""
        part = self.slices[index]
        return slice(int(self.ends[part.start]), int(self.ends[part.stop]))

    def joined(self, heads: Mapping[int, np.ndarray]) -> np.ndarray:
        """The labels of all units, flat in the order of the fit; of a unit that was left out, none counts."""
        labels = np.full(int(self.ends[-1]), IGNORED, np.int32)
        for index, head in heads.items():
            labels[self.tokens(index)] = head
        return labels


@dataclass(frozen=True)
class LayerSums:
    """What a stage sums.

    Attributes:
        stage: its name in the ledger.
        what: people call it.
        method: of the worker; takes rows, labels, the layers of each shard, and ``more``.
        write: of the shard.
        passes: to be made.
        held: bytes of a layer's sums, as a snapshot keeps them.
        matrices: layer -> names of the sums that it needs.
        more: arguments of the method.
        leave_out: units that another stage gave up, or that this one does not need.
    """

    stage: str
    what: str
    method: str
    write: str
    passes: int
    held: Held
    matrices: Callable[[Context, str], set[str]]
    more: tuple[Any, ...]
    leave_out: frozenset[str] = frozenset()


def sum_layers(ctx: Context, units: FitUnits, sums: LayerSums) -> None:
    """Sum what the ledger lacks, a pass after the other.

    Raises:
        RayluxError: nothing is left to sum over.
    """
    folder = ctx.folder
    while layers := _due(ctx, sums):
        done = _pass(ctx, units, sums, layers)
        (summed,) = {counts["sequences"] for _, _, counts in done.written.values()}
        for name, before in folder.units(sums.stage).items():
            if before.meta["sequences"] != summed:
                # A unit that an earlier pass had was given up in this one: all layers are to be sums over the same.
                folder.forget(sums.stage, name)
                folder.delete(list(before.objects))
        for name, (key, objects, counts) in done.written.items():
            folder.commit(sums.stage, name, objects, key=key, numerics=done.numerics, **counts)
        forget_snapshot(folder, sums.stage)


def _due(ctx: Context, sums: LayerSums) -> list[TrackedLayer]:
    """The layers of the next pass: those of the snapshot, or the last in the model that are missing; empty: none is."""
    tracked, committed = ctx.coverage.tracked, ctx.folder.committed(sums.stage)
    missing = {layer.name for layer in tracked if sums.matrices(ctx, layer.name) - committed}
    blocks = ctx.passes_of(sums.passes)
    begun = {name.rpartition(":")[2] for name in load_snapshot(ctx.folder, sums.stage).keys}
    found = [layer for layer in tracked if layer.name in begun]
    if begun and missing and begun & missing and largest([found], sums.held) <= largest(blocks, sums.held):
        return found
    forget_snapshot(ctx.folder, sums.stage)
    due = ([layer for layer in block if layer.name in missing] for block in blocks)
    return next((block for block in due if block), [])


def _pass(ctx: Context, units: FitUnits, sums: LayerSums, layers: Sequence[TrackedLayer]) -> Finished:
    names = {layer.name for layer in layers}
    shards = [[name for name in own if name in names] for own in ctx.assignment]
    labels = _labels(ctx)

    def args(index: int) -> tuple[Any, ...]:
        own = None if labels is None else labels[units.tokens(index)]
        if own is not None and (own == IGNORED).all():
            own = None  # no pass has drawn them yet
        return units.rows[units.slices[index]], own, shards, *sums.more

    work = Units(
        sums.stage, sums.method, sums.write, units.names, args,
        lambda index: ids_at(ctx.ids, units.rows[units.slices[index]]), sums.leave_out, ctx.keepers,
    )  # fmt: skip
    if len(layers) < len(ctx.coverage.tracked):
        ctx.reporter.say(f"{sums.what}: a pass over {len(layers)} layers, {layers[0].name} to {layers[-1].name}")
    pace = Pace(ctx.config.fit.snapshot, int(largest([layers], sums.held)))
    with ctx.reporter.task(sums.what, len(units.names), "units") as task:
        done = SumPass(ctx.backend, ctx.folder, work, pace, ctx.reporter).run(task)
    if not done.written or any(not counts["sequences"] for _, _, counts in done.written.values()):
        raise RayluxError(
            f"{ctx.folder.path}: every unit of the fit is quarantined, nothing is left to fit on; "
            "`raylux inspect` lists the reasons"
        )
    if ctx.kind.basis:  # other kinds keep nothing; who kept a unit in the first pass over it has it still
        ctx.keepers = {**done.workers, **ctx.keepers}
    if done.heads:
        key, objects = ctx.folder.write("factors/labels", {"labels": units.joined(done.heads)})
        before = len(ctx.folder.committed(LABELS))
        ctx.folder.commit(LABELS, f"labels {before}" if before else "labels", objects, key=key)
    return done


def _labels(ctx: Context) -> np.ndarray | None:
    """That the gradients of the fit were taken on, flat in its order, IGNORED where none were drawn; None: nowhere."""
    found: np.ndarray | None = None
    for _, drawn in sorted(ctx.folder.units(LABELS).items()):
        own = ctx.folder.group(drawn.meta["key"]).read("labels")
        found = own if found is None else np.where(found == IGNORED, own, found)
    return found
