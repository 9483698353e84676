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
from dataclasses import asdict, dataclass, replace

from raylux.engine import auth
from raylux.engine.capacity import Demand, Node, fit_nodes, settled
from raylux.errors import UserError

# Starting a cluster takes 10 to 20 s on an idle machine, joining one a second.
TIMEOUT = 90.0


@dataclass(frozen=True)
class Answer:
    """What the cluster said.

    Attributes:
        problem: why it did not answer, or what does not fit, one line; empty: all is well.
        nodes: of the cluster, those that live.
        workers: that a run would have; 0 where none was asked about.
        shards: likewise.
    """

    problem: str = ""
    nodes: tuple[Node, ...] = ()
    workers: int = 0
    shards: int = 0

    def total(self, name: str) -> float:
        """What the nodes have together, by Ray's name: CPU, GPU, memory in bytes."""
        return sum(float(node.resources.get(name, 0.0)) for node in self.nodes)

    def fit(self, demand: Demand) -> tuple[int, int]:
        """Workers and shards that fit, in the passes that the demand says. Raises UserError."""
        return fit_nodes(demand, self.nodes)


def ask(demand: Demand | None = None, timeout: float = TIMEOUT) -> Answer:
    """Join the cluster of RAY_ADDRESS, or start one for a moment, and hold a demand against its resources.

    Args:
        demand: of a run; None: only whether a cluster answers.
        timeout: seconds until the question is given up.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "raylux.engine.probe"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return Answer(f"no answer in {timeout:.0f} s")
    finally:
        if process.poll() is None:  # too late or interrupted: what it started goes with it
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    answer = _parse(out, err)
    if demand is None or answer.problem:
        return answer
    try:
        workers, shards = answer.fit(settled(demand, answer.fit))
    except UserError as error:
        return replace(answer, problem=str(error))
    return replace(answer, workers=workers, shards=shards)


def _parse(out: str, err: str) -> Answer:
    for line in reversed(out.splitlines()):  # Ray may print before
        with contextlib.suppress(ValueError, TypeError, KeyError):
            said = json.loads(line)
            return Answer(said["problem"], tuple(Node(**node) for node in said["nodes"]))
    last = [line for line in err.splitlines() if line.strip()]
    return Answer(f"the question broke off: {last[-1][:300] if last else 'nothing was said'}")


def main() -> None:
    """Say in one line on stdout what the cluster has."""
    print(json.dumps(asdict(_answer())), flush=True)


def _answer() -> Answer:
    auth.switch_on()
    from raylux.engine import session

    try:
        session.connect()
    except UserError as error:
        return Answer(str(error))
    try:
        return Answer(nodes=session.living())
    finally:
        session.leave()


if __name__ == "__main__":
    main()
