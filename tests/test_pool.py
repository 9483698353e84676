"""The pool of workers on a simulated cluster: who is blamed for a death, what runs again, and who is waited for."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from raylux.engine.pool import DEATHS, STARTS, WINDOW
from raylux.engine.simulate import Behaviour, Fate, SimulatedCluster, Worker
from raylux.engine.simulate_backend import ShardBehaviour, SimulatedBackend
from raylux.engine.transport import WorkerDied
from raylux.engine.work import Job, Result, results
from raylux.errors import RayluxError


class Log:
    """What ran where, and what the pool told."""

    def __init__(self) -> None:
        self.runs: Counter[Any] = Counter()
        self.events: list[dict[str, Any]] = []

    def notify(self, kind: str, **facts: Any) -> None:
        self.events.append({"event": kind, **facts})

    def workers(self, state: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "worker" and event["state"] == state]


class Scene:
    """A cluster whose calls answer with their argument, and what happens on it."""

    def __init__(
        self,
        places: tuple[int, ...],
        fate: Callable[[Any, int], Fate | None] = lambda unit, run: None,
        workers: int | None = None,
        elastic: bool = True,
        timeout: float = 600.0,
        service: Callable[..., float] = lambda draw, method, args: 60.0,
        startup: float = 90.0,
        start_fate: Fate | None = None,
    ) -> None:
        self.log = Log()

        def fated(method: str, args: tuple[Any, ...]) -> Fate | None:
            if method == "prepare":
                return start_fate
            self.log.runs[args[0]] += 1
            return fate(args[0], self.log.runs[args[0]])

        behaviour = Behaviour(service, lambda draw: startup, lambda method, args: (args[0],), fated)
        self.cluster = SimulatedCluster(places, behaviour, elastic=elastic)
        shard = ShardBehaviour(lambda number: None)
        count = workers if workers is not None else sum(places)
        self.backend = SimulatedBackend(self.cluster, count, 0, shard, timeout, self.log.notify)

    def run(self, units: int, ordered: bool = False) -> list[Result]:
        jobs = (Job(f"u{unit}", (unit,), unit) for unit in range(units))
        return list(results(self.backend, "work", jobs, ordered=ordered))

    def busy(self) -> Worker:
        """A worker with a unit that runs and one that waits."""
        return next(worker for worker in self.cluster.workers if len(worker.calls) == WINDOW)


def values(found: list[Result]) -> list[Any]:
    return sorted(result.value for result in found)


# ------------------------------------------------------------------------------------------- suspects


def test_only_the_unit_that_ran_is_a_suspect() -> None:
    scene = Scene((2,), service=lambda draw, method, args: 6.0)
    died: list[list[Any]] = []

    def crash() -> None:
        worker = scene.busy()
        died.append([call.args[0] for call in worker.calls])
        scene.cluster.crash(worker)

    scene.cluster.at(100, crash)
    assert values(scene.run(12)) == list(range(12))
    (running, queued) = died[0]
    (death,) = scene.log.workers("died")
    assert death["unit"] == f"u{running}" and death["cause"] == "process"
    assert scene.log.runs == {**dict.fromkeys(range(12), 1), running: 2}, "what waited ran once, elsewhere"
    assert queued != running


@pytest.mark.parametrize("cause", ["node", "process"])
def test_a_unit_is_no_suspect_because_its_node_goes(cause: str) -> None:
    """A node that goes may take the same unit along any number of times; a process may not."""
    scene = Scene((1, 1), workers=1)
    again: list[Any] = []

    def end() -> None:
        worker = next((w for w in scene.cluster.workers if w.calls and w.calls[0].args == (0,)), None)
        if worker is not None and len(again) < 12:
            again.append(worker)
            assert worker.node is not None
            if cause == "node":
                scene.cluster.lose(worker.node)
                scene.cluster.join(1)
            else:
                scene.cluster.crash(worker)
        scene.cluster.at(scene.cluster.now() + 7, end)

    scene.cluster.at(0, end)
    found = {result.job.item: result for result in scene.run(3)}
    assert found[1].value == 1 and found[2].value == 2
    if cause == "node":
        assert len(again) == 12 and found[0].failure is None and found[0].value == 0
    else:
        assert len(again) == 1 + DEATHS and found[0].failure is not None


def test_a_suspect_runs_alone_in_a_fresh_worker() -> None:
    """Beside nothing, and behind nothing: the process in which it dies has done nothing else."""
    company: list[tuple[int, int]] = []

    def fate(unit: Any, run: int) -> Fate | None:
        if unit == 3 and run > 1:
            (worker,) = [worker for worker in scene.cluster.workers if worker.calls and worker.calls[0].args == (3,)]
            company.append((len(worker.calls), worker.number))
        return "process" if unit == 3 else None

    scene = Scene((3,), fate)
    found = {result.job.item: result for result in scene.run(30)}
    assert len({number for _, number in company}) == DEATHS == len(company), "a process for each attempt"
    assert {count for count, _ in company} == {1}, "another unit waits behind the suspect"
    failure = found.pop(3).failure
    assert failure is not None and (failure.deaths, failure.reason) == (DEATHS + 1, "its process ended")
    assert values(list(found.values())) == [unit for unit in range(30) if unit != 3], "the run goes on"
    assert scene.log.runs == {**dict.fromkeys(range(30), 1), 3: DEATHS + 1}


def test_a_suspect_that_then_succeeds_counts_once() -> None:
    scene = Scene((2,), lambda unit, run: "memory" if unit in (1, 2) and run <= DEATHS else None)
    found = scene.run(8)
    assert values(found) == list(range(8)) and len(found) == 8 and not any(result.failure for result in found)


def test_suspects_do_not_wait_for_a_worker_that_finds_no_place() -> None:
    """The number of workers is fixed, a node is gone for good: the workers that are left judge the suspect."""
    scene = Scene((1, 1), elastic=False)

    def crash() -> None:
        worker = scene.cluster.workers[0]
        assert worker.node is not None and worker.calls
        scene.cluster.crash(worker)
        scene.cluster.lose(worker.node)

    scene.cluster.at(170, crash)
    assert values(scene.run(9)) == list(range(9))
    assert len(scene.log.workers("died")) == 1


def test_what_is_left_over_from_an_earlier_stretch_blames_nobody() -> None:
    """A stretch ended early leaves calls behind; a death in one of them is not the next job's fault."""
    scene = Scene((2,), service=lambda draw, method, args: 60.0 if args[0] == "old 1" else 6.0)
    with scene.backend.open("work") as work:
        for unit in ("old 0", "old 1", "old 2"):
            work.submit(Job(unit, (unit,), unit))
        first = work.next()
        assert first is not None and first.value == "old 0"
    (left,) = [worker for worker in scene.cluster.workers if worker.calls]
    assert left.calls[0].args == ("old 1",)
    scene.cluster.at(scene.cluster.now() + 10, lambda: scene.cluster.crash(left))
    assert values(scene.run(9)) == list(range(9))
    (death,) = scene.log.workers("died")
    assert death["unit"] is None
    assert scene.log.runs["old 2"] == 0, "what was forgotten is not sent again"


# ------------------------------------------------------------------------------- hangs and beginnings


def test_a_unit_that_hangs_is_moved_to_another_worker() -> None:
    scene = Scene((2,), lambda unit, run: "hang" if unit == 5 and run == 1 else None, timeout=200)
    assert values(scene.run(10)) == list(range(10))
    (death,) = scene.log.workers("died")
    assert (death["cause"], death["unit"]) == ("timeout", "u5") and "200 s" in death["reason"]


def test_a_unit_that_always_hangs_is_given_up() -> None:
    scene = Scene((2,), lambda unit, run: "hang" if unit == 5 else None, timeout=200)
    found = {result.job.item: result for result in scene.run(10)}
    failure = found[5].failure
    assert failure is not None and "did not finish in 200 s" in failure.reason and len(found) == 10


def test_where_nothing_ever_finished_the_limit_is_too_short() -> None:
    scene = Scene((2,), timeout=50, startup=20)
    with pytest.raises(RayluxError, match=r"took longer than 50 s in 4 workers.*raise engine\.timeout"):
        scene.run(10)


def test_no_worker_finds_a_place() -> None:
    scene = Scene((0,), workers=2, elastic=False)
    with pytest.raises(RayluxError) as caught:
        scene.run(10)
    assert "no gradient worker was ready after 600 s" in str(caught.value)
    assert "0 of 0 places are free" in str(caught.value) and "engine.timeout" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert 600 < scene.cluster.now() < 620


def test_workers_that_never_load_their_model() -> None:
    scene = Scene((2,), start_fate="process")
    with pytest.raises(RayluxError, match=f"{STARTS} gradient workers in a row died before their model was loaded"):
        scene.run(10)


def test_what_a_unit_raises_arrives() -> None:
    scene = Scene((2,))

    def compute(method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        raise RayluxError("corpus row 3 is damaged")

    scene.cluster.behaviour = Behaviour(compute=compute)
    with pytest.raises(RayluxError, match="corpus row 3 is damaged"):
        scene.run(10)


# ------------------------------------------------------------------------------------------- capacity


def test_workers_that_join_are_used() -> None:
    alone, joined = Scene((2,)), Scene((2,))
    joined.cluster.at(300, lambda: joined.cluster.join(6))
    assert values(alone.run(80)) == values(joined.run(80)) == list(range(80))
    assert len(joined.backend._pool or ()) == 8 and len(alone.backend._pool or ()) == 2
    assert joined.cluster.now() < 0.5 * alone.cluster.now()


def test_a_worker_that_joins_does_not_wait_for_others_to_finish() -> None:
    """Two units of an hour each: the second begins when its worker is there, not when the first is done."""
    scene = Scene((1,), service=lambda draw, method, args: 3600.0, timeout=10_000.0)
    scene.cluster.at(300, lambda: scene.cluster.join(1))
    assert values(scene.run(2)) == [0, 1]
    assert scene.cluster.now() < 300 + 2 * 90 + 3600


def test_workers_without_a_place_are_released() -> None:
    scene = Scene((2, 2, 2))

    def leave() -> None:
        for node in list(scene.cluster.nodes.values())[1:]:
            scene.cluster.lose(node)

    scene.cluster.at(200, leave)
    assert values(scene.run(60)) == list(range(60))
    assert len(scene.backend._pool or ()) == 2 and len(scene.log.workers("released")) == 4


def test_a_cluster_that_is_gone_for_a_while_is_waited_for() -> None:
    scene = Scene((2,))
    (node,) = scene.cluster.nodes.values()
    scene.cluster.at(200, lambda: scene.cluster.lose(node))
    scene.cluster.at(600, lambda: scene.cluster.join(3))
    assert values(scene.run(20)) == list(range(20))
    assert len(scene.backend._pool or ()) == 3


# ------------------------------------------------------------------------------------------- dispatch


def _steps(workers: int) -> float:
    """Steps of the interpreter that the pool takes for a result, once all workers are at work."""
    scene = Scene((workers,), service=lambda draw, method, args: draw.uniform(30, 90))
    steps = [0]

    def step(frame: FrameType, event: str, what: Any) -> Any:
        if "/engine/pool" not in frame.f_code.co_filename and "/engine/roster" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        steps[0] += event == "opcode"
        return step

    with scene.backend.open("work") as work:
        for unit in range(3 * workers):
            work.submit(Job(f"u{unit}", (unit,), unit))
        for _ in range(workers):
            work.next()
        pool = scene.backend._pool
        assert pool is not None
        pool._tended = math.inf  # what is looked at every few seconds does not count
        before = sys.gettrace()
        sys.settrace(step)
        try:
            for _ in range(100):
                work.next()
        finally:
            sys.settrace(before)
    return steps[0] / 100


def test_a_result_costs_the_same_among_many_workers() -> None:
    few, many = _steps(100), _steps(1000)
    assert few > 100, "nothing was counted"
    assert many <= 1.2 * few


def test_results_in_order_and_in_a_bounded_window() -> None:
    scene = Scene((4,), service=lambda draw, method, args: draw.uniform(1, 200))
    taken = ahead = 0

    def jobs() -> Any:
        nonlocal taken
        for unit in range(200):
            taken += 1
            yield Job(f"u{unit}", (unit,), unit)

    order = []
    for result in results(scene.backend, "work", jobs(), ordered=True):
        ahead = max(ahead, taken - len(order))
        order.append(result.value)
    assert order == list(range(200))
    assert ahead <= 4 * 4 + 1
    unordered = Scene((4,), service=lambda draw, method, args: draw.uniform(1, 200)).run(200)
    assert [result.value for result in unordered] != order and values(unordered) == order


def test_results_in_order_whatever_dies() -> None:
    scene = Scene((4,), lambda unit, run: "process" if unit % 7 == 0 and run == 1 else None)
    assert [result.value for result in scene.run(60, ordered=True)] == list(range(60))


@pytest.mark.parametrize(("seconds", "queued"), [(6.0, WINDOW), (60.0, 1)])
def test_calls_wait_behind_short_ones_only(seconds: float, queued: int) -> None:
    """What waits behind a long one would begin late, though all others may wait for it."""
    scene = Scene((2,), service=lambda draw, method, args: seconds)
    seen: list[int] = []
    look = lambda: seen.append(max(len(worker.calls) for worker in scene.cluster.workers))  # noqa: E731
    for at in range(100, 200, 7):
        scene.cluster.at(at, look)
    scene.run(60)
    assert max(seen) == queued


def test_all_workers_are_kept_busy() -> None:
    """Time is what the work takes, shared evenly, and the start."""
    scene = Scene((8,))
    scene.run(80)
    assert scene.cluster.now() <= 90 + 60 * (80 / 8 + 1)
    assert scene.cluster.seconds.working == 80 * 60 and scene.cluster.seconds.lost == 0
    assert scene.cluster.seconds.starting == 8 * 90


def test_the_cluster_tells_what_was_lost() -> None:
    """A worker that dies half-way through a unit has spent half a unit."""
    scene = Scene((1,))
    scene.cluster.at(90 + 60 + 30, lambda: scene.cluster.crash(scene.cluster.workers[0]))
    scene.run(4)
    seconds = scene.cluster.seconds
    assert (seconds.working, seconds.lost, seconds.starting) == (240, 30, 180)


def test_a_worker_that_is_gone_answers_at_once() -> None:
    scene = Scene((1,))
    worker = scene.cluster.start()
    scene.cluster.crash(worker, "memory")
    (ref,) = scene.cluster.call(worker, "work", (1,), 1)
    scene.cluster.watch(ref)
    assert scene.cluster.wait(10) == [ref]
    scene.cluster.unwatch(ref)
    assert scene.cluster.wait(10) == []
    with pytest.raises(WorkerDied) as caught:
        scene.cluster.get(ref)
    assert caught.value.cause == "memory"
