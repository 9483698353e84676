"""raylux on a case, by its own commands: stage times from progress.jsonl, whole commands beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from jobs.bench.figures import ASKED, FIT
from jobs.bench.records import Stopwatch
from jobs.bench.workloads import Case, query_ids, write_queries
from raylux import api
from raylux.config import Config
from raylux.engine.context import Context
from raylux.engine.local import LocalBackend
from raylux.engine.work import Job, results

# What the peer computes, and no more: every sequence scored, dense queries, no scores by token.
USUAL = ("prefilter.kind=none", "query.max_error=0", "score.token_top=0", "score.unit=raw", "engine.backend=local")


def run(
    case: Case, sizes: Sequence[int], threads: int, overrides: Sequence[str], folder: Path, watch: Stopwatch
) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
    """One command for each number of queries, in a run folder of its own: a fit that knows that scoring follows may
    spare that a forward pass, so no factors are shared. The model is loaded, and Ray's actors started, apart.

    Returns:
        Q -> scores [Q, N], and the frozen plan.
    """
    found, plan = {}, {}
    for size in sizes:
        path, place = folder / f"asked-{size}.jsonl", folder / f"run-{size}"
        write_queries(path, case.queries, size)
        sections = {**case.sections, "run": {"folder": str(place)}, "queries": {"path": str(path)}}
        config = Config.parse(sections, [*USUAL, f"engine.threads={threads}", *overrides])
        result = _command(config, size, watch)
        scores = result.scores().sel(query=query_ids(size), sequence=result.sequences["sequence"].to_numpy())
        found[size], plan = np.asarray(scores, np.float64), dict(result.settings["plan"])
    return found, plan


def _command(config: Config, size: int, watch: Stopwatch) -> api.Run:
    """All stages but the report; what a stage takes beside its tasks is ``rest``."""
    inner = Stopwatch()
    timed: dict[str, Callable[[Context], None]] = {"corpus": _loading(watch, size)}
    timed |= {name: _timed(api._RUN[name], name, inner) for name in ("fit", "query", "score")}
    with patch.dict(api._RUN, timed), watch.on("call", size):
        result = api.run_stages(config, [stage for stage in api.STAGES if stage != "report"], quiet=True)
    wall, cpu = (sum(getattr(stage, clock) for stage in inner.stages) for clock in ("wall", "cpu"))
    for event in _events(Path(config.run.folder)):
        if event["event"] == "task" and event["state"] == "done" and event["stage"] in FIT + ASKED:
            watch.add(event["stage"], size, event["seconds"], event["cpu"], event["time"])
            wall, cpu = wall - event["seconds"], cpu - event["cpu"]
    watch.add("rest", size, wall, cpu, inner.stages[-1].ended)
    return result


def _timed(usual: Callable[[Context], None], name: str, inner: Stopwatch) -> Callable[[Context], None]:
    def run(ctx: Context) -> None:
        with inner.on(name):
            usual(ctx)

    return run


def _loading(watch: Stopwatch, size: int) -> Callable[[Context], None]:
    """A stage in place of ``corpus``, which has nothing to do: workers and shards as they are in mid-run."""

    def load(ctx: Context) -> None:
        with watch.on("load", size):
            backend = ctx.backend
            if isinstance(backend, LocalBackend):
                _ = backend.worker
                return
            backend.ask("pid", dict.fromkeys(range(backend.shards), ()))
            _wait_for_workers(ctx)

    return load


def _wait_for_workers(ctx: Context) -> None:
    """Until each of Ray's workers has its model and has run something."""
    while True:
        jobs = (Job(f"warm {place}", (0, ctx.assignment)) for place in range(4 * ctx.backend.workers))
        for _ in results(ctx.backend, "probe", jobs, parts=True):
            pass
        slots = {
            event["slot"] for event in _events(Path(ctx.folder.path)) if event["event"] == "unit" and "slot" in event
        }
        if len(slots) >= ctx.backend.workers:
            return


def _events(run: Path) -> list[dict[str, Any]]:
    path = run / "progress.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
