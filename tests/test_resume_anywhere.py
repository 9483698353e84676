"""Interrupted at any calls, any number of times, and run again: a run in process ends with the same bits."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylux.engine.shard import FactorShard
from raylux.engine.worker import GradientWorker
from raylux.ledger import COVARIANCE, EIGEN, MOMENTS, QUARANTINE, QUERY, SCORE, SNAPSHOT, TOKENS
from raylux.store import RunFolder
from raylux.store.files import Files
from tests.interrupts import Interrupt
from tests.small import SEQUENCES, Inputs, contents, differing, make_inputs

STAGES = (COVARIANCE, EIGEN, MOMENTS, "prefilter", QUERY, SCORE, TOKENS)
# A snapshot after every unit: as many boundaries as there can be.
ALL = ("query.max_error=0", "fit.snapshot=0", "score.layers=false", "score.token_top=2")
# What may be interrupted, and about how often a run calls it.
CALLS: tuple[tuple[type, str, int], ...] = (
    (RunFolder, "commit", 33),
    (Files, "put", 36),
    (RunFolder, "write", 63),
    (RunFolder, "delete", 12),
    (GradientWorker, "covariance_unit", 5),
    (GradientWorker, "moment_unit", 5),
    (GradientWorker, "query_gradients", 4),
    (GradientWorker, "score_unit", 5),
    (FactorShard, "begin", 2),
    (FactorShard, "add", 10),
    (FactorShard, "snapshot", 10),
    (FactorShard, "decompose", 8),
    (FactorShard, "solve", 1),
    (FactorShard, "write_block", 1),
)
POINTS = st.sampled_from(CALLS).flatmap(lambda call: st.tuples(st.just(call), st.integers(1, call[2]), st.booleans()))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "gpt2", n_layer=1)


@pytest.fixture(scope="module")
def undisturbed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, np.ndarray], Counter[str]]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    inputs.run(folder, *ALL)
    return contents(folder), _ledger(folder)


def _ledger(folder: Path) -> Counter[str]:
    """How many units each stage committed; the pass of sums counts its sequences itself."""
    store = RunFolder(str(folder))
    for stage in (COVARIANCE, MOMENTS):
        assert {manifest.meta["sequences"] for manifest in store.units(stage).values()} == {SEQUENCES}
    rows = [row for manifest in store.units(SCORE).values() for row in manifest.meta["rows"]]
    assert sorted(rows) == list(range(SEQUENCES)), "each sequence is scored once"
    assert not store.committed(SNAPSHOT) and not store.committed(QUARANTINE)
    return Counter({stage: len(store.committed(stage)) for stage in STAGES})


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(points=st.lists(POINTS, min_size=1, max_size=3))
def test_interrupted_anywhere_it_goes_on_to_the_same_bits(
    inputs: Inputs,
    undisturbed: tuple[dict[str, np.ndarray], Counter[str]],
    tmp_path_factory: pytest.TempPathFactory,
    points: list[tuple[tuple[type, str, int], int, bool]],
) -> None:
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    for (owner, method, _), call, after in points:
        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            Interrupt(patch, owner, method, call, after)
            inputs.run(folder, *ALL)
    inputs.run(folder, *ALL)
    assert differing(contents(folder), undisturbed[0]) == []
    assert _ledger(folder) == undisturbed[1]


def test_a_run_calls_what_is_interrupted(inputs: Inputs, tmp_path: Path) -> None:
    """The points lie within the run: a name or a number that missed it would interrupt nothing."""
    found: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for owner, method, _ in CALLS:
            _count(patch, owner, method, found)
        inputs.run(tmp_path / "run", *ALL)
    for owner, method, most in CALLS:
        assert most / 2 <= found[f"{owner.__name__}.{method}"] <= 2 * most, (method, found)


def _count(patch: pytest.MonkeyPatch, owner: type, method: str, found: Counter[str]) -> None:
    usual = getattr(owner, method)

    def counted(*args: Any, **more: Any) -> Any:
        found[f"{owner.__name__}.{method}"] += 1
        return usual(*args, **more)

    patch.setattr(owner, method, counted)
