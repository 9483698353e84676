"""A Ray cluster on this machine whose nodes die and come back on command: a head that runs no workers, and two nodes.

``Cluster`` starts this file as a program of its own and tells it what to do by lines on its input; at the end of
its input it shuts the cluster down. So the process that uses it never joins Ray itself.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

NODES = 2
_MARK = "RAYLUX_FAULTS"
# Ray's own logs and messages share the output; an answer begins with this.
_ANSWER = "raylux-cluster "
_TIMEOUT = 120.0
_STORE_BYTES = 150 << 20
# A node that is gone is noticed after a second or two, not half a minute.
_SYSTEM = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 2,
    "health_check_timeout_ms": 1000,
}


class Cluster:
    """The cluster as its user sees it; made by ``cluster()``.

    Attributes:
        address: for ``RAY_ADDRESS``.
        env: environment of this cluster's processes and of drivers that join it.
    """

    def __init__(self, process: subprocess.Popen[str], env: dict[str, str]) -> None:
        self._process = process
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._asked: list[str] = []
        self._seen: set[psutil.Process] = set()
        self.address = self._answer("to start")
        self.env = {**env, "RAY_ADDRESS": self.address}

    def remove(self, node: int) -> None:
        """Kill a node's processes (0 or 1), without a word to anybody, and leave its place empty."""
        self._tell(f"remove {node}")
        self._settle()

    def add(self, node: int) -> None:
        """Start a node in an empty place; one that was never there may be added too."""
        self._tell(f"add {node}")
        self._settle()

    def replace(self, node: int) -> None:
        """Kill a node's processes and start another in its place, without waiting for it; one at a time."""
        self._settle()
        self._tell(f"remove {node}")
        self._tell(f"add {node}")

    def actors(self, name: str) -> list[psutil.Process]:
        """Living processes of an actor class, on nodes that live."""
        found = []
        for process in self._descendants():
            with contextlib.suppress(psutil.Error):
                if title(process).startswith(f"ray::{name}") and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def left(self) -> list[psutil.Process]:
        """What still runs of all processes that were ever seen of this cluster, and of what carries its mark.

        Ray's workers write their title over their environment, so the mark alone does not find them.
        """
        marked = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self.env[_MARK] and process.pid != os.getpid():
                    marked.add(process)
        return [process for process in self._seen | marked if _runs(process)]

    def note(self) -> None:
        """Remember the processes that there are."""
        self._seen.update(self._descendants())

    def _descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.Error:
            return []

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                self._answers.put(line.removeprefix(_ANSWER).strip())

    def _tell(self, command: str) -> None:
        self.note()
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        self._asked.append(command)

    def _settle(self) -> None:
        """Wait until what was asked is done."""
        while self._asked:
            self._answer(f"to {self._asked[0]}")
            del self._asked[0]

    def _answer(self, what: str) -> str:
        try:
            return self._answers.get(timeout=_TIMEOUT)
        except queue.Empty:
            code = self._process.poll()
            raise RuntimeError(f"the cluster did not manage {what} in {_TIMEOUT:.0f} s (exit code {code})") from None


@contextmanager
def cluster(nodes: int = NODES) -> Iterator[Cluster]:
    """A running cluster: a head of no CPUs and nodes of one CPU each; when it ends, so do all of its processes.

    Raises:
        RuntimeError: it does not start, or leaves a process behind (which is ended).
    """
    with tempfile.TemporaryDirectory(prefix="raylux-faults-") as folder:
        env = {**os.environ, **_auth(Path(folder)), _MARK: secrets.token_hex(8), "RAY_USAGE_STATS_ENABLED": "0"}
        env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        env.pop("RAY_ADDRESS", None)
        with (
            open(Path(folder, "log"), "w", encoding="utf-8") as log,
            subprocess.Popen(
                [sys.executable, __file__, str(nodes)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env,
            ) as process,
        ):  # fmt: skip
            ours = None
            try:
                ours = Cluster(process, env)
                yield ours
            finally:
                if ours is not None:
                    ours.note()
                process.communicate(timeout=_TIMEOUT)  # the end of its input asks it to shut down
        left = _leftover(ours) if ours else []
    if left:
        raise RuntimeError("left behind (and ended now): " + "; ".join(left))


def title(process: psutil.Process) -> str:
    """What a process calls itself, as ``ray::FactorShard.add``."""
    return " ".join(process.cmdline()).strip()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _auth(folder: Path) -> dict[str, str]:
    """A token for this cluster alone, unless the environment brings one."""
    if os.environ.get("RAY_AUTH_MODE"):
        return {}
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def _leftover(ours: Cluster) -> list[str]:
    """Processes that outlive the cluster by half a minute: named, then ended."""
    _, left = psutil.wait_procs(ours.left(), timeout=30)
    named = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            named.append(f"{process.pid} {title(process)[:80]}")
            process.kill()
    return named


# the program


def _serve(count: int) -> None:
    """Start the cluster, then do what each line of the input says, and answer."""
    from ray.cluster_utils import Cluster as RayCluster

    head: dict[str, Any] = {"num_cpus": 0, "object_store_memory": _STORE_BYTES, "_system_config": _SYSTEM}
    ray_cluster = RayCluster(initialize_head=True, head_node_args=head)

    def add() -> Any:
        return ray_cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES)

    nodes = {number: add() for number in range(count)}
    print(f"{_ANSWER}{ray_cluster.address}", flush=True)
    for line in sys.stdin:
        word, number = line.split()
        started = time.monotonic()
        if word == "remove":
            ray_cluster.remove_node(nodes.pop(int(number)), allow_graceful=False)
        else:
            nodes[int(number)] = add()
        print(f"{_ANSWER}done in {time.monotonic() - started:.1f} s", flush=True)
    ray_cluster.shutdown()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
