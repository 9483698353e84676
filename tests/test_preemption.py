"""Preemption on the simulator, in short: bits are equal and what is done again is bounded, in virtual time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.preemption import Outcome, Settings, extra, simulate
from raylux.engine.simulate import Behaviour, SimulatedCluster
from raylux.engine.simulate_backend import ShardBehaviour, SimulatedBackend
from raylux.engine.work import Job, results

SHORT = Settings(workers=16, hours=2.0)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return simulate(replace(SHORT, share=0.0), tmp_path_factory.mktemp("calm"))


def test_undisturbed_every_unit_runs_once(calm: Outcome) -> None:
    assert calm.begun == SHORT.units == calm.sequences and calm.preempted == 0
    assert calm.seconds.lost == 0 and calm.hours <= 1.1 * SHORT.hours


@pytest.mark.parametrize("seed", [0, 1])
def test_half_of_the_workers_preempted_an_hour_cost_at_most_a_twentieth(
    calm: Outcome, tmp_path: Path, seed: int
) -> None:
    found = simulate(replace(SHORT, seed=seed), tmp_path)
    assert (found.bits, found.sequences) == (calm.bits, SHORT.units)
    assert found.preempted >= 14
    units, starts, total = extra(calm, found)
    assert units > 0 and starts > 0 and total <= 0.05
    # What ran is begun again, and nothing that was finished.
    assert found.begun - SHORT.units <= found.preempted
    assert found.hours <= 1.25 * calm.hours


def test_shards_that_are_preempted_too_leave_the_bits_alone(calm: Outcome, tmp_path: Path) -> None:
    found = simulate(replace(SHORT, spread=True), tmp_path)
    assert found.shard_deaths >= 2 and found.bits == calm.bits
    assert extra(calm, found)[2] <= 0.5


def test_ten_thousand_workers_are_simulated_in_few_turns() -> None:
    """What a driver does in a turn grows with the workers; the turns, with time and not with results."""
    workers = 10_000
    turns = 0

    class Counted(SimulatedCluster):
        def wait(self, timeout):  # type: ignore[no-untyped-def]
            nonlocal turns
            turns += 1
            return super().wait(timeout)

    behaviour = Behaviour(service=lambda draw, method, args: draw.uniform(30, 90), tick=1.0)
    cluster = Counted([100] * (workers // 100), behaviour)
    backend = SimulatedBackend(cluster, workers, 0, ShardBehaviour(lambda shard: None))
    jobs = (Job(str(unit), (unit,)) for unit in range(2 * workers))
    assert sum(1 for _ in results(backend, "work", jobs)) == 2 * workers
    assert turns <= cluster.now() + 10 and cluster.seconds.working >= 2 * workers * 50
