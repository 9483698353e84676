"""Layer passes: the bits of a fit in one pass, whatever their number, and whatever happens on the way."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylux import planning
from raylux.api import run_stages
from raylux.batches import collate
from raylux.capture import Capture
from raylux.cost import fit as cost_fit
from raylux.cost.costs import Passes
from raylux.cost.machine import USABLE, Cluster, Device
from raylux.cost.passes import Rooms, covariance_held, cut, largest, moments_held, split
from raylux.curvature import KINDS
from raylux.engine import device
from raylux.engine.capacity import Demand, settled
from raylux.engine.capacity import fit as fit_supply
from raylux.engine.context import Context
from raylux.engine.demand import demand_of
from raylux.engine.local import LocalBackend
from raylux.engine.shard import FactorShard
from raylux.engine.work import Failure, Job, Result
from raylux.engine.worker import GradientWorker
from raylux.errors import UserError
from raylux.groups import input_groups
from raylux.layers import TrackedLayer
from raylux.ledger import COVARIANCE, MOMENTS, SNAPSHOT
from raylux.models import coverage
from raylux.store import RunFolder
from tests.architectures import build
from tests.interrupts import Interrupt
from tests.small import SEQUENCES, Inputs, contents, differing, factors, make_inputs
from tests.test_capture import rows_of

PLAIN = ("query.max_error=0", "score.layers=false", "score.token_top=0")
# A snapshot after every unit: as many places to go on from as there can be.
OFTEN = "fit.snapshot=0"


def fit(inputs: Inputs, folder: Path, *overrides: str) -> dict[str, np.ndarray]:
    """Fit, and nothing else; the factors by name."""
    run_stages(inputs.config(folder, *overrides), ("corpus", "fit"), quiet=True)
    return factors(RunFolder(str(folder)))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Gate and up projection read the same tensor; four input groups."""
    return make_inputs(tmp_path_factory.mktemp("inputs"), "llama")


@pytest.fixture(scope="module")
def once(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return fit(inputs, tmp_path_factory.mktemp("once"), "fit.passes=1")


# ------------------------------------------------------------------------------------------- which layers

SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans()), min_size=1, max_size=12)


def _layers(shapes: Sequence[tuple[int, int, bool]]) -> tuple[list[TrackedLayer], dict[str, str]]:
    """Layers of these sizes; where the flag is set, one reads what the layer before it reads."""
    layers, groups = [], {}
    for place, (inputs, outputs, shares) in enumerate(shapes):
        shares = shares and place > 0
        leader = groups[f"l{place - 1}"] if shares else f"l{place}"
        width = next(layer.inputs for layer in layers if layer.name == leader) if shares else inputs
        layers.append(TrackedLayer(f"l{place}", width, outputs, bias=False, conv1d=False))
        groups[f"l{place}"] = leader
    return layers, groups


@given(SHAPES, st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_a_pass_is_a_run_of_whole_input_groups_the_last_first(shapes: Any, count: int) -> None:
    layers, groups = _layers(shapes)
    blocks = split(layers, groups, count)
    assert [layer for block in reversed(blocks) for layer in block] == layers
    assert len(blocks) == min(count, len(set(groups.values()))) and all(blocks)
    homes = {name: at for at, block in enumerate(blocks) for name in (layer.name for layer in block)}
    assert all(homes[name] == homes[leader] for name, leader in groups.items())


@given(SHAPES, st.floats(0.0, 1.2))
@settings(max_examples=100, deadline=None)
def test_passes_are_as_few_as_fit(shapes: Any, share: float) -> None:
    layers, groups = _layers(shapes)
    held = covariance_held(groups, 4)
    room = share * sum(map(held, layers))
    blocks = cut(layers, groups, held, Rooms.one(room, layers))
    fitting = [n for n in range(1, len(layers) + 1) if largest(split(layers, groups, n), held) <= room]
    assert (None if blocks is None else len(blocks)) == min(fitting, default=None)


def test_the_backward_pass_stops_at_the_lowest_layer_of_the_pass() -> None:
    model = build("llama", num_hidden_layers=3)
    layers = coverage(model).tracked
    capture = Capture(model, layers, input_groups(model, layers))
    batch = collate(rows_of([7, 12]), [0, 1], 16)
    whole = capture.run(batch)
    last = [layer.name for layer in layers if ".2." in layer.name]
    reached: Counter[str] = Counter()

    def watch(name: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(lambda grad: reached.update([name]))

        return hook

    for name in ("model.layers.0", "model.layers.1"):
        model.get_submodule(name).register_forward_hook(watch(name))
    capture.run(batch)
    assert reached == {"model.layers.0": 1, "model.layers.1": 1}
    reached.clear()
    part = capture.run(batch, wanted=last)
    assert not reached and list(part.grads) == last
    for name, g in part.grads.items():
        assert torch.equal(g, whole.grads[name])
    for name, a in part.inputs.items():
        assert torch.equal(a, whole.inputs[name])


# ------------------------------------------------------------------------------------------- equal bits


@pytest.mark.parametrize("passes", [2, 4])
def test_any_number_of_passes_gives_the_bits_of_one(
    inputs: Inputs, once: dict[str, np.ndarray], tmp_path: Path, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With labels that are drawn once, for the first pass of all."""
    drawn: Counter[str] = Counter()
    covered: list[tuple[str, frozenset[str]]] = []
    draw, call = GradientWorker._draw, LocalBackend.run
    monkeypatch.setattr(GradientWorker, "_draw", lambda *args: drawn.update(["drawn"]) or draw(*args))

    def watched(self: LocalBackend, job: Job, method: str, parts: bool) -> Result:
        before = drawn["drawn"]
        result = call(self, job, method, parts)
        if method in ("covariance_unit", "moment_unit"):
            covered.append((method, frozenset(name for names in job.args[2] for name in names)))
            assert (drawn["drawn"] > before) == (len({method + str(own) for method, own in covered}) == 1)
        return result

    monkeypatch.setattr(LocalBackend, "run", watched)
    assert differing(fit(inputs, tmp_path, f"fit.passes={passes}"), once) == []
    for method in ("covariance_unit", "moment_unit"):
        parts = list(dict.fromkeys(own for what, own in covered if what == method))
        assert len(parts) == passes and sum(map(len, parts)) == len(frozenset.union(*parts)) == 6
        assert "model.layers.1.mlp.down_proj" in parts[0] and "model.layers.0.mlp.gate_proj" in parts[-1]


@pytest.mark.parametrize("kind", ["diagonal", "tekfac"])
def test_every_kind_of_curvature(inputs: Inputs, tmp_path: Path, kind: str) -> None:
    one, three = (
        fit(inputs, tmp_path / passes, f"fit.passes={passes}", f"curvature.kind={kind}") for passes in ("1", "3")
    )
    assert one and differing(three, one) == []


def test_experts(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs", "mixtral", num_hidden_layers=1)
    one, five = (fit(inputs, tmp_path / passes, f"fit.passes={passes}") for passes in ("1", "5"))
    assert differing(five, one) == []


def test_what_is_kept_of_all_passes_serves_the_scores(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as one pass keeps; where half of it fits, some sequences have all their layers."""
    workers: list[GradientWorker] = []
    usual = GradientWorker.prepare
    monkeypatch.setattr(GradientWorker, "prepare", lambda self: workers.append(self) or usual(self))

    def kept(which: str) -> set[int]:
        return {row for row in range(SEQUENCES) if workers[-1]._kept.has(row, which, torch.float32)}

    # Sequences by themselves: some fitted ones are padded as scored ones are.
    how = (*PLAIN, "engine.batch_tokens=8")
    inputs.run(tmp_path / "one", *how, "fit.passes=1")
    wanted, whole, given = contents(tmp_path / "one"), kept("fit"), kept("given")
    assert len(whole) == SEQUENCES and given
    size = workers[-1]._kept._kept._end
    inputs.run(tmp_path / "three", *how, "fit.passes=3")
    assert differing(contents(tmp_path / "three"), wanted) == []
    assert (kept("fit"), kept("given"), workers[-1]._kept._kept._end) == (whole, given, size)
    inputs.run(tmp_path / "half", *how, "fit.passes=3", f"engine.keep_captured={size // 2}")
    assert differing(contents(tmp_path / "half"), wanted) == []
    assert SEQUENCES / 4 < len(kept("fit")) < SEQUENCES * 3 / 4


# ------------------------------------------------------------------------------------------- interrupted

CALLS: tuple[tuple[type, str, int], ...] = (
    (RunFolder, "commit", 60),
    (RunFolder, "write", 70),
    (RunFolder, "forget", 20),
    (RunFolder, "delete", 20),
    (GradientWorker, "covariance_unit", 10),
    (GradientWorker, "moment_unit", 10),
    (FactorShard, "begin", 8),
    (FactorShard, "add", 20),
    (FactorShard, "snapshot", 20),
    (FactorShard, "write_covariances", 2),
    (FactorShard, "write_moments", 2),
)
POINTS = st.tuples(
    st.sampled_from(CALLS).flatmap(lambda call: st.tuples(st.just(call), st.integers(1, call[2]), st.booleans())),
    st.integers(1, 4),
)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(points=st.lists(POINTS, min_size=1, max_size=2), last=st.integers(1, 4))
def test_interrupted_anywhere_it_goes_on_in_any_number_of_passes(
    inputs: Inputs,
    once: dict[str, np.ndarray],
    tmp_path_factory: pytest.TempPathFactory,
    points: list[tuple[tuple[tuple[type, str, int], int, bool], int]],
    last: int,
) -> None:
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    for ((owner, method, _), call, after), passes in points:
        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            Interrupt(patch, owner, method, call, after)
            fit(inputs, folder, OFTEN, f"fit.passes={passes}")
    assert differing(fit(inputs, folder, OFTEN, f"fit.passes={last}"), once) == []
    assert not RunFolder(str(folder)).committed(SNAPSHOT)


@pytest.mark.parametrize(("passes", "again"), [(1, 2), (4, 4 * 5)])
def test_a_snapshot_of_more_layers_than_now_fit_is_not_gone_on_from(
    inputs: Inputs,
    once: dict[str, np.ndarray],
    tmp_path: Path,
    passes: int,
    again: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next command may have less memory; with as much, the two units that are missing are all that is computed."""
    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        Interrupt(patch, GradientWorker, "covariance_unit", 4, False)
        fit(inputs, tmp_path, OFTEN, "fit.passes=1")
    calls, usual = Counter[str](), GradientWorker.covariance_unit
    monkeypatch.setattr(GradientWorker, "covariance_unit", lambda *args: calls.update(["unit"]) or usual(*args))
    assert differing(fit(inputs, tmp_path, OFTEN, f"fit.passes={passes}"), once) == []
    assert calls["unit"] == again


# ------------------------------------------------------------------------------------------- given up


@pytest.mark.parametrize("at", [("covariance_unit", 2), ("moment_unit", 3)])
def test_a_unit_given_up_in_a_later_pass_is_left_out_of_all_layers(
    inputs: Inputs, tmp_path: Path, at: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, turn = at
    run, tried = LocalBackend.run, Counter[str]()

    def dies(self: LocalBackend, job: Job, called: str, parts: bool) -> Result:
        if called == method and job.name == "f000002":
            tried["times"] += 1
            if tried["times"] >= turn:
                return Result(job, failure=Failure(3, "its process ended"))
        return run(self, job, called, parts)

    monkeypatch.setattr(LocalBackend, "run", dies)
    late = fit(inputs, tmp_path / "late", "fit.passes=4")
    assert tried["times"] == turn, "it is not tried again"
    turn = 1
    tried.clear()
    assert differing(late, fit(inputs, tmp_path / "first", "fit.passes=1")) == []
    stage = COVARIANCE if method == "covariance_unit" else MOMENTS
    counts = {manifest.meta["sequences"] for manifest in RunFolder(str(tmp_path / "late")).units(stage).values()}
    assert len(counts) == 1 and counts != {60}


# ------------------------------------------------------------------------------------------- how many


@pytest.mark.parametrize(("room", "passes"), [(8, (1, 1)), (7, (2, 1)), (4, (2, 2)), (3, (3, 2)), (1, (8, 6))])
def test_each_stage_makes_as_few_passes_as_fit_a_cluster(room: int, passes: tuple[int, int]) -> None:
    """Eight units of memory for the covariances, six for Λ; where nothing fits, as many as may be."""

    def ask(wanted: Passes) -> Demand:
        size = max(math.ceil(8 / wanted.covariance), math.ceil(6 / wanted.moments))
        return Demand(1, 1, 1, False, size, 0, passes=wanted)

    asked = dataclasses.replace(ask(Passes()), most=8, otherwise=ask)
    supply = {"CPU": 1.0, "memory": float(room)}
    found = settled(asked, lambda one: fit_supply(one, supply))
    assert found.passes == Passes(*passes) and found.worker_bytes <= room
    assert settled(found, lambda one: fit_supply(one, supply)) == found
    assert settled(asked, lambda one: fit_supply(one, {**supply, "memory": 0.0})).passes == Passes(8, 8)


def test_memory_that_holds_a_part_of_the_sums_makes_passes_of_them(
    inputs: Inputs, once: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In process, by the memory that is free; each stage makes as few as it needs."""
    found: list[Passes] = []
    start = Context._start

    def watched(self: Context) -> Any:
        backend = start(self)
        found.append(self._passes)
        return backend

    monkeypatch.setattr(Context, "_start", watched)
    model = build("llama")
    layers = coverage(model).tracked
    groups = input_groups(model, layers)
    ask = demand_of(
        inputs.config("x").engine, "float32", "cpu", layers, groups, coverage(model).parameters, 1, False, "auto"
    )
    assert ask.otherwise is not None
    inputs = make_inputs(tmp_path / "inputs", "llama")
    inputs.ask("a")
    for passes in (Passes(1, 1), Passes(2, 2), Passes(4, 4)):
        least = ask.otherwise(passes)
        memory = type("Memory", (), {"available": least.worker_bytes + least.shards_bytes})
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        assert differing(fit(inputs, tmp_path / str(passes.covariance)), once) == []
        assert max(found[-1].covariance, found[-1].moments) == passes.covariance
    less = type("Memory", (), {"available": least.worker_bytes + least.shards_bytes - 1})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: less)
    with pytest.raises(UserError, match="not enough memory"):
        fit(inputs, tmp_path / "less")
    assert not (tmp_path / "less" / "factors").exists()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_gpu_gets_the_passes_that_the_cost_model_plans_for_it(
    inputs: Inputs, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's choice and ``raylux plan``'s, on a device of a size that is only said to be there."""
    config = inputs.config(tmp_path / "run", "engine.batch_tokens=64")
    work, plan = planning._workload(config, planning.Sizes(), "cpu")
    model, held = work.model, covariance_held(work.model.groups, work.stored)
    beside = cost_fit.GPU_BASE + cost_fit.model_bytes(work)
    beside += max(64, plan.longest) * model.activation_bytes(work.itemsize, model.tracked)
    basis = moments_held(model.groups, work.operand, work.stored)
    blocks = split(model.tracked, model.groups, count)
    total = (beside + max(largest(blocks, held), largest(blocks, basis)) + 1) / USABLE
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))
    _, files, _ = planning.find_shape(config)
    covered = coverage(build("llama"))
    room = device.room(files, config.model, covered, model.groups, plan)
    asked = demand_of(config.engine, "float32", "cuda", model.tracked, model.groups, model.parameters, 1, False, "auto")
    found = device.settled(asked, model.tracked, model.groups, room, plan, KINDS["ekfac"]).passes
    assert max(found.covariance, found.moments) == count
    rates = Device(
        kind="here", memory_gb=total / 1e9, bandwidth_gb_s=1.0, float32_tflops=1.0, bfloat16_tflops=1.0,
        float64_tflops=1.0, eigh_tflops=1.0,
    )  # fmt: skip
    there = Cluster(devices=1, device=rates, host_memory_gb=64.0, network_gb_s=1.0, disk_gb_s=1.0, disk_tb=1.0)
    stages = (held, found.covariance), (basis, found.moments)
    for what, passes in stages:
        assert len(cost_fit.passes(dataclasses.replace(work, batch_tokens=plan.longest), there, what, 0.0)[0]) == passes
