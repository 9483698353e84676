"""A run on a cluster that autoscales asks for its workers, and waits for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from raylux.engine import session
from raylux.engine.capacity import GIB, Demand
from raylux.errors import UserError
from tests.heads import Head, like_a_clone
from tests.small import contents, differing, make_inputs

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
    # At the end of the process nothing is asked for.
    assert autoscaler.asked == [[{"CPU": 2.0, "GPU": 1.0}] * 3, []]


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


@pytest.mark.cluster
def test_a_real_autoscaler_starts_the_nodes_that_a_run_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's autoscaler with its provider of nodes on this machine, from a head that runs no workers."""
    inputs = make_inputs(tmp_path / "inputs", "gpt2")
    usual = contents(inputs.run(tmp_path / "usual").folder)
    (tmp_path / "clone").mkdir()
    like_a_clone(tmp_path / "clone", inputs)
    head = Head(tmp_path / "head", tmp_path / "clone", cpus=0)
    config = {
        "cluster_name": "raylux-grow",
        "max_workers": 2,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"{ray.util.get_node_ip_address()}:{head.gcs}",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": 200 << 20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{f"{key}_commands": [] for key in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{key}_start_ray_commands": [] for key in ("head", "worker")},
        "cluster_synced_files": [],
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": 10,
    }
    (tmp_path / "autoscaling.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    monkeypatch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
    activate, submit = "source .venv/bin/activate", "raylux submit config.yaml run.folder=$PWD/run engine.workers=2"
    with head.ended_by(activate, "cluster/local.sh stop"):
        started = head.sh(activate, f"cluster/local.sh start --autoscaling-config={tmp_path}/autoscaling.yaml")
        assert started.returncode == 0, started.stderr
        refused = head.sh(activate, 'eval "$(cluster/local.sh env)"', submit)
        assert refused.returncode == 2 and "2 workers need 2, it has 0" in refused.stderr
        done = head.sh(activate, 'eval "$(cluster/local.sh env)"', f"{submit} --grow")
        assert done.returncode == 0, done.stdout + done.stderr
    assert differing(contents(tmp_path / "clone" / "run"), usual) == []
