"""Runs on clusters of their own: several nodes, and Ctrl-C in a run that started Ray itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from tests.conftest import ray_processes
from tests.small import CUT, Inputs, contents, differing, make_inputs

pytestmark = pytest.mark.cluster
WHAT = ("query.max_error=0", "prefilter.kind=idf", "prefilter.top=9")

# A driver of its own: the test session's process joins at most one cluster, that of ``ray_cluster``.
DRIVER = """
import json, sys
import ray
from raylux.api import STAGES, run_stages
from raylux.config import Config
from raylux.errors import UserError

sections, runs = json.load(sys.stdin)
ray.init(address="auto", log_to_driver=False)
roles = {node["NodeID"]: node["Labels"].get("raylux/role", "") for node in ray.nodes() if node["Alive"]}
seen = set()
for overrides in runs:
    try:
        run_stages(Config.parse(sections, overrides), STAGES[:-1], quiet=True)
    except UserError as error:
        print(json.dumps(str(error)))
        continue
    actors = [actor for name, actor in ray._private.state.actors().items() if name not in seen]
    seen |= set(ray._private.state.actors())
    print(json.dumps([[actor["ActorClassName"], roles[actor["Address"]["NodeID"]]] for actor in actors]))
ray.shutdown()
"""
HEAD = """
import sys, threading
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200 << 20})
for role, cpus in (("worker", 2), ("shard", 1)):
    cluster.add_node(num_cpus=cpus, object_store_memory=200 << 20, labels={"raylux/role": role})
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "gpt2")


@pytest.fixture(scope="module")
def usual(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """In process."""
    return contents(inputs.run(tmp_path_factory.mktemp("usual") / "run", *WHAT).folder)


@pytest.fixture
def cluster() -> Iterator[str]:
    """A head, a node labelled for workers and one for shards, in a process of their own; yields the address."""
    with subprocess.Popen(
        [sys.executable, "-c", HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = next((line.strip() for line in process.stdout if ":" in line), "")
            assert address, process.stderr.read() if process.stderr else ""
            yield address
        finally:
            process.communicate(timeout=60)  # the end of its input asks it to shut down


def test_three_nodes_give_the_bits_of_one_process_with_and_without_labels(
    inputs: Inputs, usual: dict[str, np.ndarray], cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths relative to the driver's working directory, which is not that of the nodes.

    By labels workers go to one node, shards to another; what no node has is refused with what there is.
    """
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    monkeypatch.chdir(tmp_path)
    sections = inputs.sections("run", corpus={"path": os.path.relpath(inputs.corpus)})
    sections["model"]["path"], sections["queries"]["path"] = map(os.path.relpath, (inputs.model, inputs.queries))
    usually = [*CUT, *WHAT, "engine.backend=ray"]
    labels = ["engine.worker_labels={raylux/role: worker}", "engine.shard_labels={raylux/role: shard}"]
    runs = [
        [*usually, "engine.workers=4", "engine.shards=3"],
        [*usually, *labels, "run.folder=labelled", "engine.workers=2", "engine.shards=2"],
        [*usually, "run.folder=refused", "engine.worker_labels={raylux/role: spare}"],
        [*usually, *labels, "run.folder=refused", "engine.workers=3"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=tmp_path,
        input=json.dumps([sections, runs]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    anywhere, labelled, *refused = map(json.loads, done.stdout.splitlines())
    assert len({role for name, role in anywhere if name == "GradientWorker"}) == 3
    assert {(name, role) for name, role in labelled} == {("GradientWorker", "worker"), ("FactorShard", "shard")}
    for folder in ("run", "labelled"):
        assert differing(contents(tmp_path / folder), usual) == []
    assert "no node has the labels raylux/role=spare that engine.worker_labels asks for" in refused[0]
    assert "they have raylux/role=shard, raylux/role=worker" in refused[0]
    assert "not enough CPUs on the nodes with raylux/role=worker: 3 workers need 3, they have 2" in refused[1]


def test_ctrl_c_on_ray_goes_on_and_leaves_no_process(
    inputs: Inputs, usual: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The command starts Ray itself; SIGINT while its actors work."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(inputs.sections(tmp_path / "run")), encoding="utf-8")
    words = [*CUT, *WHAT, "engine.backend=ray", "engine.workers=1"]
    command = [sys.executable, "-m", "raylux.cli", "run", str(config), *words]
    before = {process.pid for process in ray_processes()}
    progress = tmp_path / "run" / "progress.jsonl"
    # Whatever started the tests may have SIGINT ignored, as shells do for what runs in the background.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=heard) as process:
        deadline = time.monotonic() + 150
        while not (progress.exists() and "covariance" in progress.read_text(encoding="utf-8")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the command
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said and "run the same command again" in said
    left = [process for process in ray_processes() if process.pid not in before]
    assert psutil.wait_procs(left, timeout=30)[1] == []
    again = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr[-3000:]
    assert differing(contents(tmp_path / "run"), usual) == []
