"""A pass over fit units whose sums the factor shards hold: every unit counts once, whatever dies on the way.

Workers compute units in any order, shards add them in one. What a worker made goes to the shards as soon as it is
there, due or not: until then it rests on the worker's node and would go with it. From time to time all shards write
their sums, and one commit makes these the snapshot from which a shard that died, or the next driver, goes on: only
the units since then are computed again, and a shard that holds them already is not given them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from raylux.engine import quarantine
from raylux.engine.numerics import Numerics, distinct
from raylux.engine.pace import Pace
from raylux.engine.progress import Reporter, Task
from raylux.engine.snapshots import Snapshot, load_snapshot, read_heads
from raylux.engine.work import Backend, Failure, Job, Lost, Result, Work
from raylux.errors import RayluxError
from raylux.ledger import SNAPSHOT
from raylux.store import RunFolder

# Units in flight or waiting for their turn, per worker: what runs while one that ended its worker is done again, in a
# process that has yet to start. At half of it a thousand workers with units of 10 s stood idle for 4 % of the time.
_WINDOW = 8
# Deaths of one shard, or losses of one unit's sums, between two steps forward.
_DEATHS = 20


@dataclass(frozen=True)
class Units:
    """What a pass runs over.

    Attributes:
        stage: the pass's name in the ledger.
        method: of the worker; returns a head (an array, or None) and a part per shard.
        write: of the shard; writes the finished matrices.
        names: of the units, in the order in which they are added.
        args: unit -> arguments of the method.
        sequences: unit -> ids of its sequences.
        leave_out: names of units that another pass gave up.
        near: unit -> the worker that keeps its sequences, as far as is known.
    """

    stage: str
    method: str
    write: str
    names: Sequence[str]
    args: Callable[[int], tuple[Any, ...]]
    sequences: Callable[[int], list[str]]
    leave_out: frozenset[str] = frozenset()
    near: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """A pass's outcome: what the shards wrote (matrix -> key, objects, counts), heads by unit, numerics, repeats,
    and who computed a unit last."""

    written: dict[str, tuple[str, dict[str, tuple[int, str]], dict[str, Any]]]
    heads: dict[int, np.ndarray]
    numerics: list[Numerics]
    repeated: int
    workers: dict[int, int]


class SumPass:
    """One pass.

    Args:
        backend: workers and shards.
        folder: the run.
        units: what to run over.
        pace: when snapshots are due.
        reporter: told of what is repeated.
    """

    def __init__(self, backend: Backend, folder: RunFolder, units: Units, pace: Pace, reporter: Reporter) -> None:
        self._backend, self._folder, self._units, self._pace, self._reporter = backend, folder, units, pace, reporter
        self._snapshot = load_snapshot(folder, units.stage)
        self._heads = read_heads(folder, self._snapshot)
        self._workers: dict[int, int] = {}
        self._numerics: list[Numerics] = list(self._snapshot.numerics)
        self._cursors: dict[int, int] = {}
        # Units that a shard has before they are due.
        self._ahead: dict[int, set[int]] = {}
        # By shard and step; a step forward goes further than the shard ever was.
        self._deaths: dict[tuple[int, str], int] = {}
        self._reached: dict[int, int] = {}
        self._losses: dict[int, int] = {}
        self._held: dict[int, Result] = {}
        self._flying: set[int] = set()
        # Every unit before this one is added, held, flying or gone.
        self._next = self._snapshot.cursor
        self._furthest = self._oldest = self._snapshot.cursor
        self._repeated = 0
        self._gone = frozenset(quarantine.given_up(folder, units.stage)) | units.leave_out

    @property
    def low(self) -> int:
        """The unit that is due next at the shard that is furthest behind."""
        return min(self._cursors.values())

    def run(self, task: Task) -> Finished:
        """Add every unit, then have the shards write what they hold.

        Raises:
            RayluxError: a shard dies again and again.
        """
        for shard in range(self._backend.shards):
            self._cursors[shard] = -1
        self._restore(list(self._cursors))
        if self._snapshot.cursor:
            self._reporter.say(f"{task.stage}: goes on after {self._snapshot.cursor} of {len(self._units.names)} units")
        task.go_on(self.low)
        while True:
            self._add_all(task)
            written = self._write()
            if written is not None:
                # The sums are on the disk: they need not stay in memory beside what comes next.
                self._backend.ask("begin", dict.fromkeys(self._cursors, ()))
                return Finished(written, self._heads, distinct(self._numerics), self._repeated, self._workers)

    # shards

    def _restore(self, shards: Sequence[int]) -> None:
        """Give shards the sums of the last snapshot."""
        todo = list(shards)
        while todo:
            snapshot = self._snapshot
            call = (snapshot.cursor, dict(snapshot.keys), dict(snapshot.counts))
            answers = self._backend.ask("begin", dict.fromkeys(todo, call))
            for shard in todo:
                self._cursors[shard] = snapshot.cursor
                self._ahead[shard] = set()
            todo = [shard for shard, answer in answers.items() if isinstance(answer, Lost)]
            for shard in todo:
                self._count_death(shard, "begin", answers[shard].reason)
        for shard in shards:
            self._deaths.pop((shard, "begin"), None)
        self._next = min(self._next, self._snapshot.cursor)

    def _lost(self, step: str, answers: Mapping[int, Any]) -> None:
        """Bring the shards that died in a step back to the last snapshot."""
        dead = [shard for shard, answer in answers.items() if isinstance(answer, Lost) and answer.shard]
        for shard in dead:
            self._pace.died()
            self._count_death(shard, step, answers[shard].reason)
            behind = self._cursors[shard] - self._snapshot.cursor
            self._reporter.say(
                f"{self._units.stage}: factor shard {shard} died ({answers[shard].reason}); "
                f"{behind} units since the last snapshot are computed again"
            )
        if dead:
            self._restore(dead)

    def _count_death(self, shard: int, step: str, reason: str) -> None:
        deaths = self._deaths[shard, step] = self._deaths.get((shard, step), 0) + 1
        if deaths >= _DEATHS:
            unit = self._units.names[max(0, min(self._cursors[shard], len(self._units.names) - 1))]
            raise RayluxError(
                f"{self._units.stage}: factor shard {shard} died {deaths} times in {step} at unit {unit} and came no "
                f"further (last: {reason}); give the shards more memory (more engine.shards), and run the same "
                "command again"
            )

    # units

    def _add_all(self, task: Task) -> None:
        total = len(self._units.names)
        with self._backend.open(self._units.method, parts=True) as work:
            self._flying.clear()
            self._next = self.low
            losses = work.losses
            while self.low < total:
                if work.losses != losses:
                    losses = work.losses
                    self._drop_lost()
                self._submit(work)
                if not self._known(self.low):
                    result = work.next()
                    if result is None:
                        continue
                    self._take(result)
                    result = None  # in process it holds the unit's sums, which are added: not while the next is summed
                    self._moved(task)
                while self.low < total and self._known(self.low):
                    self._give(self.low)
                    self._moved(task)

    def _known(self, unit: int) -> bool:
        return unit in self._held or self._units.names[unit] in self._gone

    def _submit(self, work: Work) -> None:
        """Hand out units in order, a bounded window ahead of the one that is due."""
        low = self.low
        end = min(low + _WINDOW * self._backend.workers, len(self._units.names))
        # What was held meanwhile may have been added without it.
        self._next = max(self._next, low)
        while self._next < end and work.room:
            unit = self._next
            self._next += 1
            if self._known(unit) or unit in self._flying:
                continue
            self._flying.add(unit)
            if unit < self._furthest:
                self._repeated += 1
                self._reporter.event("repeated", units=1, unit=self._units.names[unit])
            self._furthest = max(self._furthest, unit + 1)
            near = self._units.near.get(unit)
            work.submit(Job(self._units.names[unit], self._units.args(unit), unit, near))

    def _take(self, result: Result) -> None:
        unit: int = result.job.item
        self._flying.discard(unit)
        if result.failure is not None:
            self._give_up(unit, result.failure)
            return
        self._held[unit] = result
        self._workers[unit] = result.worker
        if result.value is not None:
            self._heads.setdefault(unit, result.value)
        self._numerics = distinct([*self._numerics, result.numerics])
        self._give(unit)

    def _give_up(self, unit: int, failure: Failure) -> None:
        name = self._units.names[unit]
        quarantine.give_up(self._folder, self._units.stage, name, self._units.sequences(unit), failure)
        self._gone |= {name}
        self._heads.pop(unit, None)
        self._held.pop(unit, None)
        self._reporter.say(f"{self._units.stage}: unit {name} is quarantined ({failure.reason})")
        # Where it was computed for a shard that had died, the others have it: what is left out is left out of all.
        for ahead in self._ahead.values():
            ahead.discard(unit)
        holders = [shard for shard, cursor in self._cursors.items() if cursor > unit]
        if holders:
            self._restore(holders)

    def _lacking(self, unit: int) -> list[int]:
        """The shards that do not have a unit."""
        return [shard for shard, cursor in self._cursors.items() if cursor <= unit and unit not in self._ahead[shard]]

    def _give(self, unit: int) -> None:
        """Give a unit to the shards that lack it; where it is due, they add it and what they have of the next."""
        result = self._held.get(unit)
        parts = {shard: (unit, None if result is None else result.parts[shard]) for shard in self._lacking(unit)}
        answers = self._backend.ask("add", parts)
        for shard, answer in answers.items():
            if not isinstance(answer, Lost):
                self._ahead[shard].add(unit)
                self._reach(shard, answer)
        lost = [answer for answer in answers.values() if isinstance(answer, Lost)]
        if lost:
            self._lost("add", answers)
            self._drop_lost()
        if any(not answer.shard for answer in lost):
            self._count_loss(unit, lost[0].reason)

    def _moved(self, task: Task) -> None:
        """Forget what every shard has added, tell of it, and take a snapshot where one is due."""
        low = self.low
        for unit in range(self._oldest, low):
            self._held.pop(unit, None)
        self._oldest = low
        task.reach(low)
        if len(set(self._cursors.values())) == 1 and self._snapshot.cursor < self.low and self._pace.due:
            self._take_snapshot()

    def _reach(self, shard: int, cursor: int) -> None:
        self._ahead[shard].difference_update(range(self._cursors[shard], cursor))
        self._cursors[shard] = cursor
        if cursor > self._reached.get(shard, 0):
            self._reached[shard] = cursor
            self._deaths.pop((shard, "add"), None)

    def _drop_lost(self) -> None:
        """Have all that was lost with a node computed again at once, not each when it is due: the rest would wait."""
        lacked = [(unit, shard) for unit in self._held for shard in self._lacking(unit)]
        gone = self._backend.gone([self._held[unit].parts[shard] for unit, shard in lacked])
        for unit in {unit for (unit, _), lost in zip(lacked, gone, strict=True) if lost}:
            del self._held[unit]
            self._next = min(self._next, unit)

    def _count_loss(self, unit: int, reason: str) -> None:
        """Have a unit computed again whose sums got lost on their way; give up where that happens each time."""
        self._held.pop(unit, None)
        self._next = min(self._next, unit)
        losses = self._losses[unit] = self._losses.get(unit, 0) + 1
        if losses >= _DEATHS:
            raise RayluxError(
                f"{self._units.stage}: the sums of unit {self._units.names[unit]} were lost {losses} times on their "
                f"way to the factor shards (last: {reason}); give Ray's object store more memory, and run the "
                "same command again"
            )

    # snapshots

    def _take_snapshot(self) -> None:
        with self._pace.measured():
            prefix = f"snapshots/{self._units.stage}"
            answers = self._backend.ask("snapshot", dict.fromkeys(self._cursors, (prefix,)))
            complete = not any(isinstance(answer, Lost) for answer in answers.values())
            if complete:
                self._keep(answers)
        if not complete:
            self._lost("snapshot", answers)

    def _keep(self, answers: Mapping[int, Any]) -> None:
        """Make what every shard wrote the snapshot."""
        keys: dict[str, str] = {}
        counts: dict[str, int] = {}
        objects: dict[str, tuple[int, str]] = {}
        for more_keys, more_counts, more_objects in answers.values():
            keys |= more_keys
            counts |= more_counts
            objects |= more_objects
        self._commit(replace(self._snapshot, cursor=self.low, keys=keys, counts=counts), objects)
        for shard in self._cursors:
            self._deaths.pop((shard, "snapshot"), None)

    def _commit(self, snapshot: Snapshot, objects: dict[str, tuple[int, str]]) -> None:
        """Make it the snapshot, with what the units since the last one had to tell, and let go of the old sums."""
        new = {unit: head for unit, head in self._heads.items() if self._snapshot.cursor <= unit < snapshot.cursor}
        heads = snapshot.heads
        if new:
            arrays = {f"u{unit}": head for unit, head in sorted(new.items())}
            key, more = self._folder.write(f"snapshots/{self._units.stage}/heads", arrays, {"units": sorted(new)})
            heads, objects = (*heads, key), objects | more
        known = self._folder.committed(SNAPSHOT)
        before = self._folder.manifest(SNAPSHOT, self._units.stage).objects if self._units.stage in known else {}
        kept = {key: facts for key, facts in before.items() if _under(key, snapshot.heads)}
        self._snapshot = replace(snapshot, heads=heads, numerics=tuple(self._numerics))
        self._folder.commit(
            SNAPSHOT,
            self._units.stage,
            objects | kept,
            cursor=snapshot.cursor,
            keys=dict(snapshot.keys),
            counts=dict(snapshot.counts),
            heads=list(heads),
            numerics=self._numerics,
        )
        self._folder.delete([key for key in before if key not in kept])

    def _write(self) -> dict[str, Any] | None:
        """What the shards wrote; None where one died meanwhile."""
        answers = self._backend.ask(self._units.write, dict.fromkeys(self._cursors, ()))
        if any(isinstance(answer, Lost) for answer in answers.values()):
            self._lost(self._units.write, answers)
            return None
        return {name: value for answer in answers.values() for name, value in answer.items()}


def _under(key: str, groups: Sequence[str]) -> bool:
    return any(key.startswith(f"{group}/") for group in groups)
