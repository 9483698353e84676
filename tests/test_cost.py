"""The cost model against real tensors and counted FLOPs, against the published figures, and where it must refuse."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raylux.batches import TokenRow, collate
from raylux.capture import Capture
from raylux.cost import contraction, costs, fit, sizes
from raylux.cost.machine import Cluster, Device, eigh_flops
from raylux.cost.model import ModelShape
from raylux.cost.passes import covariance_held, largest, split
from raylux.cost.planner import plan_run
from raylux.cost.running import rotation_flops
from raylux.cost.workload import Workload
from raylux.curvature import Covariances, add_second_moment, eigenbases
from raylux.errors import UserError
from raylux.groups import input_groups
from raylux.influence.dots import LayerQueries
from raylux.layers import coverage
from raylux.store import RunFolder
from tests.architectures import build
from tests.small import make_inputs

ROOT = Path(__file__).parent.parent
TOKENS, ROWS = 24, 3


def _shape(name: str) -> tuple[Any, ModelShape]:
    model = build(name)
    model.config._attn_implementation = "eager"
    covered = coverage(model)
    return model, ModelShape.of(model, covered, input_groups(model, covered.tracked))


def _captured(model: Any, shape: ModelShape, counter: FlopCounterMode) -> Any:
    capture = Capture(model.requires_grad_(False), shape.tracked, dict(shape.groups))
    ids = torch.arange(2, 2 + TOKENS).numpy()
    batch = collate([TokenRow(ids, ids) for _ in range(ROWS)], range(ROWS), TOKENS)
    with counter:
        return batch, capture.run(batch)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_forward_and_backward_are_counted_to_the_last_flop(name: str) -> None:
    model, shape = _shape(name)
    counter = FlopCounterMode(display=False)
    _captured(model, shape, counter)
    predicted = ROWS * TOKENS * (shape.forward_flops(TOKENS) + shape.backward_flops(TOKENS))
    # Rotary positions are an outer product of T positions with half a head's frequencies, once per batch.
    beside = counter.get_total_flops() - predicted
    assert 0 <= beside <= 0.01 * predicted
    if name == "gpt2":
        assert beside == 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_moments_and_dots_are_counted_to_the_last_flop_and_covariances_to_the_byte(name: str) -> None:
    model, shape = _shape(name)
    batch, captured = _captured(model, shape, FlopCounterMode(display=False))
    tokens = ROWS * TOKENS
    sums = Covariances()
    sums.add(captured.inputs, captured.grads, batch.mask)
    assert sizes.covariance_bytes(shape.tracked, shape.groups) == sum(
        x.numel() * x.element_size() for x in (*sums.inputs.values(), *sums.grads.values())
    )
    for layer in shape.tracked:
        # In float64: in float32 rows of gradients are filled up to whole vectors, which the model does not count.
        a, g = captured.inputs[shape.groups[layer.name]].double(), captured.grads[layer.name].double()
        zeros = torch.zeros(layer.shape, dtype=torch.float64)
        with FlopCounterMode(display=False) as counter:
            add_second_moment(zeros, a, g, *(torch.eye(side, dtype=torch.float64) for side in layer.shape[::-1]))
        rotation, _ = rotation_flops(layer, TOKENS)
        assert counter.get_total_flops() == pytest.approx(tokens * (rotation + 2 * layer.parameters), rel=1e-12)
        queries = 8
        dense, low, *_ = contraction.forms(*layer.shape, TOKENS, queries, 2, 4, 4)
        with FlopCounterMode(display=False) as counter:
            built = LayerQueries.build(layer.shape, [zeros + 1] * queries, TOKENS)
            built.scores([(a, g)])
        assert counter.get_total_flops() == ROWS * (dense.forming + dense.dots)
        factors = zeros[:, :2] + 1, zeros[:2].T + 1
        built = LayerQueries(queries, layer.shape, torch.float64, factors=dict.fromkeys(range(queries), factors))
        with FlopCounterMode(display=False) as counter:
            built.scores([(a, g)])
        assert counter.get_total_flops() == ROWS * low.dots


def test_bytes_of_a_run_are_those_of_its_arrays(tmp_path: Path) -> None:
    """Factors, s_test and scores of a real run, dense queries, against the plan's disk by stage."""
    inputs = make_inputs(tmp_path)
    inputs.run(tmp_path / "run", "query.max_error=0", "score.layers=false", "score.token_top=0")
    from raylux.planning import Sizes, _workload

    config = inputs.config(tmp_path / "run", "query.max_error=0")
    work, _ = _workload(config, Sizes(), "cpu")
    plan = plan_run(work, _cluster())
    store = RunFolder(str(tmp_path / "run"))

    def stored(stage: str, *names: str) -> int:
        total = 0
        for manifest in store.units(stage).values():
            for key in manifest.meta.get("layers") or {"": manifest.meta["key"]}:
                group = store.group((manifest.meta.get("layers") or {"": manifest.meta["key"]})[key])
                total += sum(group.read(name).nbytes for name in names if name in group)
        return total

    from raylux.ledger import COVARIANCE, EIGEN, MOMENTS, QUERY, SCORE

    assert plan.stage("covariance").disk_bytes == stored(COVARIANCE, "matrix")
    assert plan.stage("eigenbases").disk_bytes == stored(EIGEN, "vectors")
    assert plan.stage("lambda").disk_bytes == stored(MOMENTS, "matrix")
    assert plan.stage("query").disk_bytes == stored(QUERY, "dense")
    scores = sum(store.group(m.meta["key"]).read("total").nbytes for m in store.units(SCORE).values())
    assert plan.stage("score").disk_bytes == scores


# ---------------------------------------------------------------------------------- published figures


@cache
def _published(name: str) -> ModelShape:
    from raylux.config import Config
    from raylux.planning import find_shape

    sections = {"run": {"folder": "x"}, "corpus": {"path": "x"}, "queries": {"path": "x"}}
    model = {"path": str(ROOT / "configs" / "models" / name)}
    return find_shape(Config.parse({**sections, "model": model}))[0]


@pytest.mark.parametrize(
    ("name", "parameters", "covariances"),
    [("smollm2-135m", 134.5e6, 0.93e9), ("llama-3-8b", 8.03e9, 83e9), ("llama-3-70b", 70.6e9, 832e9)],
)
def test_models_have_the_sizes_that_are_published(name: str, parameters: float, covariances: float) -> None:
    shape = _published(name)
    assert shape.parameters == pytest.approx(parameters, rel=2e-3)
    assert sizes.covariance_bytes(shape.tracked, shape.groups) == pytest.approx(covariances, rel=5e-3)


def test_rotating_tokens_first_at_8b_takes_54_instead_of_417_gflop_per_token() -> None:
    tracked = _published("llama-3-8b").tracked
    forming = 2 * sum(layer.parameters for layer in tracked)
    tokens = forming + sum(rotation_flops(layer, 512)[0] for layer in tracked)
    gradients = forming + sum(2 * layer.parameters * (layer.inputs + layer.outputs) / 512 for layer in tracked)
    assert (round(tokens / 1e9), round(gradients / 1e9)) == (54, 417)


# ------------------------------------------------------------------------------------------- choices


def _cluster(**changes: Any) -> Cluster:
    device = {"kind": "d", "memory_gb": 80.0, "bandwidth_gb_s": 1000.0, "float32_tflops": 10.0}
    device |= {"bfloat16_tflops": 100.0, "float64_tflops": 5.0, "eigh_tflops": 1.0}
    usual = {"devices": 8, "host_memory_gb": 2000.0, "network_gb_s": 50.0, "disk_gb_s": 5.0, "disk_tb": 100.0}
    device |= changes.pop("device", {})
    return Cluster.parse({**usual, **changes, "device": device})


def _work(**changes: Any) -> Workload:
    usual: dict[str, Any] = {
        "model": _published("llama-3-8b"), "dtype": "bfloat16", "contraction": "bfloat16", "basis": True,
        "moments": True, "fit_sequences": 1000, "corpus": 10_000, "candidates": 10_000, "tokens": 512.0,
        "queries": 100, "query_tokens": 64.0, "batch_tokens": None, "unit_tokens": 100_000, "score_unit": 256,
    }  # fmt: skip
    return Workload(**{**usual, **changes})


def _said(work: Workload, cluster: Cluster, can: frozenset[str] = costs.AHEAD) -> str:
    with pytest.raises(UserError) as error:
        plan_run(work, cluster, can)
    return str(error.value)


def test_what_is_refused_names_a_change_and_that_change_helps() -> None:
    assert "model.dtype=bfloat16" in _said(_work(dtype="float32", tokens=64.0), _cluster(device={"memory_gb": 30.0}))
    large = _work(model=_published("llama-3-70b"))
    assert "take engine.gpus_per_worker=4 with model.device_map=balanced" in _said(large, _cluster())
    plan_run(large, _cluster(devices_per_worker=4), costs.AHEAD)
    assert "take 2 nodes" in _said(_work(), _cluster(host_memory_gb=2.2), costs.ENGINE | {costs.SPLIT})
    line = _said(_work(), _cluster(disk_tb=0.1))
    assert "disk_tb: " in line
    plan_run(_work(), _cluster(disk_tb=float(line.rpartition("disk_tb: ")[2])), costs.AHEAD)
    # Passes that the config sets too few are refused, with those that would do.
    line = _said(_work(passes=1), _cluster())
    assert "fit.passes=1 is too few" in line
    plan_run(_work(passes=int(line.rpartition("set it to ")[2].split(",")[0])), _cluster(), costs.AHEAD)


def test_passes_are_as_few_as_fit_and_take_every_layer_once() -> None:
    clusters = [_cluster(device={"memory_gb": size}) for size in (400.0, 80.0)]
    few, many = (plan_run(_work(), one, costs.AHEAD).stage("covariance") for one in clusters)
    assert few.tasks < many.tasks
    assert few.works[0].flops < many.works[0].flops  # every pass runs the model forward
    assert few.works[3].flops == many.works[3].flops  # and every layer's products are taken once
    assert many.worker_bytes <= _cluster().device.memory


@cache
def _llama() -> ModelShape:
    return _shape("llama")[1]


def _small(**changes: Any) -> Workload:
    usual = {"model": _llama(), "dtype": "float32", "contraction": "bfloat16", "tokens": 24.0, "fit_sequences": 100}
    return _work(**{**usual, "corpus": 100, "candidates": 100, "batch_tokens": 96, **changes})


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_device_that_holds_a_part_of_the_sums_makes_passes_of_a_small_model(count: int) -> None:
    work = _small()
    model, held = work.model, covariance_held(work.model.groups, work.stored)
    beside = fit.base_bytes(_cluster().device) + fit.model_bytes(work)
    beside += work.batch_tokens * model.activation_bytes(work.itemsize, model.tracked)
    need = beside + largest(split(model.tracked, model.groups, count), held)
    blocks, _ = fit.passes(work, _cluster(device={"memory_gb": (need + 1) / 0.9e9}), held, 0.0)
    assert len(blocks) == count
    more, _ = fit.passes(work, _cluster(device={"memory_gb": (need - 1) / 0.9e9}), held, 0.0) if count < 4 else ([], 0)
    assert len(more) > count or count == 4


def test_what_is_decomposed_in_float32_takes_its_rate() -> None:
    """The engine's own choice: large matrices of a kind with Λ on a CPU, unless the config says otherwise."""
    cpu, work = _cluster(device={"gpu": False, "eigh_float32_tflops": 2.0}), _work(contraction="float32")

    def seconds(cluster: Cluster, **changes: Any) -> float:
        return fit.eigenbases(dataclasses.replace(work, **changes), cluster, costs.ENGINE_CPU)[0].works[0].seconds

    quick, slow = seconds(cpu), seconds(cpu, eigh="float64")
    assert slow / 2 < quick < slow
    assert seconds(cpu, moments=False) == slow
    assert seconds(cpu, moments=False, eigh="float32") == quick
    assert seconds(_cluster(device={"eigh_float32_tflops": 2.0})) < slow  # a GPU: float64, and nothing copied
    small = _small()
    assert eigenbases._LEAST == fit.QUICK_EIGH
    assert {fit.eigh_precision(small, cpu.device, n) for n in (64, 511)} == {"float64"}


def test_symmetric_updates_take_half_the_flops() -> None:
    full, half = (plan_run(_small(), _cluster(), can).stage("covariance") for can in (costs.ENGINE, costs.ENGINE_CPU))
    found = {stage: {work.kind: work.flops for work in stage.works} for stage in (full, half)}
    assert found[half]["covariance products"] == 0.5 * found[full]["covariance products"]
    assert found[half]["forward"] == found[full]["forward"]


def test_what_is_kept_of_the_fit_takes_no_second_pass() -> None:
    """All, half and none of the captured tensors on disk; fitted sequences that are scored need none either."""
    work = _small()
    model, shape = _shape("llama")
    _, captured = _captured(model, shape, FlopCounterMode(display=False))
    tensors = [*captured.inputs.values(), *captured.grads.values()]
    assert work.captured_bytes == 100 * 24 * sum(x.bfloat16().element_size() * x.shape[-1] for x in tensors)

    def forward(keep: float, scored: bool = False) -> tuple[float, float]:
        size = dataclasses.replace(work, scores_fit=scored).captured_bytes
        found = dataclasses.replace(work, keep_bytes=keep * size / 8, scores_fit=scored)
        plan = plan_run(found, _cluster(), costs.ENGINE)
        one, two = ({w.kind: w.flops for w in plan.stage(name).works}["forward"] for name in ("lambda", "score"))
        return one, two

    none, all_of_it = forward(0), forward(2)
    assert forward(0.5)[0] == pytest.approx(none[0] / 2)
    assert all_of_it == (0, none[1])
    assert forward(2, scored=True) == (0, 0)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.25, 0.5, 2.0])
def test_a_and_s_of_a_quarter_run_the_model_over_a_quarter(keep: float) -> None:
    """What A and S leave out is run once, for Λ; kept tensors serve no more than what was run for them."""

    def forward(**changes: Any) -> tuple[float, float]:
        plan = plan_run(_small(keep_bytes=keep * _small().captured_bytes / 8, **changes), _cluster(), costs.ENGINE)
        one, two = ({w.kind: w.flops for w in plan.stage(name).works}["forward"] for name in ("covariance", "lambda"))
        return one, two

    whole, quarter = forward(), forward(covariance_sequences=25)
    assert quarter[0] == pytest.approx(whole[0] / 4)
    assert quarter[1] == pytest.approx(whole[0] * (1 - min(keep, 0.25)))
    assert forward(covariance_sequences=1000) == whole


def test_a_form_is_chosen_by_its_whole_cost() -> None:
    def best(sequences: int, queries: int, rank: int, room: float = math.inf) -> str:
        forms = contraction.forms(4096, 14336, 512, queries, rank, 256, 2)
        names = frozenset(form.name for form in forms)
        return contraction.cheapest(forms, names, sequences, queries, 32, room).name

    assert best(1_000_000, 1, 4) == contraction.TOKENS
    assert best(1_000_000, 1000, 64) == contraction.DENSE
    assert best(1_000_000, 1000, 64, room=10e9) in (contraction.TOKENS, contraction.EXPANDED)
    # Few candidates do not pay for the way back of many queries.
    assert best(10, 1000, 4096) == contraction.EIGENBASIS


def test_time_follows_rates_tasks_and_the_longest_piece() -> None:
    device = Device(
        kind="d", memory_gb=1.0, bandwidth_gb_s=10.0, float32_tflops=2.0, bfloat16_tflops=4.0, float64_tflops=1.0,
        eigh_tflops=1.0, utilisation=0.5, small=((64, 0.1), (1024, 1.0)),
    )  # fmt: skip
    assert device.seconds(1e12, "float32") == 1.0
    assert device.seconds(1e12, "float32", 64) == pytest.approx(10.0)
    assert device.seconds(1e12, "float32", touched=20e9) == 2.0
    assert device.eigh_seconds(1000) == eigh_flops(1000) / 1e12
    assert device.seconds(1e12, "float32", touched=5e9) == 1.0
    # A core of a CPU computes or moves, and has rates of its own for what it does most.
    core = device.model_copy(
        update={
            "gpu": False, "eigh_float32_tflops": 2.0, "attention_tflops": 0.1, "symmetric_tflops": 0.5, "gelu_ns": 3.0,
            "bfloat16_small": ((64, 0.2), (1024, 1.0)), "bfloat16_odd": ((64, 0.1), (1024, 0.5)), "host_gb_s": 2.0,
            "forming_tflops": 0.25,
        }
    )  # fmt: skip
    assert core.seconds(1e12, "float32", touched=5e9) == 1.5
    assert core.seconds(2e12, "bfloat16", 1024) == 1.0 and core.seconds(2e12, "bfloat16", 1024, odd=True) == 2.0
    assert core.eigh_seconds(1000, "float32") == core.eigh_seconds(1000) / 2
    assert device.eigh_seconds(1000, "float32") == device.eigh_seconds(1000)
    assert core.attention_seconds(1e11, "float32", 64) == 1.0
    assert core.symmetric_seconds(5e11, "float32", 64, 10e9) == 2.0
    assert core.symmetric_seconds(5e11, "float64", 1024, 10e9) == 2.0
    assert core.forming_seconds(25e10, "bfloat16", 64, 10e9) == 2.0
    assert core.forming_seconds(1e12, "float32", 1024) == 1.0
    assert core.activation_seconds("gelu", 1e9) == 3.0 and core.activation_seconds("relu", 1e9) == 0.0
    assert core.renewing(2e9) == 1.0 and device.renewing(2e9) == 0.0
    stage = costs.StageCost("s", (costs.Work("w", 1.0, 0.0, 60.0),), 6, 4, 4, 0.0, 0.0, 0.0, 0.0)
    assert stage.seconds == 20.0 and stage.idle == pytest.approx(0.25)
    assert dataclasses.replace(stage, longest=50.0).seconds == 50.0


def test_a_cluster_file_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    for path in (ROOT / "configs" / "clusters").glob("*.yaml"):
        assert Cluster.load(path).device.kind == "H100"
    text = (ROOT / "configs" / "clusters" / "h100-8.yaml").read_text(encoding="utf-8")
    for old, new, said in (
        ("devices: 8", "devices: 0", "devices"),
        ("disk_tb", "disc_tb", "disc_tb"),
        (text, "[]", "mapping"),
    ):
        (tmp_path / "c.yaml").write_text(text.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(UserError, match=said):
            Cluster.load(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        Cluster.load(tmp_path / "none.yaml")
