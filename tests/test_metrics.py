"""A run's own metrics, as a node's endpoint has them for Prometheus, and the dashboard that draws them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raylux.api import run_stages
from raylux.batch import answer_files
from raylux.blocks import triangle_entries
from raylux.engine import metrics
from raylux.engine.metrics import Meter
from raylux.ledger import COVARIANCE, MOMENTS
from raylux.report.profile import parsed
from raylux.store import RunFolder
from tests.arriving import put
from tests.small import make_inputs
from tests.test_batch import IDF, Own, facts, same

ROOT = Path(__file__).parent.parent
_LINE = re.compile(r"^(?P<name>[a-z_]+)\{(?P<tags>[^}]*)\} (?P<value>\S+)", re.MULTILINE)


def scraped() -> dict[tuple[str, str, str], float]:
    """(name, run, what tells it apart) -> value, of everything that is raylux's, on every node's endpoint."""
    import ray

    found: dict[tuple[str, str, str], float] = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        for line in _LINE.finditer(text):
            if line["name"].startswith("ray_raylux_"):
                tags = dict(re.findall(r'(\w+)="([^"]*)"', line["tags"]))
                which = " ".join(tags[name] for name in ("stage", "who", "cause", "state", "le") if name in tags)
                key = line["name"], tags["run"], which
                found[key] = found.get(key, 0.0) + float(line["value"])
    return found


def until(wanted: Mapping[tuple[str, str, str], float]) -> dict[tuple[str, str, str], float]:
    """What is scraped once it says what is wanted: processes tell their node every few seconds."""
    deadline = time.monotonic() + 60
    while True:
        found = scraped()
        if wanted.items() <= found.items() or time.monotonic() > deadline:
            assert {key: found.get(key) for key in wanted} == wanted
            return found
        time.sleep(0.5)


def test_a_nodes_endpoint_has_what_a_run_and_a_batch_did(tmp_path: Path, ray_cluster: dict[str, Any]) -> None:
    """The same numbers as in the log and the ledger; and the batch's answers have the bits of a run in process."""
    inputs = make_inputs(tmp_path / "inputs", "gpt2")
    config = inputs.config(tmp_path / "metered", "engine.backend=ray", "engine.workers=1", "engine.shards=1", *IDF)
    run_stages(config, ("corpus", "fit"), quiet=True)
    (tmp_path / "inbox").mkdir()
    for name, ids in (("one.jsonl", "a"), ("two.jsonl", "bc")):
        put(tmp_path / "inbox", name, ids)
    run, outcome = answer_files(str(tmp_path / "metered"), str(tmp_path / "inbox"), quiet=True)
    assert outcome.passes == 1
    assert same(facts(run, "two.jsonl/"), Own(inputs, *IDF).of(tmp_path / "inbox" / "two.jsonl")) == []
    events = parsed((tmp_path / "metered" / "progress.jsonl").read_bytes())
    wanted: dict[tuple[str, str, str], float] = {}

    def add(name: str, which: str, value: float) -> None:
        key = f"ray_raylux_{name}", "metered", which
        wanted[key] = wanted.get(key, 0.0) + value

    for event in events:
        if event["event"] == "unit":
            add("units_total", event["task"], 1)
            add("tokens_total", event["task"], event["tokens"]) if "tokens" in event else None
            if "slot" in event:
                add("unit_seconds_count", event["task"], 1)
        if event["event"] == "spent" and "bytes" in event:
            add("reduced_bytes_total", event["task"], event["bytes"])
    # Eigenbases and s_test are not summed; what is, goes over as float32 and is summed by unit: of A and S a triangle.
    store = RunFolder(str(tmp_path / "metered"))
    for stage, task in ((COVARIANCE, "covariance"), (MOMENTS, "lambda")):
        matrices = [store.group(unit.meta["key"]).read("matrix") for unit in store.units(stage).values()]
        sizes = [4 * triangle_entries([len(x)]) if stage == COVARIANCE else x.nbytes for x in matrices]
        units = wanted["ray_raylux_units_total", "metered", task]
        assert units == 5 and wanted["ray_raylux_reduced_bytes_total", "metered", task] == units * sum(sizes)
    found = until(wanted)
    assert {name for name, _, _ in found} <= metrics.exported()
    assert "ray_raylux_retries_total" not in {name for name, _, _ in found}, "nothing died"


def test_deaths_are_counted_and_gauges_stay(ray_cluster: dict[str, Any]) -> None:
    """As the pool, the shards' backend, a pass of sums and a batch tell of them."""
    meter = Meter("deaths")
    died = {"task": "score", "slot": 1, "state": "died", "reason": "its process ended", "cause": "process"}
    for kind, told_of in (
        ("worker", {"task": "score", "slot": 0, "state": "started"}),
        ("worker", {"task": "score", "slot": 1, "state": "started"}),
        ("worker", {**died, "unit": "u1"}),
        ("worker", {**died, "unit": None, "cause": "node"}),
        ("worker", {**died, "unit": "u2"}),
        ("shard", {"task": "lambda", "shard": 0, "state": "died", "reason": "timeout", "cause": "timeout"}),
        ("repeated", {"task": "lambda", "units": 3, "unit": "f3"}),
        ("task", {"task": "score", "stage": "score", "state": "running", "done": 7, "total": 60}),
        ("unit", {"task": "score", "unit": "u9", "slot": 0, "seconds": 2.0, "queue": 5}),
        ("batch", {"state": "files", "waiting": 2, "answered": 3, "aside": 1}),
        ("batch", {"state": "answered", "file": "one.jsonl"}),
        ("something else", {}),
    ):
        meter(kind, told_of)
    gauges = {
        ("ray_raylux_workers", "deaths", ""): 1.0,
        ("ray_raylux_queue_depth", "deaths", "score"): 5.0,
        ("ray_raylux_stage_done", "deaths", "score"): 7.0,
        ("ray_raylux_stage_size", "deaths", "score"): 60.0,
        ("ray_raylux_batch_files", "deaths", "waiting"): 2.0,
        ("ray_raylux_batch_files", "deaths", "answered"): 3.0,
        ("ray_raylux_batch_files", "deaths", "aside"): 1.0,
    }
    found = until(
        {
            **gauges,
            ("ray_raylux_restarts_total", "deaths", "score worker process"): 2.0,
            ("ray_raylux_restarts_total", "deaths", "score worker node"): 1.0,
            ("ray_raylux_restarts_total", "deaths", "lambda shard timeout"): 1.0,
            ("ray_raylux_retries_total", "deaths", "score"): 2.0,
            ("ray_raylux_retries_total", "deaths", "lambda"): 3.0,
        }
    )
    assert {name for name, _, _ in found} <= metrics.exported()
    # They are told again though nothing happens, as Ray would forget them.
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_instrument", lambda name: SimpleNamespace(set=lambda value, tags: told.append(name)))
        deadline = time.monotonic() + 60
        while len(told) < len(gauges) and time.monotonic() < deadline:
            time.sleep(0.1)
        meter.close()
    assert set(told) == {name.removeprefix("ray_") for name, _, _ in gauges}


def test_the_dashboard_draws_metrics_that_raylux_exports() -> None:
    text = (ROOT / "cluster" / "monitoring" / "grafana.json").read_text(encoding="utf-8")
    expressions = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    used = {name for expr in expressions for name in re.findall(r"\bray_raylux_[a-z_]+", expr)}
    assert used <= metrics.exported()
    drawn = {name for name in metrics.exported() if any(used & {name, re.sub("_(bucket|sum|count)$", "_bucket", name)})}
    assert drawn == metrics.exported(), "each is drawn"


@pytest.mark.parametrize("name", [*metrics.COUNTERS, *metrics.GAUGES, *metrics.HISTOGRAMS])
def test_every_metric_has_its_tags_and_is_described(name: str) -> None:
    tags, description = {**metrics.COUNTERS, **metrics.GAUGES, **metrics.HISTOGRAMS}[name]
    assert tags[0] == "run" and description
    assert f"`{name}`" in (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
