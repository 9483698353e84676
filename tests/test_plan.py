"""What is decided once for a run: units, the sequences of the fit, shards, memory; and when a cluster is too small."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylux.batches import TokenRow, score_batches
from raylux.config import Config
from raylux.cost import sizes
from raylux.engine import demand, plan, session
from raylux.engine.plan import GIB
from raylux.errors import UserError
from raylux.layers import TrackedLayer


def _layer(name: str, inputs: int, outputs: int) -> TrackedLayer:
    return TrackedLayer(name, inputs, outputs, bias=False, conv1d=False)


GATED = [
    layer
    for block in range(3)
    for layer in (_layer(f"{block}.gate", 8, 20), _layer(f"{block}.up", 8, 20), _layer(f"{block}.down", 20, 8))
]
GROUPS = {layer.name: layer.name.replace("up", "gate") for layer in GATED}
LENGTHS = st.lists(st.integers(1, 60), max_size=80)


# ------------------------------------------------------------------------------------------- units


@given(LENGTHS, st.integers(1, 500))
@settings(max_examples=200, deadline=None)
def test_fit_units_are_runs_of_at_least_the_size(lengths: list[int], size: int) -> None:
    units = plan.fit_units(lengths, size)
    assert list(itertools.chain.from_iterable(range(len(lengths))[unit] for unit in units)) == list(range(len(lengths)))
    sums = [sum(lengths[unit]) for unit in units]
    assert all(total >= size for total in sums[:-1])
    assert all(sum(lengths[unit][:-1]) < size for unit in units)  # and no longer than it takes
    # A unit does not depend on what follows.
    assert plan.fit_units(lengths[: len(lengths) // 2], size)[:-1] == units[: max(0, _whole(lengths, size))]


def _whole(lengths: list[int], size: int) -> int:
    """How many units but the last the first half of the lengths has."""
    return len(plan.fit_units(lengths[: len(lengths) // 2], size)) - 1


@given(st.permutations([f"doc{number}:{piece}" for number in range(12) for piece in range(3)]), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_the_sequences_of_the_fit_do_not_depend_on_the_corpus_order(names: list[str], count: int) -> None:
    chosen = [names[row] for row in plan.choose_fit_rows(names, count, 5)]
    usual = sorted(names)
    assert chosen == [usual[row] for row in plan.choose_fit_rows(usual, count, 5)]
    assert len(set(chosen)) == min(count, len(names))
    # More sequences add to those chosen; another seed chooses others.
    assert chosen == [names[row] for row in plan.choose_fit_rows(names, 100, 5)][: len(chosen)]
    if count < 30:
        assert chosen != [names[row] for row in plan.choose_fit_rows(names, count, 6)] or count < 3


def test_the_sequences_of_the_fit_are_spread_over_the_corpus() -> None:
    rows = plan.choose_fit_rows([str(number) for number in range(10_000)], 2_000, 0)
    tenths = np.bincount(rows // 1000, minlength=10)
    assert len(set(rows.tolist())) == 2_000
    assert (np.abs(tenths - 200) < 5 * np.sqrt(200)).all()


# ------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_every_layer_has_one_shard_and_input_groups_stay_together(shards: int) -> None:
    found = plan.assign(GATED, GROUPS, shards)
    assert len(found) == shards and all(found)
    assert sorted(itertools.chain.from_iterable(found)) == sorted(GROUPS)
    for names in found:
        assert all(({GROUPS[name]} <= set(names)) for name in names)
    assert found == plan.assign(GATED, GROUPS, shards)


def test_cubic_costs_are_evened_out() -> None:
    layers = [_layer(f"l{size}", size, size) for size in (90, 60, 60, 50, 40, 30)]
    loads = [
        sum(2 * int(name[1:]) ** 3 for name in names)
        for names in plan.assign(layers, {layer.name: layer.name for layer in layers}, 2)
    ]
    assert max(loads) < 1.2 * min(loads)


# ------------------------------------------------------------------------------------------ queries


def test_query_blocks_keep_within_memory() -> None:
    assert plan.query_block(GATED, 4) == plan.QUERY_BLOCK
    wide = [_layer("l", 2**14, 2**13)]  # half a GiB per query
    assert plan.query_block(wide, 4) == 4
    assert plan.query_block(wide, 8) == 2
    assert plan.query_block([_layer("l", 2**16, 2**15)], 4) == 1  # always one
    # Dense ones only their tokens wait: in whole sixteens, 64 at most, in a quarter of a GiB.
    assert [plan.query_block(GATED, 4, waiting) for waiting in (1.0, 2**22, 2**23, 2**25)] == [64, 64, 32, 16]
    assert plan.query_block(wide, 4, 1.0) == 4
    # Half a block where the tokens of a whole one take more, and reading the bases again costs less than is spared.
    assert [plan.query_block(GATED, 4, 2**25, bases) for bases in (0, 2**28 - 1, 2**28)] == [8, 8, 16]
    assert plan.query_block(GATED, 4, 2**24, 0) == 16


# ---------------------------------------------------------------------------------------- make_plan


def _config(*overrides: str) -> Config:
    sections = {name: {key: "x"} for name, key in (("run", "folder"), ("model", "path"), ("corpus", "path"))}
    return Config.parse({**sections, "queries": {"path": "x"}}, overrides)


def _plan(*overrides: str, device: str = "cpu", lengths: Any = (5, 9, 1)) -> plan.Plan:
    return plan.make_plan(_config(*overrides), device, GATED, GROUPS, 10_000, np.array(lengths))


def test_a_plan_takes_what_is_set_and_resolves_the_rest() -> None:
    set_by_hand = _plan("engine.batch_tokens=77", "fit.unit_tokens=88", "score.unit_size=99", "engine.threads=3")
    assert (set_by_hand.batch_tokens, set_by_hand.fit_unit_tokens, set_by_hand.score_unit_size) == (77, 88, 99)
    assert set_by_hand.threads == 3
    auto = _plan()
    assert auto.fit_unit_tokens >= 2 * auto.batch_tokens > 0 and auto.score_unit_size >= 256
    assert (auto.typical_tokens, auto.longest) == (5.0, 16)  # 9 in whole blocks of rows
    assert all(isinstance(value, (str, int, float)) for value in auto.dump().values())
    assert plan.Plan(**auto.dump()) == auto


@pytest.mark.parametrize(
    "override", ["engine.workers=7", "engine.shards=3", "engine.backend=local", "prefilter.top=3", "engine.timeout=5"]
)
def test_the_cluster_does_not_change_the_plan(override: str) -> None:
    assert _plan(override) == _plan()


def test_the_order_of_the_corpus_does_not_change_the_plan() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 3000)
    assert _plan(lengths=lengths) == _plan(lengths=np.sort(lengths))


def test_moving_the_sums_of_a_unit_is_cheap() -> None:
    """DESIGN's bound: at most a tenth of the time to compute them, by the nominal rates."""
    layers = [_layer(f"{block}.{side}", *shape) for block in range(4) for side, shape in (("up", (512, 2048)),)]
    groups = {layer.name: layer.name for layer in layers}
    parameters = 20_000_000
    found = plan.make_plan(_config(), "cpu", layers, groups, parameters, np.full(100_000, 512))
    moving = plan.covariance_bytes(layers, groups) / sizes._BYTES["cpu"]
    entries = sum(sizes.covariance_entries(layers, groups))
    computing = found.fit_unit_tokens * (4.0 * parameters + 2.0 * entries) / sizes._FLOPS["cpu"]
    assert moving <= 0.1 * computing


# ------------------------------------------------------------------------------------------- memory


def test_bytes_by_hand() -> None:
    layers = [_layer("gate", 8, 20), _layer("up", 8, 20), _layer("down", 20, 8)]
    groups = {"gate": "gate", "up": "gate", "down": "down"}
    # A of the shared input once, A of down; S of each.
    assert plan.covariance_bytes(layers, groups) == 4 * (8 * 8 + 20 * 20 + 20 * 20 + 20 * 20 + 8 * 8)
    assert plan.layer_bytes(layers) == 4 * 3 * 160
    few, many = (plan.worker_bytes(layers, groups, 1000, 4, queries) for queries in (1, 1000))
    assert many - sizes.PROCESS_BYTES == 4000 + 1000 * plan.layer_bytes(layers)
    assert few < many
    # Of each sum one triangle is held.
    assert plan.shards_bytes(layers, groups, 4, 0) == 8 * (2 * 8 * 9 + 3 * 20 * 21) // 2


@pytest.fixture
def supply(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the cluster has."""
    resources = {"CPU": 4.0, "memory": 8.0 * GIB}
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: resources)
    return resources


def _demand(**changes: Any) -> demand.Demand:
    usual = {"workers": "auto", "shards": "auto", "threads": 1, "gpu": False, "worker_bytes": GIB, "shards_bytes": GIB}
    return demand.Demand(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, (4, 4)),
        ({"threads": 2}, (2, 2)),
        ({"threads": 3}, (1, 1)),
        ({"worker_bytes": 3 * GIB}, (2, 2)),
        ({"workers": 3, "shards": 1}, (3, 1)),
        ({"workers": 1, "shards": 5}, (1, 5)),
    ],
)
def test_size_follows_the_cluster(supply: dict[str, float], changes: dict[str, Any], found: tuple[int, int]) -> None:
    assert session.size(_demand(**changes)) == found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"workers": 64}, ["CPUs", "64 workers", "need 64", "has 4", "engine.workers to 4"]),
        ({"workers": 3, "threads": 2}, ["CPUs", "need 6", "has 4", "engine.workers to 2"]),
        ({"threads": 8}, ["CPUs", "1 worker needs 8", "has 4", "engine.threads"]),
        ({"workers": 1, "gpu": True}, ["GPUs", "1 worker needs 1", "has 0"]),
        ({"worker_bytes": 9 * GIB}, ["memory", "10.0 GiB", "8.0 GiB"]),
        ({"workers": 4, "worker_bytes": 2 * GIB}, ["memory", "4 workers", "9.0 GiB", "8.0 GiB"]),
    ],
)
def test_size_refuses_with_demand_and_supply(
    supply: dict[str, float], changes: dict[str, Any], says: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        session.size(_demand(**changes))
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in says), str(error.value)


def test_memory_in_process_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    demand.check_memory_here(_demand(worker_bytes=1, shards_bytes=1))
    with pytest.raises(UserError, match=r"2048\.0 GiB in process, .* GiB are free"):
        demand.check_memory_here(_demand(worker_bytes=1024 * GIB, shards_bytes=1024 * GIB))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=400), st.integers(1, 40))
def test_score_units_are_rows_of_like_length_and_like_weight(lengths: list[int], size: int) -> None:
    array = np.array(lengths)
    units = plan.score_units(array, size)
    assert set(units) <= set(range(units.max() + 1)) and len(units) == len(lengths)
    stretch = plan._STRETCH * size
    for start in range(0, len(array), stretch):
        own, mine = array[start : start + stretch], units[start : start + stretch]
        limit = size * own.mean()
        longest = [own[mine == unit] for unit in np.unique(mine)]
        assert all(part.sum() - part.min() <= limit + part.max() for part in longest)
        assert all(before.min() >= after.max() for before, after in itertools.pairwise(longest))


def test_few_rows_are_filler_where_units_are_of_like_length() -> None:
    """Lengths as Wikipedia leads have them: padding and filler were 39% of the tokens in units of corpus order."""
    draw = np.random.default_rng(0)
    lengths = np.clip(np.exp(draw.normal(4.6, 0.6, 10_000)).astype(int), 8, 256)
    units = plan.score_units(lengths, 256)
    rows = [TokenRow(np.zeros(length, np.int32), np.zeros(length, np.int32)) for length in lengths]
    padded = sum(
        batch.mask.numel()
        for unit in np.unique(units)
        for batch in score_batches([rows[place] for place in np.flatnonzero(units == unit)], 1024, 256)
    )
    assert padded / lengths.sum() < 1.1
