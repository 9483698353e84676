"""What every test shares: a quiet environment, files in memory, one torch thread, one Ray cluster, no process left."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

# Ray and the hub's client read the environment when they are imported, so it is set before any test
# module is. The token is this session's own: the one in the home folder stays untouched.
_MARK = "RAYLUX_TEST_SESSION"
_TOKEN_FOLDER = tempfile.TemporaryDirectory(prefix="raylux-test-token-")
_TOKEN = Path(_TOKEN_FOLDER.name) / "token"
_TOKEN.touch(mode=0o600)
_TOKEN.write_text(secrets.token_hex(32), encoding="ascii")
os.environ |= {
    _MARK: secrets.token_hex(8),
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": str(_TOKEN),
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.pop("RAY_ADDRESS", None)  # the tests never join a cluster that happens to be there
os.environ.pop("COLUMNS", None)  # tables are as wide as in a pipe; xdist says how wide a terminal is

# Half of a small run's time is fsync, hundreds of times over, which no test can tell from its absence: a process that
# is killed loses nothing that it wrote, and tests of the order of such calls count them. So where there is room, the
# tests' files lie in memory; `--basetemp` puts them elsewhere.
_MEMORY = Path("/dev/shm")
if os.access(_MEMORY, os.W_OK):
    _room = min(shutil.disk_usage(_MEMORY).free, psutil.virtual_memory().available)
    if _room > 6 * 1024**3:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

_OBJECT_STORE_BYTES = 500 * 1024**2
# Files that take long, the longest first: several processes share the files out in this order, and one that begins with
# a long file at the end is waited for by the others.
_LONG = """
    test_invariance test_experts test_evaluation test_placement test_verify test_dose_curve test_metrics
    test_store_damage test_fast_paths test_exact test_batch test_solving test_going_on test_restart test_normalised
    test_classifiers test_source test_blocks test_layer_passes test_joint test_influence test_predicts test_store_kill
    test_benchmark test_hessian
""".split()
_RAY_PROCESSES = ("raylet", "gcs_server", "/ray/_private/", "/ray/dashboard/", "/ray/util/client/", "ray::")


_ON_RAY: set[Path] = set()  # files with tests that ask for the cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files on Ray first, as the cluster costs a tenth of a core for as long as it is there; then the long ones."""
    _ON_RAY.update(item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ()))
    rank = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: (item.path not in _ON_RAY, rank.get(item.path.stem, len(rank))))


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Two cores run several tests at once, and the number of threads changes bits."""
    import torch

    torch.set_num_threads(1)


_CLUSTER: dict[str, Any] = {}  # ``ray.cluster_resources()`` of the one that is there


@pytest.fixture
def ray_cluster() -> dict[str, Any]:
    """The cluster of the session (2 logical CPUs), started by the first test that asks for it.

    Each worker, shard or task on it is a process that imports torch and the models, which takes seconds of a core. What
    more of them change than two, ``tests.apart`` shows without processes. It ends with the last of the files in a row
    that ask for it.

    Returns ``ray.cluster_resources()`` as it was at the start.
    """
    import ray

    if not _CLUSTER:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
        )
        _CLUSTER.update(ray.cluster_resources())
    return dict(_CLUSTER)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the cluster where the next file needs none."""
    if nextitem is None or (nextitem.path != item.path and nextitem.path not in _ON_RAY):
        _end_cluster()


def _end_cluster() -> None:
    if _CLUSTER:
        import ray

        _CLUSTER.clear()
        ray.shutdown()


def ray_processes() -> list[psutil.Process]:
    """Ray's processes that this test session started: they carry its mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            marked = process.environ().get(_MARK) == os.environ[_MARK]
            if marked and any(name in " ".join(process.cmdline()) for name in _RAY_PROCESSES):
                found.append(process)
        except psutil.Error:  # it ended meanwhile, or it is not ours to read
            continue
    return found


_LEFT: list[str] = []


def _end_ray_processes() -> None:
    """End what of Ray is left after a session, and write it down."""
    left = ray_processes()
    if left:
        # A shutdown is asynchronous: what is about to end gets some seconds to do so.
        _, left = psutil.wait_procs(left, timeout=15)
    for process in left:
        try:
            _LEFT.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
            process.kill()
        except psutil.Error:
            continue


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a process of several found (it cannot fail the session itself)."""
    _LEFT.extend(getattr(node, "workeroutput", {}).get("ray_left", []))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session when a Ray process outlives it, and end what is left."""
    _end_cluster()  # an interrupted session has not come to it
    _end_ray_processes()
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ray_left"] = _LEFT
    elif _LEFT:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line("Ray processes left behind by the tests (killed):\n  " + "\n  ".join(_LEFT), red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
