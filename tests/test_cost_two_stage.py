"""What the plan says of two-stage scoring: the multiplications that the engine decides by, and memory of a layer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raylux.cost import costs, two_stage
from raylux.cost.contraction import Form
from raylux.cost.costs import StageCost
from raylux.cost.model import ModelShape
from raylux.cost.planner import plan_run
from raylux.cost.scoring import choose_scoring
from raylux.groups import input_groups
from raylux.layers import coverage
from tests.architectures import build
from tests.test_cost import _cluster, _work


def _shape() -> ModelShape:
    model = build("llama", hidden_size=192, intermediate_size=512)
    covered = coverage(model)
    return ModelShape.of(model, covered, input_groups(model, covered.tracked))


# 4,096 sequences and 1,000 queries, of which the 100 best are wanted.
WORK = _work(
    model=_shape(), dtype="float32", contraction="float32", candidates=4096, corpus=4096, queries=1000,
    fit_sequences=128, tokens=128.0, query_tokens=128.0, max_error=0.0, best=100, query_basis="standard",
    prefilter=False, score_unit=256, batch_tokens=1024,
)  # fmt: skip
CPU = _cluster(devices=1, device={"gpu": False})


def _score(**changes: object) -> StageCost:
    plan = plan_run(replace(WORK, **changes), CPU, costs.ENGINE)  # type: ignore[arg-type]
    return next(stage for stage in plan.stages if stage.name == "score")


def test_few_sequences_have_no_pilot() -> None:
    assert two_stage.pilot(799, 100) == 0 and two_stage.pilot(255, 1) == 0
    assert two_stage.pilot(800, 100) == 128 and two_stage.pilot(1_000_000, 100) == 512
    assert [two_stage.unit_size(4096, count, 100) for count in (799, 800, 1_000_000)] == [4096, 128, 128]
    assert two_stage.unit_size(64, 1_000_000, 100) == 64
    assert two_stage.chosen_share(replace(WORK, best=None), False) is None
    assert two_stage.chosen_share(replace(WORK, candidates=700), False) is None


def test_the_multiplications_are_those_that_the_engine_decides_by() -> None:
    share = two_stage.chosen_share(WORK, False)
    assert share is not None and 128 / 4096 + 100 / 4096 < share < 0.2
    every = {work.kind: work.flops for work in _score(best=None).works}
    two = {work.kind: work.flops for work in _score().works}
    shapes = [layer.shape for layer in WORK.model.tracked]
    size = WORK.tokens, WORK.queries
    seen = [two_stage.assumed_seen(shape, False) for shape in shapes]
    assert all(own.after for own in seen) and not any(two_stage.assumed_seen(shape, True).after for shape in shapes)
    estimates, refined = two_stage.estimates_cost(shapes, *size, seen, two_stage._OPENED)
    relative = two_stage.relative_cost(shapes, *size, share, two_stage.COUNTED, estimates=estimates, refined=refined)
    contraction = every["forming"] + every["dots"]
    assert two["forming"] + two["estimates"] + two["chosen pairs"] == pytest.approx(relative * contraction, rel=1e-9)
    assert two["forward"] == every["forward"] and "dots" not in two


def test_single_pairs_and_estimates_are_in_float32_beside_products_in_bf16() -> None:
    """On a GPU all of two stages is; where bf16 makes all pairs cheaper than these, they are scored."""
    more = {"candidates": 65_536, "corpus": 65_536}
    usual, halved = (
        {work.kind: work for work in _score(contraction=contraction, **more).works}
        for contraction in ("float32", "bfloat16")
    )
    for kind in ("estimates", "chosen pairs"):
        assert halved[kind] == usual[kind]
    assert halved["forming"].flops == usual["forming"].flops
    assert halved["forming"].seconds < usual["forming"].seconds
    rounded = replace(WORK, contraction="bfloat16")
    assert two_stage.chosen_share(rounded, False) is None, "ten per cent of the pairs, at eleven times their cost"
    assert two_stage.chosen_share(rounded, True) == two_stage.chosen_share(WORK, True) is not None


def test_where_most_pairs_would_be_chosen_all_are_scored() -> None:
    """And the plan is that of a run which does not ask for the best."""
    assert two_stage.chosen_share(replace(WORK, best=500), False) is None
    assert _score(best=500).works == _score(best=None).works


def test_queries_of_one_layer_are_held_while_they_are_laid_out() -> None:
    few, many = _score(queries=2000), _score(queries=4000)
    largest = max(layer.parameters for layer in WORK.model.tracked)
    assert many.worker_bytes - few.worker_bytes == pytest.approx(2 * 2000 * largest * WORK.operand, rel=1e-9)
    assert _score().disk_bytes == 2 * _score(best=None).disk_bytes, "estimates are kept"


def test_the_more_queries_are_read_the_more_sequences_share_them() -> None:
    usual = two_stage.company_bytes(WORK, 1e9)
    assert two_stage.company_bytes(WORK, 1e9, read=1 << 30) == usual <= 512 << 20
    more = [two_stage.company_bytes(WORK, 1e9, read=float(held << 30)) for held in (8, 16, 1000)]
    for found, room in zip(more, (1 << 30, 2 << 30, 2 << 30), strict=True):
        assert 0.9 * room < found <= room
    # A unit has no more than it has; a worker holds the company.
    assert two_stage.company_bytes(WORK, 10, read=1e12) < usual
    forms = [replace(form, held=8 * form.held) for form in _forms()]
    large, small = (two_stage.held(replace(WORK, score_unit=unit), CPU.worker, forms) for unit in (4096, 32))
    assert large - small > 1.5 * (1 << 30)


def _forms() -> list[Form]:
    return list(choose_scoring(WORK, CPU.worker, costs.ENGINE).forms)
