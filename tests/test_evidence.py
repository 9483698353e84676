"""What two stages go by: bars, scores fitted to estimates, margins and recall by what was found."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from raylux.engine.bars import Bars
from raylux.engine.stages.evidence import Evidence
from raylux.engine.stages.thresholds import Best, Estimates, Pilot, Trust, rank_of


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Written(dict):
    """Arrays of a unit, as a group has them."""

    def read(self, name: str) -> np.ndarray:
        return self[name]


def bars(fine: tuple[float, float], first: tuple[float, float] = (-math.inf, 0.0)) -> Bars:
    """Limit and room of one query's steps."""
    return Bars(np.array([[fine[0], first[0]]]), np.array([[fine[1], first[1]]]))


def test_estimates_reach_as_far_as_their_step_allows() -> None:
    refined, sizes = np.packbits([[True, True, False, False, True]], 1), np.array([1.0, 1.0, 1.0, 1.0, 0.0])
    values = np.array([[1.0, 2.0, 1.0, 2.0, 3.0]])
    held = Estimates.read(Written(estimate=values, size=sizes, refined=refined), [0])  # type: ignore[arg-type]
    assert held.reach(bars((3.0, 1.0), (3.0, 1.5))).tolist() == [[False, True, False, True, True]]
    # Room is in proportion to the size of the sequence.
    assert held.reach(bars((3.5, 1.5), (3.0, 1.5))).tolist() == [[False, True, False, True, False]]
    # Where what comes first leaves nothing out, whatever was not looked at closely may reach.
    assert held.reach(bars((90.0, 1.0))).tolist() == [[False, False, True, True, False]]
    # Of a pilot both are known.
    both = Written(estimate=values, size=np.ones(5), first=values[:, ::-1])
    held = Estimates.read(both, [0])  # type: ignore[arg-type]
    assert held.reach(bars((3.0, 1.0), (3.0, 0.5))).tolist() == [[False, False, False, False, False]]
    assert held.reach(bars((3.0, 1.0), (3.0, 2.0))).tolist() == [[False, True, False, True, True]]
    assert held.opened(bars((3.0, 1.0), (3.0, 1.0))).mean() == 0.6 and held.opened(bars((9.0, 1.0))).all()
    # Runs of before had no sizes.
    old = Estimates.read(Written(estimate=values, error=np.array([[0.5]])), [0])  # type: ignore[arg-type]
    assert old.reach(bars((3.0, 1.0))).tolist() == [[False, True, False, True, True]]


def test_bars_are_written_and_read() -> None:
    limits = np.array([[1.5, 2.0], [0.1 + 0.2, -math.inf], [-math.inf, -math.inf]])
    named = json.loads(json.dumps(Bars(limits, np.array([[1.0, 3.0], [0.1, 0.0], [0.0, 0.0]])).named("abc")))
    assert named.keys() == {"a", "b"}
    again = Bars.of("cab", named)
    np.testing.assert_array_equal(again.limits, limits[[2, 0, 1]])
    np.testing.assert_array_equal(again.rooms, [[0, 0], [1, 3], [0.1, 0]])


@pytest.mark.parametrize("first", [False, True])
def test_bars_find_the_share_that_is_wanted_of_the_pilot(first: bool) -> None:
    """Of estimates that are off by an offset, a slope and an error in proportion to the size of a sequence."""
    total, sizes = drawn(40, 500).numpy(), 0.5 + drawn(500, seed=3).abs().numpy()
    slopes = np.array([1.0, 0.7])[:, None, None]
    errors = sizes * np.array([0.2, 0.4])[:, None, None] * drawn(2, 40, 500, seed=1).numpy()
    fine, coarse = (total - 3 + errors) / slopes
    pilot = Pilot(total, Estimates(fine, sizes, np.ones(total.shape, bool), coarse if first else None), {})
    for step, fit in enumerate(pilot.fits):
        # Least squares of scores to what has errors: slopes as covariances say.
        np.testing.assert_allclose(fit.slopes, slopes[step, 0, 0], rtol=0.25)
        np.testing.assert_allclose(fit.errors, [0.2, 0.4][step], rtol=0.25)
        weighed = (total - fit.scores((fine, coarse)[step])) / sizes**2
        assert np.abs(weighed.sum(1)).max() < 1e-8


def evidence(needed: np.ndarray, allowed: np.ndarray | float = np.inf) -> Evidence:
    return Evidence(needed, np.broadcast_to(allowed, needed.shape))


def test_margins_find_the_share_that_is_wanted() -> None:
    needed = drawn(4000, 2).numpy() * [1, 3] + [0.5, 1]
    fine, first = evidence(needed).margins(0.9, 1)
    told = first / 1.3  # by what was found
    assert (needed[:, 1] <= told).mean() == pytest.approx(0.97, abs=1e-3)
    assert (needed <= [fine, told]).all(1).mean() == pytest.approx(0.9, abs=1e-3)
    lenient, same_first = evidence(needed).margins(0.9, 2)
    assert (needed <= [lenient, told]).all(1).mean() == pytest.approx(0.8, abs=1e-3) and same_first == first
    (one,) = evidence(needed[:, :1]).margins(0.9, 1)
    assert (needed[:, 0] <= one).mean() == pytest.approx(0.9, abs=1e-3)
    # Few of the best tell nothing of a hundredth of them, nor does none.
    assert evidence(np.zeros((200, 1))).margins(0.99, 1) == evidence(np.zeros((0, 1))).margins(0.99, 1)
    assert evidence(np.zeros((0, 1))).margins(0.99, 1) == [pytest.approx(2.326, abs=1e-3)]


def test_what_was_missed_is_told_by_what_could_have_been() -> None:
    """Pairs in units of which a third miss what needs more than one standard error: too few, as all was never seen."""
    needed, third = drawn(4000, 2, seed=3).numpy(), np.arange(4000) % 3 == 0
    allowed = np.where(third[:, None] & [True, False], 1.0, np.inf)
    there = (needed <= allowed).all(1)
    found = evidence(needed[there], allowed[there])
    assert 0.5 * (~there).sum() < found.missed < (~there).sum()
    wider = found.allowing([2.0, 5.0])
    assert wider.missed < 0.4 * found.missed and evidence(needed).missed == 0
    assert evidence(np.zeros((0, 2))).missed == 0


def test_estimates_that_say_nothing_leave_nothing_out() -> None:
    def reach(
        total: np.ndarray, values: np.ndarray, sizes: np.ndarray, margin: float, limits: np.ndarray
    ) -> np.ndarray:
        held = Estimates(values, sizes, np.ones(values.shape, bool))
        return held.reach(Trust.of(Pilot(total, held, {}).fits, [margin]).bars(limits))

    total, ones = drawn(3, 50).numpy(), np.ones(50)
    kth = np.sort(total, 1)[:, -5]
    assert reach(total, np.zeros((3, 50)), ones, 4, kth).all()
    # Nor do those that go against the scores.
    assert reach(total, -total, ones, 4, kth).all()
    # What is estimated exactly is left out below the limit alone, whichever sizes there are.
    exact = reach(total, 2 * total + 1, np.zeros(50), 2.5, kth - 1e-9)
    np.testing.assert_array_equal(exact, total >= kth[:, None])


def test_thresholds_and_what_is_typical() -> None:
    largest = np.array([[9.0, 8, 7, 6, 5, 4, 3], [9.0, 8, -np.inf, -np.inf, -np.inf, -np.inf, -np.inf]])
    found = Best(largest, [50, 25])
    # Of 4 in 100 two are expected of 50 and one of 25, and hardly more than 5 and 3.
    assert (rank_of(2), rank_of(1), rank_of(0)) == (5, 3, 1)
    np.testing.assert_array_equal(found.thresholds(4, 100), [5, -np.inf])
    np.testing.assert_array_equal(found.typical(4, 100), [7.5, 8.5])
    # Where there are fewer candidates now than were seen, the last that is known.
    np.testing.assert_array_equal(Best(largest, [500, 500]).thresholds(4, 100), [3, -np.inf])
