"""A question to Ray with a bounded time: does a cluster answer, and does a run fit it?

It is asked in a process of its own: joining a cluster that does not answer may take minutes and cannot be broken
off from within, and a cluster that is started for the question goes with the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass

from raylux.engine import auth
from raylux.engine.capacity import Demand

# Starting a cluster takes 10 to 20 s on an idle machine, joining one a second.
TIMEOUT = 90.0


@dataclass(frozen=True)
class Answer:
    """What the cluster said.

    Attributes:
        problem: why it did not answer, or what does not fit, one line; empty: all is well.
        nodes: of the cluster.
        cpus: of the cluster; gpus, memory (bytes) likewise.
        workers: that a run would have; 0 where none was asked about.
        shards: likewise.
    """

    problem: str = ""
    nodes: int = 0
    cpus: float = 0.0
    gpus: float = 0.0
    memory: float = 0.0
    workers: int = 0
    shards: int = 0


def ask(demand: Demand | None = None, timeout: float = TIMEOUT) -> Answer:
    """Join the cluster of RAY_ADDRESS, or start one for a moment, and hold a demand against its resources.

    Args:
        demand: of a run; None: only whether a cluster answers.
        timeout: seconds until the question is given up.
    """
    question = json.dumps(asdict(demand) if demand is not None else None)
    process = subprocess.Popen(
        [sys.executable, "-m", "raylux.engine.probe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(question, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Answer(f"no answer in {timeout:.0f} s")
    finally:
        if process.poll() is None:  # too late or interrupted: what it started goes with it
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return _parse(out, err)


def _parse(out: str, err: str) -> Answer:
    for line in reversed(out.splitlines()):  # Ray may print before
        with contextlib.suppress(ValueError, TypeError):
            return Answer(**json.loads(line))
    last = [line for line in err.splitlines() if line.strip()]
    return Answer(f"the question broke off: {last[-1][:300] if last else 'nothing was said'}")


def main() -> None:
    """Answer one question on stdin with one line on stdout."""
    question = json.loads(sys.stdin.read())
    print(json.dumps(asdict(_answer(Demand(**question) if question else None))), flush=True)


def _answer(demand: Demand | None) -> Answer:
    auth.switch_on()
    import ray

    from raylux.engine import session
    from raylux.errors import UserError

    workers = shards = 0
    problem = ""
    try:
        session.connect()
    except UserError as error:
        return Answer(str(error))
    try:
        supply, nodes = ray.cluster_resources(), [node for node in ray.nodes() if node["Alive"]]
        if demand is not None:
            try:
                workers, shards = session.size(demand)
            except UserError as error:
                problem = str(error)
        cpus, gpus, memory = (float(supply.get(name, 0.0)) for name in ("CPU", "GPU", "memory"))
        return Answer(problem, len(nodes), cpus, gpus, memory, workers, shards)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
