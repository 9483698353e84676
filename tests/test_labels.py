"""Workers and shards by the labels of nodes: what fits, and what is refused with demand and supply."""

from __future__ import annotations

from typing import Any

import pytest

from raylux.config import Config
from raylux.engine.capacity import GIB, Demand, Node, fit_nodes
from raylux.errors import UserError
from raylux.frozen import stage_of

FAST, SLOW = {"tier": "fast", "spot": "no"}, {"tier": "slow"}


def _node(cpus: float, memory: float, labels: dict[str, str]) -> Node:
    return Node({"CPU": cpus, "memory": memory * GIB}, labels)


NODES = [_node(8, 16, FAST), _node(8, 16, FAST), _node(4, 64, SLOW), _node(1, 4, {})]


def _demand(**changes: Any) -> Demand:
    usual = {"workers": "auto", "shards": "auto", "threads": 1, "gpu": False, "worker_bytes": GIB}
    return Demand(**{**usual, "shards_bytes": 8 * GIB, **changes})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, (21, 21)),
        ({"worker_labels": FAST}, (16, 16)),
        ({"worker_labels": {"tier": "slow"}}, (4, 4)),
        ({"worker_labels": FAST, "shard_labels": SLOW, "shards": 2}, (16, 2)),
        ({"worker_labels": FAST, "shard_labels": SLOW, "worker_bytes": 4 * GIB}, (8, 8)),
        # On the same nodes they share the memory.
        ({"worker_labels": FAST, "shard_labels": FAST, "worker_bytes": 4 * GIB}, (6, 6)),
        ({"shard_labels": SLOW, "workers": 20}, (20, 20)),
    ],
)
def test_what_fits_the_nodes_with_the_labels(changes: dict[str, Any], found: tuple[int, int]) -> None:
    assert fit_nodes(_demand(**changes), NODES) == found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"worker_labels": {"tier": "none"}}, r"labels tier=none.*4 nodes, they have tier=fast, tier=slow"),
        ({"shard_labels": {"disk": "ssd"}}, r"engine\.shard_labels asks for.*none has a label of that name"),
        ({"worker_labels": {"tier": "slow", "spot": "no"}}, r"no node has the labels tier=slow, spot=no"),
        ({"worker_labels": FAST, "workers": 17}, r"nodes with tier=fast, spot=no: 17 workers need 17, they have 16"),
        ({"shard_labels": {"tier": "fast"}, "shards_bytes": 40 * GIB}, r"need 40\.0 GiB, the nodes.* have 32\.0"),
        ({"worker_labels": FAST, "shard_labels": FAST, "workers": 7, "worker_bytes": 4 * GIB}, r"need 36\.0 GiB"),
    ],
)  # fmt: skip
def test_what_does_not_is_refused_with_demand_and_supply(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        fit_nodes(_demand(**changes), NODES)


def _config(*overrides: str) -> Config:
    data = {"run": {"folder": "r"}, "model": {"path": "m"}, "corpus": {"path": "c"}, "queries": {"path": "q"}}
    return Config.parse(data, overrides)


def test_labels_are_exact_values_and_change_no_bits() -> None:
    labels = _config("engine.worker_labels={raylux/role: worker, ray.io/market-type: on-demand}").engine.worker_labels
    assert labels == {"raylux/role": "worker", "ray.io/market-type": "on-demand"}
    assert stage_of("engine.worker_labels") is None and stage_of("engine.shard_labels") is None
    for value in ("{tier: '!fast'}", "{tier: in(a,b)}", "{tier: true}", "{'': x}", "{tier: ''}", "fast"):
        with pytest.raises(UserError, match=r"engine\.worker_labels"):
            _config(f"engine.worker_labels={value}")
