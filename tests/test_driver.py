"""What is measured of the driver, in short: the same passes through real actors that sleep, and on virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.driver import Settings, simulate
from jobs.driving.passes import LAYERS, SHARDS, shard_specs, work
from jobs.driving.sleepers import Sleeper, SleeperSpec
from raylux.engine.progress import Reporter
from raylux.engine.simulate import Behaviour, SimulatedCluster
from raylux.ledger import MOMENTS, SCORE
from raylux.report.profile import parsed, stage_times
from raylux.store import RunFolder

UNITS = 40


def test_both_passes_through_actors_that_sleep(ray_cluster: dict[str, Any], tmp_path: Path) -> None:
    """Each unit counts once, in the ledger or in the sums, whoever the workers are."""
    from raylux.engine.remote import RayBackend

    folder = RunFolder(str(tmp_path))
    reporter = Reporter(folder, quiet=True)
    spec: Any = SleeperSpec(0.01)
    backend = RayBackend(
        spec, shard_specs(str(tmp_path)), 2, 60.0, False, lambda: None, reporter.event, lambda facts: None, Sleeper
    )
    try:
        for kind in ("score", "sums"):
            work(kind, backend, folder, reporter, UNITS, lambda: 0.0)
    finally:
        backend.close()
    assert folder.committed(SCORE) == {f"u{unit:06d}" for unit in range(UNITS)}
    score, sums = stage_times(parsed(folder.files.get("progress.jsonl")))
    assert (score.units, sums.units) == (UNITS, UNITS)
    assert {"wait", "commit"} <= set(score.driver.kinds) and {"wait", "ask"} <= set(sums.driver.kinds)
    assert "add" in sums.work.kinds


@pytest.mark.parametrize("kind", ["score", "sums"])
def test_a_simulated_pass_is_finished_and_its_time_accounted_for(kind: str) -> None:
    settings = Settings(kind, 32, 20, failures=0.03)
    found = simulate(settings)
    assert settings.units < found.begun <= 1.1 * settings.units, "some were begun again"
    assert 0 < found.shares["before the end"] < found.shares["idle"] < 1 and found.shares["lost"] > 0
    assert found.hours * 3600 > settings.each * 0.9 * settings.unit


def test_what_the_driver_takes_is_time_for_everybody() -> None:
    hands = [0.0]
    cluster = SimulatedCluster([1], Behaviour(), driver=lambda: hands[0])
    hands[0] = 7.0
    assert cluster.wait(2.0) == [] and cluster.now() == 9.0
    assert cluster.wait(2.0) == [] and cluster.now() == 11.0


def test_a_driver_that_takes_long_leaves_workers_idle() -> None:
    quick, slow = (simulate(Settings("score", 32, 20, failures=0.0, call=call)) for call in (0.0, 0.5))
    assert slow.shares["before the end"] > quick.shares["before the end"] + 0.2


@pytest.mark.parametrize("unit", [5.0, 15.0], ids=["a call waits behind each", "each by itself"])
def test_no_pass_is_quicker_than_its_driver(unit: float) -> None:
    """What each call takes of the driver is counted whether the worker begins at once or has another call before it."""
    settings = Settings("score", 32, 20, unit=unit, failures=0.0, call=0.5)
    assert simulate(settings).hours * 3600 >= settings.units * settings.call


def test_the_sums_of_a_simulated_pass_are_those_of_its_units(tmp_path: Path) -> None:
    """The parts of unit u are u everywhere, so Λ is the mean of all u."""
    from jobs.driving.passes import part
    from raylux.engine.shard import FactorShard
    from raylux.engine.simulate_backend import ShardBehaviour, SimulatedBackend

    folder = RunFolder(str(tmp_path))
    behaviour = Behaviour(compute=lambda method, args: (None, *(part(args[0], place) for place in range(SHARDS))))
    shard = ShardBehaviour(lambda number: FactorShard(shard_specs(str(tmp_path))[number]))
    backend = SimulatedBackend(SimulatedCluster([4], behaviour), 4, SHARDS, shard)
    found: dict[str, np.ndarray] = {}
    write = FactorShard.write_moments

    def kept(self: FactorShard) -> Any:
        found.update({name: total / self._counts[""] for name, total in self._sums.items()})
        return write(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FactorShard, "write_moments", kept)
        work("sums", backend, folder, Reporter(folder, quiet=True), UNITS, lambda: 0.0)
    assert set(found) == {layer.name for layer in LAYERS}
    assert all((value == (UNITS - 1) / 2).all() for value in found.values())
    assert MOMENTS not in folder.stages(), "a pass commits nothing by itself"
