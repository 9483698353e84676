"""Independent tasks: the same values in process and over Ray, kept one by one, whatever dies on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylux.engine import tasks
from raylux.engine.progress import Reporter
from raylux.engine.tasks import run_tasks
from raylux.errors import RayluxError, UserError
from raylux.store import RunFolder

JOBS: dict[str, tuple[Any, ...]] = {f"job {place}": (place,) for place in (3, 0, 2, 1)}


def work(shared: dict[str, Any], place: int) -> np.ndarray:
    """A product, where ``shared`` says so only once: the first try of a job ends its process."""
    marks = shared.get("marks")
    if marks is not None and place in shared["deadly"]:
        tries = len(list(Path(marks).glob(f"{place}-*")))
        Path(marks, f"{place}-{tries}").touch()
        if tries < shared["deadly"][place]:
            os.kill(os.getpid(), signal.SIGKILL)
    if place == shared.get("refused"):
        raise UserError("the second is refused")
    draw = torch.rand(7, 5, generator=torch.Generator().manual_seed(place), dtype=torch.float64)
    found = (draw.T @ draw / 3).numpy()
    return np.where(found > 0.8, np.nan, found) if place == 2 else found[: place + 1]


def run(folder: Path, shared: dict[str, Any], backend: str = "local", jobs: Any = JOBS) -> dict[str, np.ndarray]:
    store = RunFolder(str(folder))
    return run_tasks(store, "work", work, shared, jobs, reporter=Reporter(store, quiet=True), backend=backend)


def test_in_process_and_over_ray_with_a_process_that_dies_the_values_are_the_same(
    ray_cluster: dict[str, Any], tmp_path: Path
) -> None:
    found = run(tmp_path / "local", {})
    assert list(found) == list(JOBS) and [x.shape for x in found.values()] == [(4, 5), (1, 5), (5, 5), (2, 5)]
    assert np.isnan(found["job 2"]).any()
    (tmp_path / "marks").mkdir()
    over = run(tmp_path / "ray", {"marks": str(tmp_path / "marks"), "deadly": {0: 1}}, "ray")
    assert len(list((tmp_path / "marks").iterdir())) == 2, "it was tried twice"
    assert list(over) == list(found)
    for name, values in found.items():
        assert np.array_equal(over[name], values, equal_nan=True) and values.dtype == over[name].dtype == np.float64


def test_what_is_done_is_kept_when_one_fails(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="refused"):
        run(tmp_path, {"refused": 2})
    store = RunFolder(str(tmp_path))
    assert store.committed("work") == {"job 3", "job 0"}
    before = {name: store.files.stamps("ledger/work")[f"job%20{name}.json"] for name in "03"}
    assert set(run(tmp_path, {})) == set(JOBS)
    assert {name: store.files.stamps("ledger/work")[f"job%20{name}.json"] for name in "03"} == before


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    found = run(tmp_path, {})
    file = tmp_path / "ledger" / "work" / "job%201.json"
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b"0.", b"1.", 1))
    again = run(tmp_path, {})
    assert file.read_bytes() == raw
    assert all(np.array_equal(again[name], values, equal_nan=True) for name, values in found.items())


def test_a_task_that_raises_or_always_dies_ends_in_a_line(
    ray_cluster: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_TRIES", 1)
    with pytest.raises(UserError, match="refused"):
        run(tmp_path / "one", {"refused": 2}, "ray")
    (tmp_path / "marks").mkdir()
    with pytest.raises(RayluxError, match="'job 1' died each of 2 times"):
        run(tmp_path / "two", {"marks": str(tmp_path / "marks"), "deadly": {1: 99}}, "ray", {"job 1": (1,)})
