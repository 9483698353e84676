"""Passes of sums on a simulated cluster: whatever dies, every unit counts once and the bits are the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylux.engine.pace import SHARE, Pace
from raylux.engine.quarantine import given_up
from raylux.engine.simulate_backend import ShardFate
from raylux.engine.snapshots import forget_snapshot, load_snapshot
from raylux.engine.sums import _DEATHS, _WINDOW
from raylux.errors import RayluxError
from raylux.ledger import COVARIANCE, SNAPSHOT
from raylux.store import RunFolder
from raylux.triangles import unpack
from tests.simulated import SIZES, DriverKilled, Scene, expected, head

UNITS = 16


def nth(shard: int, method: str, call: int, when: ShardFate) -> Callable[[int, str], ShardFate | None]:
    """A shard that dies of one call of a method."""
    seen: Counter[tuple[int, str]] = Counter()

    def fate(number: int, name: str) -> ShardFate | None:
        seen[number, name] += 1
        return when if (number, name) == (shard, method) and seen[number, name] == call else None

    return fate


# ------------------------------------------------------------------------------------------- shards die


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("method", "call"),
    [("begin", 1), ("add", 1), ("add", 9), ("add", UNITS), ("snapshot", 1), ("snapshot", 4), ("write_covariances", 1)],
)
@pytest.mark.parametrize("snapshot", [0.0, 200.0, 1e9])
def test_a_shard_that_dies_goes_on_from_the_last_snapshot(
    tmp_path: Path, method: str, call: int, when: ShardFate, snapshot: float
) -> None:
    scene = Scene(tmp_path, UNITS, snapshot=snapshot, shard_fate=nth(1, method, call, when))
    scene.start()
    since: list[int] = []
    lost = scene.sums._lost

    def watched(step: str, answers: Any) -> None:
        since.append(UNITS - scene.cursor if step.startswith("write") else scene.sums.low + 1 - scene.cursor)
        lost(step, answers)

    scene.sums._lost = watched  # type: ignore[method-assign]
    finished = scene.go_on()
    assert scene.bits(finished) == expected(UNITS)
    happens = method != "snapshot" or snapshot == 0 or (snapshot == 200 and call == 1)
    assert len([event for event in scene.events if event.get("state") == "died"]) == happens
    assert scene.again == finished.repeated <= sum(since)


def test_nothing_is_computed_twice_where_nothing_dies(tmp_path: Path) -> None:
    scene = Scene(tmp_path, UNITS)
    finished = scene.run()
    assert scene.bits(finished) == expected(UNITS)
    assert scene.begun == dict.fromkeys(range(UNITS), 1) and finished.repeated == 0


@pytest.mark.parametrize("method", ["begin", "add", "snapshot", "write_covariances"])
def test_a_shard_that_dies_for_ever_ends_in_one_error(tmp_path: Path, method: str) -> None:
    """Though it comes back to where it was each time: only what goes further than ever is a step forward."""
    at = {"add": 9}.get(method, 0)

    def fate(shard: int, name: str) -> ShardFate | None:
        return "before" if (shard, name) == (1, method) and scene.sums.low >= at else None

    scene = Scene(tmp_path, UNITS, snapshot=0.0 if method != "add" else 300.0, shard_fate=fate)
    scene.start()
    at -= method == "begin"
    with pytest.raises(RayluxError) as caught:
        scene.go_on()
    message = str(caught.value)
    assert f"factor shard 1 died {_DEATHS} times in {method} at unit f0" in message and "\n" not in message
    assert "its process ended in" in message and "engine.shards" in message


def test_a_shard_that_dies_now_and_then_is_borne(tmp_path: Path) -> None:
    """More often than a shard may die in one place."""
    seen: Counter[str] = Counter()

    def fate(shard: int, method: str) -> ShardFate | None:
        seen[method] += 1
        # Snapshots are some five units apart, ten of these: what it dies of comes later than the next one.
        return "before" if method == "add" and seen[method] % 17 == 0 else None

    scene = Scene(tmp_path, 200, snapshot=200.0, shard_fate=fate)
    assert scene.bits(scene.run()) == expected(200)
    assert len([event for event in scene.events if event.get("state") == "died"]) > _DEATHS


# ---------------------------------------------------------------------------------------- objects are lost


@pytest.mark.parametrize("unit", [0, 9])
def test_sums_that_are_lost_on_the_way_are_computed_again(tmp_path: Path, unit: int) -> None:
    """A node goes after it finished a unit and before the shards have it."""
    scene = Scene(tmp_path, UNITS, places=(1, 1, 1, 1), snapshot=1e9)
    scene.start()
    ask = scene.backend.ask

    def losing(method: str, args: Any) -> dict[int, Any]:
        if method == "add" and args[0][0] == unit and scene.begun[unit] == 1:
            scene.cluster.lose(args[0][1].node)
        return ask(method, args)

    scene.backend.ask = losing  # type: ignore[method-assign]
    assert scene.bits(scene.go_on()) == expected(UNITS)
    assert scene.begun[unit] == 2
    assert not any("shard" in event for event in scene.events), "no shard died"


def test_sums_that_one_shard_has_and_another_lost_are_added_once(tmp_path: Path) -> None:
    """A shard dies when it had units before they were due, and the nodes that made these are gone meanwhile."""
    scene = Scene(
        tmp_path, 40, places=(1,) * 8, snapshot=1e9, fate=lambda unit, run: "hang" if unit + run == 1 else None
    )
    scene.start()
    had: list[int] = []

    def strike() -> None:
        had.extend(scene.sums._ahead[1])
        scene.backend.crash_shard(1)
        for node in [node for node in scene.cluster.nodes.values() if not any(w.calls for w in node.workers)][:4]:
            scene.cluster.lose(node)
            scene.cluster.join(1)

    scene.cluster.at(500, strike)
    assert scene.bits(scene.go_on()) == expected(40)
    assert len(had) > 20 and 3 < scene.again <= len(had) + 1, "those whose makers stayed are not computed again"


def test_what_is_finished_is_not_lost_with_its_node(tmp_path: Path) -> None:
    """The window is full behind a unit that hangs: the rest is with the shards already, due or not."""
    scene = Scene(
        tmp_path, 120, places=(1,) * 8, snapshot=1e9, fate=lambda unit, run: "hang" if unit + run == 1 else None
    )
    scene.start()
    scene.backend.timeout = 2000.0  # until long after the window is full

    def lose() -> None:
        nodes = [node for node in scene.cluster.nodes.values() if not any(w.calls for w in node.workers)]
        assert len(nodes) == 7 and len(scene.sums._held) == _WINDOW * 8 - 1
        for node in nodes[:3]:
            scene.cluster.lose(node)

    scene.cluster.at(1000, lose)
    assert scene.bits(scene.go_on()) == expected(120)
    assert scene.again == 1, "the unit that hung"


def test_sums_that_are_lost_for_ever_end_in_one_error(tmp_path: Path) -> None:
    scene = Scene(tmp_path, UNITS, places=(1,), elastic=False)
    scene.start()
    ask = scene.backend.ask

    def losing(method: str, args: Any) -> dict[int, Any]:
        if method == "add" and scene.sums.low == 3:
            scene.cluster.lose(next(iter(scene.cluster.nodes.values())))
            scene.cluster.join(1)
        return ask(method, args)

    scene.backend.ask = losing  # type: ignore[method-assign]
    with pytest.raises(RayluxError, match=rf"sums of unit f003 were lost {_DEATHS} times.*object store"):
        scene.go_on()


# -------------------------------------------------------------------------------------------- quarantine


def test_a_unit_that_kills_is_left_out_and_the_run_goes_on(tmp_path: Path) -> None:
    scene = Scene(tmp_path, UNITS, fate=lambda unit, run: "process" if unit == 7 else None)
    finished = scene.run()
    assert scene.bits(finished) == expected(UNITS, out=(7,))
    assert given_up(RunFolder(str(tmp_path)), COVARIANCE) == {"f007": ["s7"]}
    assert [line for line in scene.said if "quarantined" in line] == [
        f"{COVARIANCE}: unit f007 is quarantined (its process ended)"
    ]
    again = Scene(tmp_path, UNITS)
    assert again.bits(again.run()) == expected(UNITS, out=(7,)) and again.begun[7] == 0


def test_a_suspect_that_then_succeeds_has_the_usual_bits(tmp_path: Path) -> None:
    scene = Scene(tmp_path, UNITS, fate=lambda unit, run: "process" if unit % 5 == 0 and run <= 3 else None)
    assert scene.bits(scene.run()) == expected(UNITS)
    assert given_up(RunFolder(str(tmp_path)), COVARIANCE) == {}


def test_a_unit_given_up_after_some_shards_had_it_is_left_out_of_all(tmp_path: Path) -> None:
    """It was added once; a shard dies; computed again for that shard, it kills its workers."""
    scene = Scene(
        tmp_path, UNITS, snapshot=1e9, shard_fate=nth(1, "add", 11, "before"),
        fate=lambda unit, run: "process" if unit == 7 and run > 1 else None,
    )  # fmt: skip
    assert scene.bits(scene.run()) == expected(UNITS, out=(7,))


def test_units_that_another_pass_gave_up_are_left_out(tmp_path: Path) -> None:
    scene = Scene(tmp_path, UNITS, leave_out=frozenset({"f000", "f011", f"f{UNITS - 1:03d}"}))
    assert scene.bits(scene.run()) == expected(UNITS, out=(0, 11, UNITS - 1))
    assert not {0, 11, UNITS - 1} & set(scene.begun)


# --------------------------------------------------------------------------------------------- snapshots


def test_a_snapshot_names_where_the_pass_stood(tmp_path: Path) -> None:
    scene = Scene(tmp_path, UNITS)
    scene.start()

    def check() -> None:
        if scene.cursor < 10:
            scene.cluster.at(scene.cluster.now() + 5, check)
            return
        raise DriverKilled

    scene.cluster.at(100, check)
    with pytest.raises(DriverKilled):
        scene.go_on()
    folder = RunFolder(str(tmp_path))
    snapshot, manifest = load_snapshot(folder, COVARIANCE), folder.manifest(SNAPSHOT, COVARIANCE)
    cursor = snapshot.cursor
    wanted = expected(cursor)
    assert cursor >= 10 and set(snapshot.keys) == {name for name in wanted if name[:2] in ("A:", "S:")}
    assert snapshot.counts[""] == wanted["counts A:l0"]["sequences"]
    for name, key in snapshot.keys.items():
        rows = snapshot.counts[name.partition(":")[2]]
        assert rows == wanted[f"counts {name}"]["rows"]
        mean = torch.from_numpy((folder.group(key).read("sum") / rows).astype(np.float32))
        assert unpack(mean, SIZES[name[:1]]).numpy().tobytes() == wanted[name]
    assert [tag["device"] for tag in snapshot.numerics] == ["simulated"]
    heads = {
        int(unit): folder.group(key).read(f"u{unit}")
        for key in snapshot.heads
        for unit in folder.group(key).attrs["units"]
    }
    assert sorted(heads) == list(range(cursor)) and all(np.array_equal(heads[unit], head(unit)) for unit in heads)
    assert folder.verify(manifest) == []
    # What it names is all that is kept of the pass, but for what was written after it.
    found = {key for key, _ in folder.files.walk("snapshots")}
    assert set(manifest.objects) <= found and len(found) <= 2.5 * len(manifest.objects)
    again = Scene(tmp_path, UNITS)
    again.start()
    again.go_on()
    assert again.said == [f"covariance: goes on after {cursor} of {UNITS} units"]
    assert min(again.begun) == cursor
    forget_snapshot(folder, COVARIANCE)
    assert load_snapshot(folder, COVARIANCE).cursor == 0


def test_snapshots_keep_to_their_share_of_the_time(tmp_path: Path) -> None:
    """By their measured cost under auto; none at all where they are far apart."""
    calls: Counter[str] = Counter()

    def seconds(method: str, args: tuple[Any, ...]) -> float:
        calls[method] += 1
        return {"snapshot": 4.0}.get(method, 0.0)

    scene = Scene(tmp_path / "auto", 400, snapshot="auto", seconds=seconds)
    assert scene.bits(scene.run()) == expected(400)
    taken = calls["snapshot"] / 2
    assert taken >= 5 and abs(taken * 4.0 / scene.cluster.now() - SHARE) <= 0.3 * SHARE
    calls.clear()
    rare = Scene(tmp_path / "rare", UNITS, snapshot=1e9, seconds=seconds)
    rare.run()
    assert calls["snapshot"] == 0 and rare.cursor == 0


def test_where_shards_die_snapshots_come_sooner() -> None:
    clock = [0.0]
    pace = Pace("auto", 0, lambda: clock[0])

    def interval() -> float:
        begun = clock[0]
        while not pace.due:
            clock[0] += 0.5
        with pace.measured():
            clock[0] += 2.0
        return clock[0] - begun - 2.0

    interval()
    assert interval() == 2.0 / SHARE
    for _ in range(20):
        pace.died()
    before = clock[0]
    assert abs(interval() - math.sqrt(2 * 2.0 * before / 20)) <= 1.0
    fixed = Pace(50, 0, lambda: clock[0])
    fixed.died()
    begun = clock[0]
    while not fixed.due:
        clock[0] += 0.5
    assert clock[0] - begun == 50


# ------------------------------------------------------------------------------------------- any kills


class DyingFolder(RunFolder):
    """A run folder whose driver dies before or after its n-th change."""

    def __init__(self, path: str, change: int, after: bool) -> None:
        super().__init__(path)
        self._left, self._after = change, after

    def _counted(self, act: Callable[[], Any]) -> Any:
        self._left -= 1
        if self._left == 0 and not self._after:
            raise DriverKilled
        result = act()
        if self._left == 0:
            raise DriverKilled
        return result

    def commit(self, *args: Any, **meta: Any) -> Any:
        return self._counted(lambda: super(DyingFolder, self).commit(*args, **meta))

    def write(self, *args: Any, **more: Any) -> Any:
        return self._counted(lambda: super(DyingFolder, self).write(*args, **more))

    def delete(self, *args: Any) -> Any:
        return self._counted(lambda: super(DyingFolder, self).delete(*args))


def _when(kinds: list[str], most: int) -> Any:
    kill = st.tuples(st.sampled_from(kinds), st.floats(0, 700), st.integers(0, 11))
    return st.lists(kill, max_size=most)


LIVES = st.lists(
    st.tuples(
        _when(["crash"], 1),  # four of one unit's workers, and it would be quarantined
        _when(["node", "shard", "join", "driver"], 5),
        st.none() | st.tuples(st.integers(1, 40), st.booleans()),
        st.integers(0, 1),
    ),
    max_size=3,
)


class Fatal:
    """Carries out kills in one life of the driver, and counts what each may cost."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.allowed = scene, 0

    def plan(self, kind: str, at: float, place: int) -> None:
        self.scene.cluster.at(at, lambda: getattr(self, kind)(place))

    def crash(self, place: int) -> None:
        workers = self.scene.cluster.workers
        if workers:
            self.allowed += 1  # the unit that ran
            self.scene.cluster.crash(workers[place % len(workers)])

    def node(self, place: int) -> None:
        node = self.scene.node(place)
        if node is not None:
            # With a shard: what came since the snapshot. Without: what is not yet added.
            cursor = self.scene.cursor if self.scene.spread else min(self.scene.sums._cursors.values(), default=0)
            self.allowed += self.scene.begun_from(max(0, cursor))
            self.scene.cluster.lose(node)
            self.scene.cluster.at(self.scene.cluster.now() + 40, lambda: self.join(2))

    def shard(self, place: int) -> None:
        self.since_snapshot()
        self.scene.backend.crash_shard(place % self.scene.shards)

    def join(self, place: int) -> None:
        self.scene.cluster.join(1 + place % 2)

    def driver(self, place: int) -> None:
        raise DriverKilled

    def since_snapshot(self) -> None:
        self.allowed += self.scene.begun_from(self.scene.cursor)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lives=LIVES, snapshot=st.sampled_from([0.0, 150.0, "auto"]), spread=st.booleans(), seed=st.integers(0, 99))
def test_any_sequence_of_kills_gives_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, lives: list[Any], snapshot: float | str, spread: bool, seed: int
) -> None:
    path = tmp_path_factory.mktemp("run")
    begun: Counter[int] = Counter()
    allowed = 0
    for crashes, kills, change, shards in [*lives, ([], [], None, 1)]:
        scene = Scene(
            path, UNITS, shards=1 + shards, snapshot=snapshot, spread=spread, seed=seed, begun=begun,
            folder=RunFolder(str(path)) if change is None else DyingFolder(str(path), *change),
        )  # fmt: skip
        scene.start()
        fatal = Fatal(scene)
        for kill in (*crashes, *kills):
            fatal.plan(*kill)
        try:
            finished = scene.go_on()
        except DriverKilled:
            fatal.since_snapshot()
            allowed += fatal.allowed
            continue
        allowed += fatal.allowed
        assert scene.bits(finished) == expected(UNITS)
        if change is None and not crashes and not kills:
            break
        # As if it had been killed before it could commit what it wrote.
        allowed += scene.begun_from(scene.cursor)
    assert scene.again <= allowed
