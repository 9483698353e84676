"""Nodes that join a run and leave it, on a cluster of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.faults.cluster import cluster
from jobs.faults.driver import Driver
from jobs.faults.inputs import Work, write_config, write_inputs
from jobs.faults.verdict import differing, problems
from raylux.api import run
from raylux.config import Config

pytestmark = pytest.mark.cluster
# Enough units to see who computes them.
WORK = Work(documents=400, fitted=500, queries=16, layers=5, width=32)


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "progress.jsonl"
    data = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def until(driver: Driver, folder: Path, seen: Callable[[dict[str, Any]], bool]) -> None:
    """Wait for an event of a driver's run."""
    deadline = time.monotonic() + 120
    while not any(seen(event) for event in events(folder)):
        assert driver.code is None and time.monotonic() < deadline, driver.where()
        time.sleep(0.02)


@contextmanager
def paused(processes: list[psutil.Process]) -> Iterator[None]:
    """Processes that stand still meanwhile, so that a run that waits for them cannot end."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def unit_of(slot: int) -> Callable[[dict[str, Any]], bool]:
    return lambda event: event["event"] == "unit" and event.get("slot") == slot


def test_a_node_that_joins_is_used_and_one_that_leaves_is_let_go(tmp_path: Path) -> None:
    """One node at the start, a second from the first unit on, until it has computed something itself."""
    sections = write_inputs(tmp_path / "inputs", WORK)
    folder, usual = tmp_path / "run", tmp_path / "usual"
    run(Config.load(write_config(tmp_path / "usual.yaml", sections, usual, backend="local")))
    config = write_config(tmp_path / "run.yaml", sections, folder)
    with cluster(nodes=1) as there:
        driver = Driver(config, there.env, tmp_path / "log")
        driver.start()
        try:
            until(driver, folder, unit_of(0))
            # The first worker waits with a unit in hand: however fast the machine, there is work for the second.
            with paused(there.actors("GradientWorker")):
                there.add(1)
                until(driver, folder, unit_of(1))
                there.remove(1)
                until(driver, folder, lambda event: event.get("state") == "released")
            driver.wait(120)
        finally:
            driver.kill()
    assert driver.code == 0, driver.said()
    seen = events(folder)
    workers = [(event["slot"], event["state"]) for event in seen if event["event"] == "worker"]
    assert workers[:3] == [(0, "started"), (1, "started"), (1, "died")] and (1, "released") in workers
    gone = next(place for place, event in enumerate(seen) if event.get("state") == "released")
    assert any(unit_of(0)(event) for event in seen[gone:])
    assert not any(unit_of(1)(event) for event in seen[gone:])
    assert differing(folder, usual) == []
    assert problems(folder) == []
