"""``raylux plan``: tables and JSON, with and without a cluster file, and one line where it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from raylux.cli import main
from raylux.cost import calibrate
from raylux.cost.machine import Cluster
from tests.small import Inputs, make_inputs

ROOT = Path(__file__).parent.parent
CLUSTER = str(ROOT / "configs" / "clusters" / "h100-8.yaml")
STAGES = ["covariance", "eigenbases", "lambda", "query", "prefilter", "score"]
SIZES = ["--sequences", "1000000", "--tokens", "512", "--queries", "1000"]
RATES: dict[str, Any] = {
    "float32_tflops": 0.1, "bfloat16_tflops": 0.4, "float64_tflops": 0.05, "eigh_tflops": 0.01, "bandwidth_gb_s": 10.0,
    "disk_gb_s": 1.0, "operation_us": 5.0, "host_gb_s": 10.0, "small": [[64, 0.5], [1024, 1.0]], "eigh_small": [],
    "bfloat16_small": [[64, 0.2], [1024, 1.0]], "bfloat16_odd": [[64, 0.1], [1024, 0.5]], "forming_tflops": 0.2,
    "attention_tflops": 0.05, "symmetric_tflops": 0.1, "gelu_ns": 5.0, "silu_ns": 2.0, "eigh_float32_tflops": 0.02,
}  # fmt: skip
LISTS = {"small", "bfloat16_small", "bfloat16_odd", "eigh_small"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("plan"))


@pytest.fixture
def config(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAYLUX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(inputs.sections(tmp_path / "run")), encoding="utf-8")
    return str(path)


def _llama(*more: str) -> list[str]:
    model = f"model.path={ROOT / 'configs' / 'models' / 'llama-3-8b'}"
    return ["plan", str(ROOT / "configs" / "llama-3-8b.yaml"), model, *SIZES, *more]


def test_a_plan_of_this_machine_reads_the_runs_own_inputs(config: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(calibrate, "measure", lambda *_: RATES)
    assert main(["plan", config, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in found["stages"]] == STAGES
    assert found["total"]["device_hours"] > 0 and found["total"]["dollars"] is None
    assert all(choice["in_engine"] for choice in found["choices"])
    assert main(["plan", config]) == 0
    text = capsys.readouterr().out
    assert all(stage in text for stage in STAGES)
    assert not (Path(config).parent / "run").exists()


def test_what_is_read_from_disk_is_no_part_of_a_worker(config: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(calibrate, "measure", lambda *_: RATES)
    plans = []
    for more in ([], ['model.device_map={"": cpu, model.layers: disk}']):
        assert main(["plan", config, "--json", *more]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    plain, disk = ({stage["name"]: stage for stage in plan["stages"]} for plan in plans)
    for name in ("covariance", "lambda", "score"):
        assert disk[name]["worker_bytes"] < plain[name]["worker_bytes"]
    assert disk["covariance"]["flops"] > plain["covariance"]["flops"]  # a block that is read runs twice
    (choice,) = [choice for choice in plans[1]["choices"] if choice["name"] == "devices"]
    assert choice["value"] == "1 for a worker" and "read each time they run" in choice["reason"]


def test_rates_are_measured_once_and_again_when_asked(config: str, monkeypatch: Any, capsys: Any) -> None:
    calls = []
    monkeypatch.setattr(calibrate, "measure", lambda *facts: calls.append(facts) or RATES)
    for more, count in (([], 1), ([], 1), (["--calibrate"], 2)):
        assert main(["plan", config, "--json", *more]) == 0
        assert len(calls) == count
    # What was measured again is what later plans go by.
    monkeypatch.setattr(calibrate, "measure", lambda *_: RATES | {"disk_gb_s": 2.0})
    assert main(["plan", config, "--json", "--calibrate"]) == 0
    monkeypatch.setattr(calibrate, "measure", lambda *_: pytest.fail("measured once more"))
    assert main(["plan", config, "--json"]) == 0
    assert calibrate.measured(1, "cpu")["disk_gb_s"] == 2.0
    capsys.readouterr()


def test_this_machine_has_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured as for a plan, on smaller matrices: what is asserted holds of rates of any size."""
    for name, sizes in (("_GEMM_SIZES", (32, 64, 128)), ("_ROTATED_SIZES", (64, 128)), ("_EIGH_SIZES", (64, 128)),
                        ("_FORMED", (128, 64, 4)), ("_DOTTED", 1 << 14), ("_SYMMETRIC", (256, 64)),
                        ("_ELEMENTS", 1 << 20), ("_ACTIVATED", 1 << 16)):  # fmt: skip
        monkeypatch.setattr(calibrate, name, sizes)
    rates = calibrate.measure(1, "cpu", tmp_path)
    assert set(rates) == set(RATES)
    assert all(value > 0 for name, value in rates.items() if name not in LISTS)
    assert all(0 < share <= 1 for name in LISTS - {"eigh_small"} for _, share in rates[name])
    # A table is read by its sizes, the smallest first.
    assert all([size for size, _ in rates[name]] == sorted({size for size, _ in rates[name]}) for name in LISTS)
    parsed = Cluster.parse(
        {"devices": 1, "host_memory_gb": 1.0, "network_gb_s": 1.0, "disk_gb_s": 1.0, "disk_tb": 1.0,
         "device": {name: rate for name, rate in rates.items() if name != "disk_gb_s"}
         | {"kind": "d", "memory_gb": 1.0, "gpu": False}}, "here"
    ).device  # fmt: skip
    assert parsed.seconds(1e9, "bfloat16", 512, odd=True) > 0


def test_a_model_that_is_not_here_is_planned_from_its_config_alone(monkeypatch: Any, capsys: Any) -> None:
    # Files named by the config (queries, a gated model, a hub's data set) are not touched where sizes are given.
    assert (
        main(
            _llama("--cluster", CLUSTER, "--candidates", "1000000", "--json", "fit.sequences=100000", "score.best=100")
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["device_hours"] < 24
    assert found["total"]["dollars"] == pytest.approx(3 * found["total"]["device_hours"])
    ahead = [choice["name"] for choice in found["choices"] if not choice["in_engine"]]
    assert "solve" in ahead and not any("passes" in name for name in ahead)
    assert found["cluster"]["devices"] == 8


def test_sums_that_a_device_does_not_hold_are_planned_in_passes(capsys: Any) -> None:
    assert main(_llama("--cluster", CLUSTER, "--candidates", "1000000", "--json")) == 0
    chosen = {choice["name"]: choice for choice in json.loads(capsys.readouterr().out)["choices"]}
    for name in ("covariance passes", "Λ passes"):
        assert chosen[name]["value"].startswith("2, ") and chosen[name]["in_engine"]
    assert main(_llama("--cluster", CLUSTER, "--candidates", "1000000", "fit.passes=1")) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "fit.passes=1 is too few" in said.err and "set it to 2" in said.err


def test_what_cannot_work_is_one_line(tmp_path: Path, capsys: Any) -> None:
    data = yaml.safe_load(Path(CLUSTER).read_text(encoding="utf-8"))
    data["device"]["memory_gb"] = 10
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    assert main(_llama("--cluster", str(tmp_path / "small.yaml"))) == 2
    said = capsys.readouterr()
    assert said.out == ""
    change = "engine.gpus_per_worker=4", "model.device_map=balanced"
    assert said.err.count("\n") == 1 and "take {} with {}".format(*change) in said.err
    data["device"]["memory_gb"] = 14
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    assert main(_llama("--cluster", str(tmp_path / "small.yaml"), *change)) == 0
    said = capsys.readouterr()
    assert "4 for a worker, which take turns" in said.out and "cuda:3" in said.out and said.err == ""
