"""raylux on a case, by its own commands: stage times from progress.jsonl, whole commands beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from jobs.bench.records import Stopwatch
from jobs.bench.workloads import Case, query_ids, write_queries
from raylux import api
from raylux.config import Config
from raylux.engine.context import Context
from raylux.engine.local import LocalBackend
from raylux.engine.work import Job, results

FIT = ("covariance", "eigenbases", "lambda")
ASKED = ("query", "score")
# What the peer computes, and no more: every sequence scored, dense queries, no scores by token.
USUAL = ("prefilter.kind=none", "query.max_error=0", "score.token_top=0", "score.unit=raw", "engine.backend=local")


def run(
    case: Case, sizes: Sequence[int], threads: int, overrides: Sequence[str], folder: Path, watch: Stopwatch
) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
    """All stages for the first number of queries, then query and score for each other on the same factors.

    The model is loaded (and Ray's actors started) apart from the stages.

    Returns:
        Q -> scores [Q, N], and the frozen plan.
    """
    place = folder / "run"
    found = {}
    for count, size in enumerate(sizes):
        path = folder / f"asked-{size}.jsonl"
        write_queries(path, case.queries, size)
        sections = {**case.sections, "run": {"folder": str(place)}, "queries": {"path": str(path)}}
        config = Config.parse(sections, [*USUAL, f"engine.threads={threads}", *overrides])
        stages = [stage for stage in api.STAGES if stage != "report"] if count == 0 else ["corpus", "query", "score"]
        before = len(_events(place))
        with patch.dict(api._RUN, {"corpus": _loading(watch)}), watch.on("call", size):
            result = api.run_stages(config, stages, quiet=True)
        for event in _events(place)[before:]:
            if event["event"] == "task" and event["state"] == "done" and event["stage"] in FIT + ASKED:
                queries = None if event["stage"] in FIT else size
                watch.add(event["stage"], queries, event["seconds"], event["cpu"], event["time"])
        scores = result.scores().sel(query=query_ids(size), sequence=result.sequences["sequence"].to_numpy())
        found[size] = np.asarray(scores, np.float64)
    return found, dict(result.settings["plan"])


def _loading(watch: Stopwatch) -> Callable[[Context], None]:
    """A stage in place of ``corpus``, which has nothing to do: workers and shards as they are in mid-run."""

    def load(ctx: Context) -> None:
        with watch.on("load"):
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
