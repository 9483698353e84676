"""How many units a second the driver can deal with, and how long workers wait for it.

Two ways: real Ray actors that only sleep, so that the driver, Ray and the disk are all that works; and simulated
workers, up to ten thousand, on virtual time that the real driver's own time is a part of. Pool, passes of sums, ledger
and progress.jsonl are the engine's own in both.

    python jobs/driver.py --write
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

from jobs.driving.passes import PASSES, SHARDS, part, shard_specs, work
from jobs.driving.sleepers import Measured, real
from raylux.engine.progress import Reporter
from raylux.engine.shard import FactorShard
from raylux.engine.simulate import Behaviour, Fate, SimulatedCluster
from raylux.engine.simulate_backend import ShardBehaviour, SimulatedBackend
from raylux.store import RunFolder

PAGE = Path(__file__).parent.parent / "docs" / "results" / "driver.md"
WANTED_RATE, WANTED_IDLE = 100.0, 0.03


# ------------------------------------------------------------------------------------------- simulated workers


@dataclass(frozen=True)
class Settings:
    """One simulated pass.

    Attributes:
        kind: of ``PASSES``.
        workers: eight on a node.
        each: units per worker.
        unit: seconds of a unit, mean.
        spread: sigma of the log-normal distribution from which they are drawn.
        startup: seconds from a worker's place to its loaded model; drawn within a third of it.
        failures: of the units end their worker's process.
        call: seconds that Ray and the disk take of the driver for a unit, as measured with real actors.
        add: seconds in which the shards take a unit's sums and answer.
        seed: of all that is drawn.
    """

    kind: str
    workers: int
    each: int = 200
    unit: float = 10.0
    spread: float = 0.3
    startup: float = 15.0
    failures: float = 0.01
    call: float = 0.0
    add: float = 0.002
    seed: int = 0

    @property
    def units(self) -> int:
        return self.workers * self.each


@dataclass(frozen=True)
class Outcome:
    """What a simulated pass took.

    Attributes:
        cpu: seconds of the driver's processor, the simulation's own among them.
        hours: of virtual time.
        shares: of the workers' time: idle, idle before the last unit began, starting, lost.
        begun: units that began, those that ended their worker and were begun again among them.
        memory: bytes by which the process grew.
    """

    cpu: float
    hours: float
    shares: dict[str, float]
    begun: int
    memory: int


def simulate(settings: Settings) -> Outcome:
    """Run a pass; the virtual time goes on by what the driver takes, on this machine, and by ``call`` for Ray."""
    failing = random.Random(f"failures {settings.seed}")
    begun = [0]
    # Of a log-normal distribution whose mean is the unit's.
    centre = math.log(settings.unit) - settings.spread**2 / 2

    def fate(method: str, args: tuple[Any, ...]) -> Fate | None:
        return "process" if method != "prepare" and failing.random() < settings.failures else None

    last: list[float] = []

    def service(draw: random.Random, method: str, args: tuple[Any, ...]) -> float:
        begun[0] += 1
        if args[0] == settings.units - 1 and not last:
            running = sum(cluster.now() - worker.since for worker in cluster.workers if worker.calls)
            last.append(1 - (cluster.seconds.total + running) / (settings.workers * cluster.now()))
        return draw.lognormvariate(centre, settings.spread)

    def compute(method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (None, *(part(args[0], place) for place in range(SHARDS))) if method == "moment_unit" else ("",)

    def startup(draw: random.Random) -> float:
        return settings.startup * draw.uniform(2 / 3, 4 / 3)

    behaviour = Behaviour(service, startup, compute, fate, call=settings.call)
    nodes = [8] * (settings.workers // 8)
    before, cpu = _peak(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="raylux-driver-") as base:
        folder = RunFolder(base)
        reporter = Reporter(folder, quiet=True)
        cluster = SimulatedCluster(nodes, behaviour, settings.seed, driver=time.process_time)
        shard = ShardBehaviour(lambda number: FactorShard(shard_specs(base)[number]), _adds(settings.add))
        backend = SimulatedBackend(cluster, settings.workers, SHARDS, shard, notify=reporter.event)
        # A disk's syncs are counted as measured with real actors, in ``call``, and not done again for every unit.
        with patch.object(os, "fsync", lambda handle: None):
            work(settings.kind, backend, folder, reporter, settings.units, cluster.now)
    spent, whole = cluster.seconds, settings.workers * cluster.now()
    shares = {"idle": 1 - spent.total / whole, "before the end": last[0]}
    shares |= {"starting": spent.starting / whole, "lost": spent.lost / whole}
    return Outcome(time.process_time() - cpu, cluster.now() / 3600, shares, begun[0], _peak() - before)


def _adds(seconds: float) -> Callable[[str, tuple[Any, ...]], float]:
    return lambda method, args: seconds if method == "add" else 1.0


def _peak() -> int:
    """Most bytes that this process has held so far; ``getrusage`` would count those of the process it came from."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def apart(settings: Settings) -> Outcome:
    """The same in a process of its own, whose memory is nobody else's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(simulate, settings).result()


# ------------------------------------------------------------------------------------------- the page

REAL_HEADER = "pass | units/s | offered | waiting for workers | asking shards | committing | the rest | CPU per unit"
SIMULATED_HEADER = (
    "pass | workers | unit, s | spread | units | idle | idle before the end | starting | lost | driver CPU per unit "
    "| units per CPU second | memory of the driver | hours"
)


def real_row(found: Measured) -> list[str]:
    """A line of the first table."""
    times = {kind: wall for kind, (wall, _) in found.kinds.items()}
    rest = sum(wall for kind, wall in times.items() if kind not in ("wait", "ask", "commit"))
    cells = [times.get("wait", 0.0), times.get("ask", 0.0), times.get("commit", 0.0), rest]
    each = [f"{1000 * cell / found.units:.2f} ms" for cell in cells]
    return [found.kind, f"**{found.rate:.0f}**", f"{found.offered:.0f}", *each, f"{1000 * found.cpu:.2f} ms"]


def simulated_row(settings: Settings, found: Outcome) -> list[str]:
    """A line of the second table."""
    idle, before, starting, lost = (found.shares[name] for name in ("idle", "before the end", "starting", "lost"))
    return [
        settings.kind, f"{settings.workers:,}", f"{settings.unit:g}", f"{settings.spread:g}", f"{settings.units:,}",
        f"**{idle:.1%}**", f"{before:.1%}", f"{starting:.1%}", f"{lost:.1%}",
        f"{1000 * found.cpu / settings.units:.2f} ms", f"{settings.units / found.cpu:,.0f}",
        f"{found.memory / 2**20:.0f} MiB", f"{found.hours:.2f}",
    ]  # fmt: skip


def table(header: str, rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown."""
    names = header.split(" | ")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [names, ["---"] * len(names), *rows])


def cases(call: dict[str, float], each: int) -> list[Settings]:
    """What is simulated; the first two are what is wanted of.

    Args:
        call: seconds of the driver for a unit, by kind of pass.
        each: units per worker.
    """
    usual = [Settings(kind, 1000, each, call=call[kind]) for kind in PASSES]
    wide = [Settings(kind, 1000, each // 2, spread=0.6, call=call[kind]) for kind in PASSES]
    many = [Settings(kind, 10_000, each // 10, 120.0, call=call[kind]) for kind in PASSES]
    return usual + wide + many


def page(measured: Sequence[Measured], options: argparse.Namespace, rows: Sequence[Sequence[str]], command: str) -> str:
    """docs/results/driver.md."""
    example = Settings("score", 1000, options.each)
    return f"""# What the driver can deal with

    {command}

## Real actors that sleep

{options.actors} Ray actors on this machine take the place of the gradient workers and sleep {1000 * options.sleep:g} ms
for a unit: the driver, Ray and the disk are all that works. The pool, the passes, `progress.jsonl`, the ledger on a
local disk and {SHARDS} factor shards are the engine's own. `score`: each unit is committed as it comes. `sums`: each
unit's parts go to the shards, which add them in order. {measured[0].units:,} units each; seconds are the driver's own,
by its profile (`raylux inspect RUN --profile`), for a unit. All processes share the machine's {os.cpu_count()} cores.

{table(REAL_HEADER, [real_row(found) for found in measured])}

Wanted: ≥ {WANTED_RATE:g} units/s. A commit is a file written, synced and renamed, and a sync of its folder: it bounds
the units of a score pass, so that `score.unit_size` should make a unit take seconds. An answer of the shards bounds a
pass of sums.

## Simulated workers

`raylux/engine/simulate.py`: virtual time, in which the driver's own time counts too: its CPU seconds as they go by,
and for each unit what Ray, the disk and the shards took of it above ({
        ", ".join(f"{1000 * _call(found):.2f} ms in {found.kind}" for found in measured)
    }). Units are drawn from a log-normal
distribution (spread is its sigma: at 0.3 one unit in a thousand takes {_tail(0.3):.1f} times the mean, at 0.6
{_tail(0.6):.1f} times);
{example.failures:.0%} of them end their worker's process, which starts again in {example.startup:g} s, a third more or
less, and are done again alone. Shares are of the time of all workers, from an empty cluster to the last unit:
*starting* is loading models, *lost* is what ran when a worker died, *idle* the rest, so waiting for the driver, for a
unit that all others wait for, and for the last units. *Idle before the end* is without these: until the last unit
begins. That is the figure for a longer run. Where units differ much (0.6), a pass of sums waits more: units are added
in order, and it runs at most 8 per worker ahead of the one that is due.

{table(SIMULATED_HEADER, rows)}

Wanted: ≤ {WANTED_IDLE:.0%} idle with 1,000 workers and units of 10 s (the first two lines). Driver CPU is without Ray
and with the simulation's own work; memory is by how much the process grew, the simulated cluster included.
"""


def _call(found: Measured) -> float:
    """Seconds of a unit in which the driver does something else than waiting for workers."""
    return sum(wall for kind, (wall, _) in found.kinds.items() if kind != "wait") / found.units


def _tail(spread: float) -> float:
    """What one unit in a thousand takes, in means."""
    return math.exp(3.09 * spread - spread**2 / 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both ways, print the tables; 1 where one misses what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, default=16, help="that sleep")
    parser.add_argument("--sleep", type=float, default=0.05, help="seconds of a unit")
    parser.add_argument("--units", type=int, default=2000, help="through real actors, per pass")
    parser.add_argument("--each", type=int, default=200, help="units per simulated worker")
    parser.add_argument("--write", action="store_true", help="write the page")
    options = parser.parse_args(arguments)
    measured = real(options.actors, options.sleep, options.units)
    print(table(REAL_HEADER, [real_row(found) for found in measured]), flush=True)
    settings = cases({found.kind: _call(found) for found in measured}, options.each)
    rows, idle = [], []
    for case in settings:
        found = apart(case)
        idle.append(found.shares["idle"])
        rows.append(simulated_row(case, found))
        print(table(SIMULATED_HEADER, rows[-1:]), flush=True)
    if options.write:
        given = sys.argv[1:] if arguments is None else arguments
        text = page(measured, options, rows, " ".join(["python jobs/driver.py", *given]))
        PAGE.write_text(text, encoding="utf-8")
    good = min(found.rate for found in measured) >= WANTED_RATE and max(idle[: len(PASSES)]) <= WANTED_IDLE
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
