"""A run on a cluster that autoscales asks for its workers, and waits for them."""

from __future__ import annotations

from typing import Any

import pytest

from raylux.engine import session
from raylux.engine.capacity import GIB, Demand
from raylux.errors import UserError

DEMAND = Demand(workers=3, shards="auto", threads=2, gpu=True, worker_bytes=GIB, shards_bytes=3 * GIB)


class Autoscaler:
    """What Ray would be asked: the cluster has one more node at each look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_most: int) -> None:
        self.asked: list[list[dict[str, float]]] = []
        self.nodes, self.at_most = 0, at_most
        monkeypatch.setenv(session.GROW, "1")
        monkeypatch.setattr(session, "_LOOK_EVERY", 0.0)
        monkeypatch.setattr(session.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(session.ray, "cluster_resources", self.resources)
        monkeypatch.setattr(session, "request_resources", lambda bundles: self.asked.append(bundles))
        monkeypatch.setattr(session.atexit, "register", lambda function, *args: function(*args))

    def resources(self) -> dict[str, Any]:
        self.nodes = min(self.at_most, self.nodes + 1)
        return {"CPU": 2.0 * self.nodes, "GPU": 1.0 * self.nodes, "memory": 4.0 * GIB * self.nodes}


def test_what_is_asked_for_comes_and_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    autoscaler = Autoscaler(monkeypatch, at_most=5)
    assert session.size(DEMAND, patience=60.0) == (3, 3)
    assert autoscaler.nodes == 3
    # Each worker with its part of the shards; at the end of the process nothing is asked for.
    assert autoscaler.asked == [[{"CPU": 2.0, "memory": 2.0 * GIB, "GPU": 1.0}] * 3, []]


def test_what_does_not_come_is_refused_in_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    Autoscaler(monkeypatch, at_most=2)
    with pytest.raises(UserError, match=r"3 workers need 3, it has [12].*asked of the autoscaler"):
        session.size(DEMAND, patience=0.0)


@pytest.mark.parametrize("asked_to", ["", "0"])
def test_a_cluster_is_not_asked_to_grow_unless_the_run_says_so(monkeypatch: pytest.MonkeyPatch, asked_to: str) -> None:
    autoscaler = Autoscaler(monkeypatch, at_most=5)
    monkeypatch.setenv(session.GROW, asked_to)
    with pytest.raises(UserError, match="3 workers need 3, it has 1"):
        session.size(DEMAND, patience=60.0)
    assert autoscaler.asked == []
