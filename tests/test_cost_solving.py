"""What the cost model says of iterative solves, against counted FLOPs, real tensors and the passes that a run makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raylux.batches import TokenRow, fit_batches
from raylux.capture import Capture
from raylux.cost import costs, sizes
from raylux.cost.planner import plan_run
from raylux.cost.solving import solving
from raylux.curvature.gauss_newton import add_products
from raylux.engine.worker import GradientWorker
from raylux.planning import Sizes, plan_on
from raylux.report.plans import choice_rows
from tests.small import make_inputs
from tests.test_cost import ROWS, TOKENS, _cluster, _shape, _work


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("queries", [1, 3])
def test_products_take_the_counted_flops(name: str, queries: int) -> None:
    model, shape = _shape(name)
    rows = [TokenRow(torch.arange(TOKENS).numpy() % 50, torch.arange(TOKENS).numpy() % 50, n) for n in range(ROWS)]
    (batch,) = fit_batches(rows, TOKENS * ROWS)
    layers = shape.tracked
    vectors = [{x.name: torch.randn(x.shape) for x in layers} for _ in range(queries)]
    totals = [{x.name: torch.zeros(x.shape) for x in layers} for _ in range(queries)]
    capture = Capture(model, layers)
    with FlopCounterMode(display=False) as counted:
        add_products(capture, batch, vectors, totals)
    work = _work(
        model=shape, dtype="float32", queries=queries, tokens=float(TOKENS), solver_products=1, solver_sequences=ROWS
    )
    said = sum(one.flops for one in solving(work, _cluster()).works)
    assert said == pytest.approx(counted.get_total_flops(), rel=0.1)


def test_a_plan_says_the_passes_of_a_solver_and_pays_for_them() -> None:
    direct = plan_run(_work(dtype="float32"), _cluster(devices=64), costs.AHEAD)
    work = _work(dtype="float32", solver_products=30, solver_sequences=1000)
    plan = plan_run(work, _cluster(devices=64), costs.AHEAD)
    stages = {stage.name: stage for stage in plan.stages}
    before = {stage.name: stage for stage in direct.stages}
    assert stages["score"].flops == before["score"].flops, "the cost does not grow with candidates"
    assert stages["query"].flops > before["query"].flops
    block = sizes.solve_block(work.model.tracked, 4)
    (line,) = [row for row in choice_rows(plan.choices) if row[0] == "solver"]
    assert f"{-(-100 // block)} forward and {-(-100 // block) + 200} backward passes" in line[2]
    more = plan_run(
        _work(dtype="float32", solver_products=60, solver_sequences=1000), _cluster(devices=64), costs.AHEAD
    )
    ratio = [{stage.name: stage for stage in one.stages}["query"].flops - before["query"].flops for one in (more, plan)]
    assert ratio[0] == pytest.approx(2 * ratio[1])


def test_memory_holds_the_state_of_a_block() -> None:
    layers, groups = _work().model.tracked, dict(_work().model.groups)
    block = sizes.solve_block(layers, 4)
    held = sizes.shards_bytes(layers, groups, 4, 100, iterative=True)
    assert held >= sizes.SOLVE_STATE * block * sizes.layer_bytes(layers)
    assert sizes.worker_bytes(layers, groups, 10, 4, 1, True) >= sizes.worker_bytes(layers, groups, 10, 4, 1)


def test_a_run_takes_the_products_that_its_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(tmp_path / "inputs", "llama", num_hidden_layers=1)
    more = ("curvature.solver=cg", "curvature.iterations=3", "curvature.tolerance=0", "query.max_error=0")
    config = inputs.config(tmp_path / "run", *more)
    plan = plan_on(config, Sizes(), _cluster())
    (line,) = [row for row in choice_rows(plan.choices) if row[0] == "solver"]
    assert line[1] == "up to 3 products in 1 block of 4 queries" and "60 fitted sequences" in line[2]
    seen: list[int] = []
    usual = GradientWorker.product_unit

    def counted(self: Any, rows: Any, *rest: Any) -> Any:
        seen.append(len(rows))
        return usual(self, rows, *rest)

    monkeypatch.setattr(GradientWorker, "product_unit", counted)
    inputs.run(tmp_path / "run", *more)
    assert sum(seen) == 3 * 60


def test_a_joint_matrix_is_a_product_for_each_weight_and_self_influence_a_second_pass() -> None:
    _, shape = _shape("gpt2")
    small = _work(
        model=shape, dtype="float32", basis=False, tokens=float(TOKENS), fit_sequences=ROWS, unit_tokens=TOKENS
    )
    size = sum(layer.parameters for layer in shape.tracked)
    stage = plan_run(replace(small, joint=True), _cluster(), costs.ENGINE).stage("exact matrix")
    product = solving(replace(small, queries=1, solver_products=1, solver_sequences=ROWS), _cluster())
    one, all_of_it = (
        {each.kind: each.flops for each in works}["products: layers"] for works in (product.works, stage.works)
    )
    assert all_of_it == pytest.approx(size * one) and stage.disk_bytes == 4 * size**2 and stage.tasks == ROWS
    plain, measured = (
        plan_run(replace(small, self_influence=flag), _cluster(), costs.ENGINE).stage("score") for flag in (False, True)
    )
    assert measured.flops > plain.flops and measured.disk_bytes == plain.disk_bytes
