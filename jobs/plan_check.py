"""The plan against the run: seconds of each stage and peak memory of the benchmark's workloads, in process.

On one thread. The rates are measured first, then the run is made, then the plan, by those rates and by the precision of
products that the run settled on. What one factor, taken from all workloads' time together, leaves of the error is told
apart. C needs `make smollm2`'s packages.

    python jobs/plan_check.py --write
    python jobs/plan_check.py --folder DIR    # keep the runs there; one that is there is not made again
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from jobs import pages
from jobs.bench.workloads import WORKLOADS, Case, write_queries
from raylux.config import Config
from raylux.cost.costs import RunPlan
from raylux.errors import RayluxError
from raylux.planning import Sizes, plan_here
from raylux.report.plans import markdown
from raylux.report.profile import parsed, stage_times

_PAGE = "plan-check.md"
BYTES_WITHIN, TIME_WITHIN = 1.3, 1.5
# Of a workload's whole time, what a stage takes that counts.
SMALL = 0.04
# A run's largest resident size, in its folder.
_PEAK = "peak.json"
QUERIES = {"A": 8, "B": 32, "C": 8}
_STAGES = ("covariance", "eigenbases", "lambda", "query", "score")
# Names of tasks in progress.jsonl, where they differ.
_TASKS = {"eigen": "eigenbases", "moments": "lambda"}


@dataclass(frozen=True)
class Row:
    """One quantity of one run, planned and measured."""

    run: str
    name: str
    planned: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.planned / self.measured

    @property
    def memory(self) -> bool:
        return self.name == "peak bytes"

    @property
    def whole(self) -> bool:
        return self.name == "all stages"


def compare(name: str, plan: RunPlan, times: dict[str, float], peak: float) -> list[Row]:
    """Rows of the stages that ran, of all of them together, and of the peak memory of a run in process.

    Args:
        name: of the run.
        plan: of it.
        times: stage -> CPU seconds, by the plan's names of stages.
        peak: bytes of the process, worker and shard in one.
    """
    planned = {stage.name: stage.seconds for stage in plan.stages}
    rows = [Row(name, stage, planned[stage], times[stage]) for stage in _STAGES if times.get(stage)]
    rows.append(Row(name, "all stages", sum(row.planned for row in rows), sum(row.measured for row in rows)))
    most = max(stage.worker_bytes + stage.shard_bytes for stage in plan.stages)
    return [*rows, Row(name, "peak bytes", most, peak)]


def write_config(case: Case, folder: Path, queries: int) -> Path:
    """The workload's config and its first queries; returns the config's path."""
    asked = folder / "queries.jsonl"
    write_queries(asked, case.queries, queries)
    config = {
        **case.sections,
        "run": {"folder": str(folder / "run")},
        "queries": {"path": str(asked)},
        "prefilter": {"kind": "none"},
        "query": {"max_error": 0.0},
        "score": {"token_top": 0},
        "engine": {"backend": "local", "threads": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def measure(config: Path) -> float:
    """Run a config in a process of its own; its largest resident memory in bytes.

    Raises:
        subprocess.CalledProcessError: the run failed.
    """
    peak, ended = [0.0], threading.Event()
    command = [sys.executable, "-m", "raylux.cli", "run", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    watcher = threading.Thread(target=_watch, args=(psutil.Process(process.pid), ended, peak))
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
    if code:
        raise subprocess.CalledProcessError(code, command)
    return peak[0]


def cpu_seconds(events: Path) -> dict[str, float]:
    """CPU seconds of a run by stage, from its events."""
    times: dict[str, float] = {}
    for stage in stage_times(parsed(events.read_bytes())):
        # In process the driver's waiting is the worker's or the shard's work: it is counted once.
        own = {kind: pair for kind, pair in stage.driver.kinds.items() if kind not in ("wait", "ask")}
        cpu = sum(pair[1] for kinds in (stage.work.kinds, own) for pair in kinds.values())
        times[_TASKS.get(stage.stage, stage.stage)] = cpu
    return times


def _watch(process: psutil.Process, ended: threading.Event, peak: list[float]) -> None:
    while not ended.wait(0.02):
        try:
            peak[0] = max(peak[0], float(process.memory_info().rss))
        except psutil.Error:
            return


def check(names: Sequence[str], base: Path) -> list[Row]:
    """All rows, of the workloads named; their runs are made in ``base``, unless they are there."""
    rows: list[Row] = []
    fresh = not made(names, base)
    for place, name in enumerate(names):
        case, folder = WORKLOADS[name].prepare(), base / name
        done = (folder / _PEAK).exists()
        if not done:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        config = Config.load(write_config(case, folder, QUERIES[name]), [])
        if fresh and place == 0:
            plan_here(config, Sizes(), refresh=True)  # for the rates, which are kept
        if not done:
            (folder / _PEAK).write_text(json.dumps(measure(folder / "config.yaml")), encoding="utf-8")
        plan, _ = plan_here(config, Sizes())
        times = cpu_seconds(folder / "run" / "progress.jsonl")
        rows += compare(name, plan, times, float(json.loads((folder / _PEAK).read_text(encoding="utf-8"))))
    return rows


def made(names: Sequence[str], base: Path) -> list[str]:
    """Workloads whose runs are in a folder."""
    return [name for name in names if (base / name / _PEAK).exists()]


def page(rows: Sequence[Row], earlier: Sequence[str] = ()) -> str:
    """What was found, as Markdown; ``earlier``: workloads whose runs were there already."""
    totals = [row for row in rows if row.whole]
    factor = sum(row.measured for row in totals) / sum(row.planned for row in totals)
    least = {row.run: SMALL * row.measured for row in totals}
    lines: list[list[str]] = []
    missed = []
    for row in rows:
        unit, scale, limit = ("GB", 1e9, BYTES_WITHIN) if row.memory else ("s", 1.0, TIME_WITHIN)
        after = row.ratio if row.memory else row.ratio * factor
        holds = max(after, 1 / after) <= limit
        small = not row.memory and row.measured < least[row.run]
        lines.append(
            [row.run, row.name, f"{row.planned / scale:.2f} {unit}", f"{row.measured / scale:.2f} {unit}",
             f"{row.ratio:.2f}", f"{after:.2f}", "yes" if holds else "no, small" if small else "no"]
        )  # fmt: skip
        if not holds and not small:
            missed.append(f"{row.run}: {row.name} ({after:.2f})")
    asked = ", ".join(f"{name} with {QUERIES[name]} queries" for name in dict.fromkeys(row.run for row in rows))
    names = ("workload", "what", "planned", "measured", "planned / measured", "after the factor", "within bounds")
    when = " at another time" if earlier else " just before"
    note = f" Runs of {', '.join(earlier)} are earlier ones: the engine may have changed since." if earlier else ""
    said = "Everything keeps within them." if not missed else f"Missed: {'; '.join(missed)}."
    return f"""# The plan against the run

Written by `python jobs/plan_check.py --write`: the benchmark's workloads ({asked}), all sequences
fitted and scored, dense queries, in process, one thread, one run each. Seconds are CPU seconds, of worker, shard and
driver in the run and of the calls by which the rates were measured{when}: what else the machine does
makes both slower, but not alike. Peak memory is the largest resident size of the process (worker and shard in one).

Bounds: bytes within {BYTES_WITHIN}×, time within {TIME_WITHIN}× once calibrated, in stages that take {SMALL:.0%} of
their workload's time or more. One factor for all rows, {factor:.2f}, makes the time of all workloads right; at 1 the
rates need none.{note}
{said}

{markdown(names, lines)}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the page")
    parser.add_argument("--folder", type=Path, default=None, help="keep the runs here, and take those that are here")
    parser.add_argument("--workloads", default=",".join(QUERIES), help=f"of {', '.join(QUERIES)}")
    options: Any = parser.parse_args(arguments)
    names = options.workloads.split(",")
    if unknown := [name for name in names if name not in QUERIES]:
        parser.error(f"unknown workload '{unknown[0]}'")
    try:
        with contextlib.ExitStack() as stack:
            base = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raylux-plan-check-")))
            earlier = made(names, base)
            text = page(check(names, base), earlier)
    except RayluxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.write:
        pages.write(text, _PAGE)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
