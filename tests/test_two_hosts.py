"""A job over two hosts of a network, which share no disk: model, corpus, queries and run folder are on an S3 server."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from jobs.storage.gateway import Gateway, missing
from tests.hosts import ADDRESSES, Host, joined, not_permitted
from tests.small import CUT, Inputs, contents, differing, make_inputs

REASON = missing() or not_permitted()
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(REASON), reason=REASON or "all is there")]
pytest.importorskip("s3fs", reason="not installed: s3fs (make object-store)")

ROOT = Path(__file__).parent.parent
URL = f"http://{ADDRESSES[0]}:8265"
_UPLOAD = """
import sys, fsspec
system = fsspec.filesystem("s3")
system.mkdir("cluster")
system.put(sys.argv[1] + "/model", "cluster/model", recursive=True)
for name in ("corpus", "queries"):
    system.put(f"{sys.argv[1]}/{name}.jsonl", f"cluster/{name}.jsonl")
"""
_DOWNLOAD = """
import sys, numpy
from tests.small import contents
found = contents(sys.argv[1])
numpy.savez(sys.argv[2], names=list(found), **{f"a{place}": array for place, array in enumerate(found.values())})
"""


@dataclass(frozen=True)
class Hosts:
    """A head with the S3 server, and a node that sees nothing of the head's disk.

    ``inputs``: a folder that only the head sees; ``caches``: of models, of head and node.
    """

    head: Host
    node: Host
    inputs: Path
    caches: tuple[Path, Path]
    logs: tuple[Path, Path]

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-3000:] for log in self.logs if log.exists())


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    disk = tmp_path / "of-the-head"
    inputs = make_inputs(disk / "inputs", "gpt2", n_layer=1).base
    caches = (disk / "cache", tmp_path / "of-the-node" / "cache")
    shared = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_AUTH_TOKEN_PATH": "",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
    }
    with joined() as (first, second):
        server = Gateway(disk / "ceph", ADDRESSES[0], Host(first, ADDRESSES[0], {}).before)
        with server:
            envs = [{**shared, **server.env, "RAYLUX_CACHE": str(cache)} for cache in caches]
            head = Host(first, ADDRESSES[0], envs[0])
            node = Host(second, ADDRESSES[1], envs[1], hidden=disk)
            found = Hosts(head, node, inputs, caches, (tmp_path / "head.log", tmp_path / "node.log"))
            _start_ray(found)
            yield found


def _start_ray(hosts: Hosts) -> None:
    common = ["ray", "start", "--block", "--num-cpus=1", "--disable-usage-stats", "--object-store-memory=200000000"]
    where = [f"--node-ip-address={ADDRESSES[0]}", f"--dashboard-host={ADDRESSES[0]}", "--dashboard-port=8265"]
    hosts.head.start(hosts.logs[0], *common, "--head", "--port=6379", *where)
    _until(hosts, lambda: "Ray runtime started" in hosts.said())
    hosts.node.start(hosts.logs[1], *common, f"--address={ADDRESSES[0]}:6379", f"--node-ip-address={ADDRESSES[1]}")
    _until(hosts, lambda: hosts.said().count("Ray runtime started") == 2)


def _until(hosts: Hosts, what: object, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < until, hosts.said()
        time.sleep(0.5)


def test_a_job_over_two_hosts_without_a_shared_disk_has_the_bits_of_a_run_in_process(
    hosts: Hosts, tmp_path: Path
) -> None:
    done = hosts.head.run(sys.executable, "-c", _UPLOAD, str(hosts.inputs))
    assert done.returncode == 0, done.stderr
    # The analyst's machine is the node: it knows an address and a token, and has the config.
    work = tmp_path / "work"
    work.mkdir()
    sections = {
        "run": {"folder": "s3://cluster/run"},
        "model": {"path": "s3://cluster/model", "device": "cpu"},
        "corpus": {"path": "s3://cluster/corpus.jsonl", "id": "id", "keep": ["shelf"], "max_length": 64},
        "queries": {"path": "s3://cluster/queries.jsonl"},
        "prefilter": {"kind": "none"},
        "engine": {"backend": "ray", "workers": 2, "shards": 2},
    }
    (work / "config.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    words = ("submit", str(work / "config.yaml"), *CUT, "--address", URL, "--working-dir", str(work))
    refused = Host(hosts.node.name, ADDRESSES[1], {**hosts.node.env, "RAY_AUTH_TOKEN": "another"})
    done = refused.run(sys.executable, "-m", "raylux.cli", *words)
    assert done.returncode == 2 and "refuses the token" in done.stderr, done.stderr
    done = hosts.node.run(sys.executable, "-m", "raylux.cli", *words)
    assert done.returncode == 0, done.stdout + done.stderr + hosts.said()
    # A worker on each host: the node brought the model from the server, as it sees nothing of the head's copy.
    for cache in hosts.caches:
        assert len(list(cache.glob("models/*/config.json"))) == 1
    usual = contents(Inputs(hosts.inputs).run(tmp_path / "usual").folder)
    done = hosts.head.run(sys.executable, "-c", _DOWNLOAD, "s3://cluster/run", str(tmp_path / "found.npz"))
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "found.npz") as loaded:
        found = {name: loaded[f"a{place}"] for place, name in enumerate(loaded["names"].tolist())}
    assert differing(found, usual) == [] and len(usual) > 15
