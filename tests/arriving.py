"""Ten query files that arrive while a batch answers them, and whose driver gets SIGKILL twice.

``python -m tests.arriving RUN INBOX [section.key=value …]`` prints at which moments it killed, and leaves with the exit
code of the third driver. Each driver is forked from this process, which has everything imported and no thread.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.small import QUERIES, write_lines

# What each file asks; some ask the same, under another name.
ASKED = ("a", "bc", "da", "d", "bc", "da", "a", "d", "bc", "da")
NAMES = tuple(f"q{place}.jsonl" for place in range(len(ASKED)))
_TOGETHER = 4
_DEADLINE = 120.0


def put(inbox: Path, name: str, ids: str | Sequence[str]) -> None:
    """Files appear whole, as a careful writer lets them."""
    write_lines(inbox / f".{name}", [query for wanted in ids for query in QUERIES if query["id"] == wanted])
    os.replace(inbox / f".{name}", inbox / name)


class Scene:
    """The run folder and the folder of files, and what was put there so far."""

    def __init__(self, run: Path, inbox: Path) -> None:
        self.run, self.inbox, self.put = run, inbox, 0

    def arrive(self, count: int) -> None:
        for place in range(self.put, min(len(NAMES), self.put + count)):
            put(self.inbox, NAMES[place], ASKED[place])
        self.put += count

    def committed(self, stage: str) -> int:
        ledger = self.run / "ledger" / stage
        return sum(path.suffix == ".json" for path in ledger.iterdir()) if ledger.is_dir() else 0


def driver(scene: Scene, overrides: Sequence[str]) -> int:
    """Start one that watches until nothing has arrived for a while; its process."""
    process = os.fork()
    if process:
        return process
    from raylux.cli import main

    words = ["batch", str(scene.run), "--queries", str(scene.inbox), "--watch", "--every", "0.1", "--idle", "1"]
    try:
        code = main([*words, "--together", str(_TOGETHER), *overrides])
        sys.stdout.flush()
    except BaseException:
        code = 99
    os._exit(code)


def until(process: int, what: str, scene: Scene, count: int) -> None:
    """Wait until so many units of a stage are in the ledger."""
    deadline = time.monotonic() + _DEADLINE
    while scene.committed(what) < count:
        if os.waitpid(process, os.WNOHANG)[0] or time.monotonic() > deadline:
            raise SystemExit(f"the driver ended, or did not come to {count} of {what}")
        time.sleep(0.001)


def kill(process: int, scene: Scene) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    stages = ("batch.taken", "query", "score", "tokens", "batch.answer")
    print("killed:", ", ".join(f"{stage} {scene.committed(stage)}" for stage in stages), flush=True)


def play(run: Path, inbox: Path, overrides: Sequence[str]) -> int:
    """Two kills: among the scores of the first pass, and after the answer to one of several files of a later one."""
    scene = Scene(run, inbox)
    scene.arrive(3)
    first = driver(scene, overrides)
    until(first, "score", scene, 2)
    scene.arrive(3)
    kill(first, scene)
    second = driver(scene, overrides)
    until(second, "batch.answer", scene, 2)
    scene.arrive(2)
    until(second, "batch.answer", scene, 4)
    kill(second, scene)
    third = driver(scene, overrides)
    scene.arrive(2)
    _, status = os.waitpid(third, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    # What a driver needs, before it is forked: it is what takes the time.
    import raylux.batch
    import raylux.cli.commands
    import raylux.engine.local  # noqa: F401

    sys.exit(play(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
