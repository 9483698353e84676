"""A run's own numbers for Prometheus, by ``ray.util.metrics``: what the driver tells the log, told to Ray as well.

Ray serves them on the driver's node beside its own, as ``ray_`` and the name, counters with ``_total`` behind it.
Gauges end with the driver, its counters stay as long as the node; ``progress.jsonl`` is what lasts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

_STAGE = ("run", "stage")
# Ray forgets a gauge that was not set for some 20 seconds: a unit may take longer.
_AGAIN = 5.0
_SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
COUNTERS = {
    "raylux_units": (_STAGE, "units of work that workers and shards have finished"),
    "raylux_tokens": (_STAGE, "tokens that went through a forward pass"),
    "raylux_reduced_bytes": (_STAGE, "bytes of workers' sums that factor shards have added"),
    "raylux_retries": (_STAGE, "units that are to run again because their worker or shard died under them"),
    "raylux_restarts": (("run", "stage", "who", "cause"), "workers and shards that were started in place of dead ones"),
}
GAUGES = {
    "raylux_queue_depth": (_STAGE, "calls that run at a worker or wait for one"),
    "raylux_stage_done": (_STAGE, "of the stage's whole, in its own unit (units, queries, sequences)"),
    "raylux_stage_size": (_STAGE, "the stage's whole"),
    "raylux_workers": (("run",), "gradient workers that are ready"),
    "raylux_batch_files": (("run", "state"), "query files of a batch: waiting, answered, aside"),
}
HISTOGRAMS = {"raylux_unit_seconds": (_STAGE, "seconds that a unit took")}


def exported() -> set[str]:
    """Every name as Prometheus sees it; of a histogram, those of its parts."""
    parts = {f"ray_{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
    return {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES} | parts


@cache
def _instrument(name: str) -> Any:
    """One per process: Ray keeps what was registered under a name first."""
    for kind, known in ((Counter, COUNTERS), (Gauge, GAUGES)):
        if name in known:
            tags, description = known[name]
            return kind(name, description=description, tag_keys=tags)
    tags, description = HISTOGRAMS[name]
    return Histogram(name, description=description, boundaries=_SECONDS, tag_keys=tags)


class Meter:
    """Listens to a reporter's events (``Reporter.listen``).

    Args:
        run: what the run is called in tags.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._workers: set[int] = set()
        # Gauge and tags -> value, as they stand.
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="raylux-metrics", daemon=True)
        self._thread.start()

    def __call__(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Take an event: its kind and what is said of it."""
        heard: dict[str, Callable[[Mapping[str, Any], str], None]] = {
            "unit": self._unit,
            "spent": self._spent,
            "repeated": self._repeated,
            "task": self._task,
            "worker": self._worker,
            "shard": self._shard,
            "batch": self._batch,
        }
        if kind in heard:
            heard[kind](facts, str(facts.get("task") or facts.get("stage") or "start"))

    def close(self) -> None:
        """Nobody works any more: the gauges are let go."""
        self._stop.set()
        self._thread.join()

    def _unit(self, facts: Mapping[str, Any], stage: str) -> None:
        self._add("raylux_units", 1, stage=stage)
        self._add("raylux_tokens", facts.get("tokens", 0), stage=stage)
        if "seconds" in facts:
            _instrument("raylux_unit_seconds").observe(facts["seconds"], {"run": self._run, "stage": stage})
        if "queue" in facts:
            self._set("raylux_queue_depth", facts["queue"], stage=stage)

    def _spent(self, facts: Mapping[str, Any], stage: str) -> None:
        self._add("raylux_reduced_bytes", facts.get("bytes", 0), stage=stage)

    def _repeated(self, facts: Mapping[str, Any], stage: str) -> None:
        self._add("raylux_retries", facts["units"], stage=stage)

    def _task(self, facts: Mapping[str, Any], stage: str) -> None:
        self._set("raylux_stage_done", facts["done"], stage=stage)
        self._set("raylux_stage_size", facts["total"], stage=stage)

    def _worker(self, facts: Mapping[str, Any], stage: str) -> None:
        if facts["state"] == "started":
            self._workers.add(facts["slot"])
        else:
            self._workers.discard(facts["slot"])
        self._set("raylux_workers", len(self._workers))
        if facts["state"] == "died":
            self._add("raylux_restarts", 1, stage=stage, who="worker", cause=str(facts["cause"]))
            self._add("raylux_retries", facts["unit"] is not None, stage=stage)

    def _shard(self, facts: Mapping[str, Any], stage: str) -> None:
        if facts["state"] == "died":
            self._add("raylux_restarts", 1, stage=stage, who="shard", cause=str(facts["cause"]))

    def _batch(self, facts: Mapping[str, Any], stage: str) -> None:
        for state in ("waiting", "answered", "aside"):
            if state in facts:
                self._set("raylux_batch_files", facts[state], state=state)

    def _add(self, name: str, count: float, **tags: str) -> None:
        if count > 0:
            _instrument(name).inc(float(count), {"run": self._run, **tags})

    def _set(self, name: str, value: float, **tags: str) -> None:
        full = {"run": self._run, **tags}
        self._gauges[name, tuple(full.items())] = float(value)
        _instrument(name).set(float(value), full)

    def _keep(self) -> None:
        while not self._stop.wait(_AGAIN):
            for (name, tags), value in list(self._gauges.items()):
                _instrument(name).set(value, dict(tags))
