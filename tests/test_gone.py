"""What the driver knows, on a real cluster, of objects that went away with their node."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cluster

# A driver of its own: the test session's process joins at most one cluster.
DRIVER = """
import json, time
import numpy as np, ray
from ray.cluster_utils import Cluster
from raylux.engine.remote import RayBackend

store = {"object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **store})
nodes = [cluster.add_node(num_cpus=1, resources={"there": 1}, **store)]
ray.init(address=cluster.address, log_to_driver=False)

class Maker:
    def make(self):
        return 1, np.zeros(10), np.zeros(1_000_000)

def make(**more):
    return ray.remote(Maker).options(num_cpus=1, **more).remote()

refs = []
for maker in (make(resources={"there": 1}), make()):
    refs += maker.make.options(num_returns=3).remote()
ray.wait(refs, num_returns=len(refs), fetch_local=False)
before = RayBackend.gone(None, refs)
cluster.remove_node(nodes[0], allow_graceful=False)
deadline, after = time.monotonic() + 90, before
while not any(after) and time.monotonic() < deadline:
    ray.wait([refs[0]], timeout=0.2)
    time.sleep(0.2)
    after = RayBackend.gone(None, refs)
print(json.dumps([before, after]))
ray.shutdown()
cluster.shutdown()
"""


def test_large_parts_of_a_node_that_is_gone_are_known_to_be_lost() -> None:
    done = subprocess.run([sys.executable, "-c", DRIVER], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    # Small ones travel with the answer; those of the head's worker, where the driver is, are still there.
    assert before == [False] * 6
    assert after == [False, False, True, False, False, False]
