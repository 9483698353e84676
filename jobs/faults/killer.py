"""The killer: a seeded choice of whom to kill and when, counted in what the run got done since the last kill."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from jobs.faults.cluster import NODES, Cluster, title
from jobs.faults.driver import Driver
from jobs.faults.progress import STAGES, Progress

KINDS = ("worker", "shard", "node", "driver")
_ACTORS = {"worker": "GradientWorker", "shard": "FactorShard"}
# How often each kind stands in the pack from which victims are drawn: what dies cheaply dies more often.
_PACK = {"worker": 3, "shard": 3, "node": 2, "driver": 2}
# Of the kills, how many come while the run still recovers from the one before.
_RECOVERING = 0.25
_RECOVERY = 4.0
_POLL = 0.01
# Without a line of progress for so long, a run hangs.
_PATIENCE = 240.0


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        stage: that was under way.
        kind: of ``KINDS``.
        victim: what it called itself.
        recovering: whether it came while the run recovered from another.
        at_stake: units that were computed and in no snapshot.
    """

    stage: str
    kind: str
    victim: str
    recovering: bool
    at_stake: int


class Killer:
    """Runs a driver to its end, however often it and what works for it are killed.

    Args:
        seed: of every choice. The moments follow the run's own pace, so equal seeds give equal plans, not equal runs.
        cluster: where it runs.
        driver: the command.
        progress: of its run folder.
        quota: stage -> kills in it; what a stage was too quick for is added to the next.
        moves: stage -> units that an undisturbed run computes in it.
    """

    def __init__(
        self,
        seed: int,
        cluster: Cluster,
        driver: Driver,
        progress: Progress,
        quota: Mapping[str, int],
        moves: Mapping[str, int],
    ) -> None:
        self._random = random.Random(seed)
        self._cluster, self.driver, self._progress = cluster, driver, progress
        self._quota, self._moves = dict(quota), moves
        self._pack = deque(self._random.sample(KINDS, len(KINDS)))
        self._stage: str | None = None
        self._due, self._not_before, self._recovering = 0, 0.0, False
        self.kills: list[Kill] = []

    def run(self) -> None:
        """To the end of the run.

        Raises:
            RuntimeError: the driver ends by itself with an error, or nothing moves any more.
        """
        self.driver.start()
        moved = time.monotonic()
        while self.driver.code is None:
            if self._progress.poll():
                moved = time.monotonic()
            elif time.monotonic() - moved > _PATIENCE:
                raise RuntimeError(f"nothing moved for {_PATIENCE:.0f} s:\n{self.driver.where()}")
            if self._look():
                moved = time.monotonic()
            time.sleep(_POLL)
        self._progress.poll()
        if self.driver.code != 0:
            raise RuntimeError(f"the driver ended with exit code {self.driver.code}:\n{self.driver.said()}")

    def _look(self) -> bool:
        """Kill if it is time to; whether it was."""
        if self._progress.stage not in (None, self._stage):
            self._enter(self._progress.stage)
        stage = self._stage
        if stage is None or self._quota[stage] <= 0:
            return False
        # A driver that was just started has said nothing yet: only a kill in the midst of recovery may hit it.
        if self._progress.stage is None and not self._recovering:
            return False
        if self._progress.moves(stage) < self._due or time.monotonic() < self._not_before:
            return False
        self._kill(stage)
        self._quota[stage] -= 1
        self._plan(stage)
        return True

    def _enter(self, stage: str) -> None:
        if self._stage is not None:
            self._quota[stage] += self._quota[self._stage]
            self._quota[self._stage] = 0
        self._stage, self._recovering = stage, False
        self._due = self._progress.moves(stage) + self._random.randint(0, self._spacing(stage))
        self._not_before = 0.0

    def _plan(self, stage: str) -> None:
        """The next moment: after some more units and a fraction of a second, or soon, whatever happens."""
        self._recovering = not self._recovering and self._random.random() < _RECOVERING
        delay = self._random.uniform(0, _RECOVERY if self._recovering else 0.3)
        more = 0 if self._recovering else self._random.randint(1, self._spacing(stage))
        self._due = self._progress.moves(stage) + more
        self._not_before = time.monotonic() + (delay if self._recovering or stage != "eigenbases" else 0)

    def _spacing(self, stage: str) -> int:
        """Units between two kills, at most, so that the stage lasts for those that are left."""
        left = self._moves[stage] - len(self._progress.units[stage])
        return max(1, left // (self._quota[stage] + 2))

    def _kill(self, stage: str) -> None:
        for _ in range(len(self._pack) + sum(_PACK.values())):
            if not self._pack:
                pack = [kind for kind, count in _PACK.items() for _ in range(count)]
                self._pack.extend(self._random.sample(pack, len(pack)))
            kind = self._pack.popleft()
            at_stake = self._progress.at_stake(stage)
            victim = self._end(kind)
            if victim is not None:
                self.kills.append(Kill(stage, kind, victim, self._recovering, at_stake))
                return
            self._pack.append(kind)  # none is there: its turn comes later

    def _end(self, kind: str) -> str | None:
        """Kill one of a kind; what it was, None where there is none."""
        if kind == "driver":
            self.driver.kill()
            self._progress.poll()
            self._progress.stage = None
            self.driver.start()
            return "driver"
        if kind == "node":
            node = self._random.randrange(NODES)
            self._cluster.replace(node)
            return f"node {node}"
        return self._end_actor(_ACTORS[kind])

    def _end_actor(self, name: str) -> str | None:
        victims = sorted(self._cluster.actors(name), key=lambda process: process.pid)
        self._random.shuffle(victims)
        for victim in victims:
            with contextlib.suppress(psutil.Error):
                what = title(victim)
                victim.kill()
                return what
        return None


def quotas(kills: int) -> dict[str, int]:
    """So many kills, evenly over the stages."""
    return {stage: len(range(place, kills, len(STAGES))) for place, stage in enumerate(STAGES)}


def enough(kills: list[Kill], asked: int) -> bool:
    """Whether every stage had 5 of 12 of its share, all together 5 of 6, and every kind its turn."""
    found = table(kills)
    share = asked / len(STAGES)
    return (
        len(kills) >= asked * 5 / 6
        and all(found[stage].total() >= share * 5 / 12 for stage in STAGES)
        and {kill.kind for kill in kills} == set(KINDS)
    )


def table(kills: list[Kill]) -> dict[str, Counter[str]]:
    """Stage -> kind -> kills."""
    return {stage: Counter(kill.kind for kill in kills if kill.stage == stage) for stage in STAGES}
