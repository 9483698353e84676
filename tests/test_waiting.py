"""Jobs that a certain worker does best: it gets them, nobody idles for their sake, and no death strands them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from raylux.engine.stages.units import _units_by_keeper
from raylux.engine.waiting import Waiting
from raylux.engine.work import Job, Result, results
from tests.test_pool import Scene, values

UNITS = 48


def again(scene: Scene, near: dict[int, int]) -> list[Result]:
    jobs = (Job(f"u{unit}", (unit,), unit, near.get(unit)) for unit in range(UNITS))
    return list(results(scene.backend, "again", jobs))


@pytest.mark.parametrize("seconds", [2.0, 60.0], ids=["with one call waiting", "one call at a time"])
def test_a_unit_goes_to_who_did_it_before(seconds: float) -> None:
    scene = Scene((2, 2), service=lambda draw, method, args: seconds * draw.uniform(0.8, 1.2))
    before = {result.job.item: result.worker for result in scene.run(UNITS)}
    assert len(set(before.values())) == 4
    found = again(scene, before)
    assert values(found) == list(range(UNITS))
    strayed = [result for result in found if result.worker != before[result.job.item]]
    assert len(strayed) <= UNITS // 8, "only where a worker would idle"


def test_nobody_idles_while_jobs_wait_for_somebody_else() -> None:
    scene = Scene((4,))
    worker = scene.run(8)[0].worker
    began = scene.cluster.now()
    found = again(scene, dict.fromkeys(range(UNITS), worker))
    assert values(found) == list(range(UNITS))
    shares = Counter(result.worker for result in found)
    assert len(shares) == 4 and max(shares.values()) <= UNITS // 4 + 2
    assert scene.cluster.now() - began <= 60.0 * (UNITS / 4 + 2)


def test_jobs_of_a_worker_that_dies_are_anyones() -> None:
    scene = Scene((2,))
    before = {result.job.item: result.worker for result in scene.run(UNITS)}
    scene.cluster.at(scene.cluster.now() + 200, lambda: scene.cluster.crash(scene.cluster.workers[0]))
    assert values(again(scene, before)) == list(range(UNITS))
    assert values(again(scene, dict.fromkeys(range(UNITS), 10000))) == list(range(UNITS)), "of nobody known"


def test_waiting_keeps_the_order_within_each_queue() -> None:
    waiting = Waiting()
    jobs = [Job(str(place), ()) for place in range(6)]
    for place, job in enumerate(jobs):
        waiting.put(job, None if place % 3 == 0 else 7)  # 0, 3 are anyone's; 1, 2, 4, 5 are 7's
    assert (len(waiting), waiting.for_anyone) == (6, 2)
    assert waiting.own(7) is jobs[1] and waiting.own(8) is None
    assert waiting.others() is jobs[5], "what its own worker would come to last"
    waiting.put_back([jobs[1], jobs[5]])
    assert [waiting.any() for _ in range(2)] == [jobs[1], jobs[5]]
    waiting.release(7)
    assert [waiting.any() for _ in range(5)] == [jobs[0], jobs[3], jobs[2], jobs[4], None]
    assert len(waiting) == 0 and waiting.others() is None


def test_what_a_worker_keeps_is_cut_into_units_of_its_own() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(10, 100, 400)
    keepers = draw.integers(-1, 3, 400)
    units = np.arange(400) // 16
    found, near = _units_by_keeper(units, lengths, keepers, 16)
    assert (found[keepers < 0] == units[keepers < 0]).all(), "what nobody keeps stays where it was"
    for unit, worker in near.items():
        assert set(keepers[found == unit]) == {worker}
    assert set(near) == set(found[keepers >= 0].tolist()) and not set(near) & set(units.tolist())
    tokens = [lengths[found == unit].sum() for unit in near]
    assert max(tokens) <= 16 * lengths.mean() * 1.3, "as large as other units"
