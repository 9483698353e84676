"""Estimates by leading directions: exact where nothing is left out, and wrong by as much as they say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from raylux.blocks import Blocks
from raylux.cost.two_stage import (
    COUNTED,
    Pace,
    Seen,
    estimates_cost,
    pace,
    projecting_cost,
    reached,
    relative_cost,
    share_within,
)
from raylux.curvature.spectral import Spectral
from raylux.influence.leading import Block, LayerEstimates, principal
from raylux.influence.surveys import Cut, Survey, choose, counts

P, M, N, T, Q = 40, 21, 24, 8, 12
PACE = pace("float32")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(size: int) -> torch.Tensor:
    return torch.linalg.qr(drawn(size, size, seed=size))[0]


def falling(outputs: int, inputs: int) -> torch.Tensor:
    """Λ, ascending along both sides as eigenvalues are."""
    return torch.outer(torch.linspace(-4, 0, outputs).exp(), torch.linspace(-6, 0, inputs).exp()).double()


def every(held: LayerEstimates, batches: list, rows: int) -> torch.Tensor:
    """Estimates by all that is seen."""
    gradients = held.gradients(batches)
    return held.estimates(gradients, rows) + held.refinements(gradients, None, rows)


CURVATURES = {
    "whole": Spectral(falling(P, M), basis(M), basis(P)),
    "blocks": Spectral(falling(P, M), Blocks((basis(11), basis(10))), Blocks((basis(20), basis(20)))),
    "coordinates": Spectral(falling(P, M)),
}


@pytest.fixture
def layer() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """V, a, g and the scores [N, Q] of all pairs."""
    v, a, g = list(drawn(Q, P, M)), drawn(N, T, M, seed=1), drawn(N, T, P, seed=2)
    return v, a, g, torch.einsum("ntp,ntm,qpm->nq", g, a, torch.stack(v))


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("shape", [(P, M), (30, 5), (5, 18), (9, 8), (P, 5), (5, M), (P, 18)], ids=str)
def test_an_estimate_is_the_sum_over_a_block_of_the_eigenbasis(layer: tuple, name: str, shape: tuple[int, int]) -> None:
    v, a, g, exact = layer
    curvature = CURVATURES[name]
    cut = Cut(torch.randperm(P)[: shape[0]], torch.randperm(M)[: shape[1]], 0.5)
    block = Block.of(cut, curvature)
    inside = curvature.into(torch.stack(v))
    gradients = curvature.into(torch.bmm(g.mT, a))
    mask = torch.zeros(P, M, dtype=torch.float64)
    mask[cut.rows[:, None], cut.columns] = 1
    wanted = (gradients * mask).flatten(1) @ inside.flatten(1).T
    factors = [(q, torch.eye(M, dtype=torch.float64)) for q in v]
    for given, known in ((factors, False), (list(inside), True), (v, False)):
        held = LayerEstimates.build(block, given, known)
        found = every(held, [(a[:10], g[:10]), (a[10:], g[10:])], 16)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-9)
        missed = 0.5 * (inside.square() * curvature.values * mask).sum((1, 2))
        torch.testing.assert_close(held.variances[:, 1], missed)
        torch.testing.assert_close(held.variances[:, 0], 3 * missed)
    if shape == (P, M):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("shape", [(P, 5), (30, 5), (5, 18), (9, 8)], ids=str)
def test_an_estimate_has_the_same_bits_in_any_company(layer: tuple, shape: tuple[int, int]) -> None:
    v, a, g, _ = (x.float() if isinstance(x, torch.Tensor) else [q.float() for q in x] for x in layer)
    curvature = Spectral(falling(P, M).float(), basis(M).float(), basis(P).float())
    cut = Cut(torch.randperm(P)[: shape[0]], torch.randperm(M)[: shape[1]], 0.5)
    held = LayerEstimates.build(Block.of(cut, curvature), v, False)
    whole = every(held, [(a, g)], 8)
    assert torch.equal(every(held, [(a[:7], g[:7]), (a[7:8], g[7:8]), (a[8:], g[8:])], 8), whole)
    # Nor does padding change them.
    longer = [torch.nn.functional.pad(x, (0, 0, 0, 5)) for x in (a, g)]
    assert torch.equal(every(held, [(longer[0], longer[1])], 8), whole)


@pytest.mark.parametrize("shape", [(P, 5), (30, 5), (5, 18), (9, 9)], ids=str)
@pytest.mark.parametrize("name", CURVATURES)
def test_what_comes_first_is_a_block_of_its_own(layer: tuple, name: str, shape: tuple[int, int]) -> None:
    """The narrower side's first few; and the rest adds what is missing, of whichever pairs are chosen."""
    v, a, g, _ = layer
    cut = Cut(torch.randperm(P)[: shape[0]], torch.randperm(M)[: shape[1]], 0.5, 3)
    whole = Block.of(replace(cut, first=None), CURVATURES[name])
    own = replace(cut, columns=cut.columns[:3]) if shape[1] <= shape[0] else replace(cut, rows=cut.rows[:3])
    small = Block.of(replace(own, beyond=0.0, first=None), CURVATURES[name])
    parts = LayerEstimates.build(Block.of(cut, CURVATURES[name]), v, False)
    gradients = parts.gradients([(a, g)])
    first, known = parts.estimates(gradients, 8), LayerEstimates.build(small, v, False)
    torch.testing.assert_close(first, every(known, [(a, g)], 8), rtol=1e-10, atol=1e-9)
    everything = LayerEstimates.build(whole, v, False)
    seen = everything.variances[:, 1] / 0.5  # by the block
    inside = CURVATURES[name].into(torch.stack(v)).square() * CURVATURES[name].values
    before = inside[:, own.rows][:, :, own.columns].sum((1, 2))
    torch.testing.assert_close(parts.variances, torch.stack([1.5 * seen, 0.5 * seen + seen - before], 1))
    exact = every(everything, [(a, g)], 8)
    torch.testing.assert_close(first + parts.refinements(gradients, None, 8), exact, rtol=1e-10, atol=1e-9)
    chosen = drawn(N, Q, seed=5) > 1
    rest = parts.refinements(gradients, chosen, 8)
    torch.testing.assert_close(torch.where(chosen, first + rest, 0.0), torch.where(chosen, exact, 0.0))
    assert not rest[~chosen].any()
    some = chosen.any(1)
    assert torch.equal(parts.refinements(gradients[some], chosen[some], 8), rest[some])
    more = chosen | (drawn(N, Q, seed=6) > 1)
    assert torch.equal(parts.refinements(gradients, more, 8)[chosen], rest[chosen])


def test_an_estimate_errs_as_much_as_it_says() -> None:
    """Gradients whose entries have mean squares Λ."""
    curvature, v = CURVATURES["whole"], drawn(6, P, M)
    v = curvature.back(curvature.into(v) / (falling(P, M) + 0.01))
    survey = Survey.of(v, curvature, False)
    block = Block.of(survey.cut(counts(M).index(8), counts(P).index(16)), curvature)
    gradients = curvature.back(drawn(2000, P, M, seed=3) * falling(P, M).sqrt())
    # G = Σ_t g_t a_tᵀ with a token for each input.
    held = LayerEstimates.build(block, list(v), False)
    found = every(held, [(torch.eye(M, dtype=torch.float64).expand(2000, M, M), gradients.mT)], 8)
    off = found - gradients.flatten(1) @ v.flatten(1).T
    assert float((off.square() / held.variances[:, 1]).mean()) == pytest.approx(1, abs=0.15)
    exact = gradients.flatten(1) @ v.flatten(1).T
    assert float((exact.square() / held.variances[:, 0]).mean()) == pytest.approx(1, abs=0.15)
    # What is told of the whole: the share of the variance that the block has.
    missed = 1 - survey.held[counts(M).index(8), counts(P).index(16)]
    assert float((off.var(0) / exact.var(0)).mean()) == pytest.approx(missed, rel=0.15)


def test_a_survey_finds_the_largest_columns_and_rows() -> None:
    values = torch.zeros(6, 5, dtype=torch.float64)
    values[4, 1], values[2, 1], values[3, 0], values[5, 3] = 8, 4, 3, 1
    survey = Survey.of(torch.ones(3, 6, 5, dtype=torch.float64), Spectral(values), True)
    assert survey.columns[:3].tolist() == [1, 0, 3]
    assert survey.rows[0][:2].tolist() == [4, 2] and survey.rows[1][:3].tolist() == [4, 2, 3]
    np.testing.assert_allclose(survey.held[0, :2], [0.5, 0.75])
    np.testing.assert_allclose(survey.held[:, -1], [0.75, 15 / 16, 1, 1, 1])
    np.testing.assert_allclose(survey.variances, 16)


def test_queries_of_no_curvature_are_seen_whole_in_their_own_directions() -> None:
    """Three queries of rank 1 have three directions on either side, and estimates of them are exact."""
    v = torch.einsum("qp,qm->qpm", drawn(3, P), drawn(3, M, seed=1))
    curvature = principal(lambda: v)
    survey = Survey.of(v, curvature, False)
    assert survey.held[counts(M).index(3), counts(P).index(3)] == pytest.approx(1)
    block = Block.of(survey.cut(counts(M).index(3), counts(P).index(3)), curvature)
    a, g = drawn(N, T, M, seed=1), drawn(N, T, P, seed=2)
    found = every(LayerEstimates.build(block, list(v), False), [(a, g)], 8)
    torch.testing.assert_close(found, torch.einsum("ntp,ntm,qpm->nq", g, a, v), rtol=1e-9, atol=1e-9)


def test_blocks_are_larger_where_more_is_missed_or_wanted() -> None:
    def of(values: torch.Tensor, wanted: float = 0.02, queries: int = 1000) -> tuple[int, int]:
        v = drawn(8, 256, 128) / (values + 0.1 * values.mean())
        survey = Survey.of(v * values.sqrt(), Spectral(values), True)
        return choose({"l": survey}, 128.0, queries, wanted, PACE)["l"].seen.block

    steep, flat = falling(256, 128) ** 4, falling(256, 128) ** 0.5
    few, many = of(steep), of(flat)
    assert few[0] * few[1] < many[0] * many[1]
    rare = of(flat, wanted=1e-4)
    assert rare[0] * rare[1] < many[0] * many[1]


def test_layers_share_what_is_missed() -> None:
    """A layer that hardly counts is hardly seen."""
    values = falling(64, 32)
    v = drawn(8, 64, 32)
    large, small = (Survey.of(scale * v, Spectral(values), True) for scale in (1.0, 0.01))
    found = choose({"large": large, "small": small}, 128.0, 1000, 0.02, PACE)
    assert found["small"].rows.numel() * found["small"].columns.numel() < np.prod(found["large"].seen.block)


def test_a_part_of_a_block_comes_first_where_that_is_cheaper() -> None:
    """And nothing does where all is to be put against every query, or where most pairs are wanted anyway."""
    values = falling(256, 128) ** 4
    v = drawn(8, 256, 128) * values.sqrt() / (values + 10 * values.mean())
    surveys = {name: Survey.of(v, Spectral(values), True) for name in "ab"}

    def of(wanted: float, queries: int = 1000, by_steps: bool = True) -> list[Seen]:
        return [cut.seen for cut in choose(surveys, 128.0, queries, wanted, PACE, by_steps).values()]

    steps = of(0.001)
    assert all(0 < seen.before < seen.rows * seen.columns and seen.first < min(seen.block) for seen in steps)
    assert all(seen.after == 0 for seen in of(0.001, by_steps=False))
    assert all(seen.after == 0 for seen in of(0.9))


def test_a_side_that_is_seen_whole_is_not_cut() -> None:
    """Tokens stay in the standard basis there."""
    values = torch.ones(6, 4, dtype=torch.float64)
    survey = Survey.of(drawn(3, 6, 4), Spectral(values, basis(4), basis(6)), True)
    assert survey.firsts(len(counts(4)) - 1, len(counts(6)) - 1)[0] == [4]
    assert survey.firsts(counts(4).index(3), len(counts(6)) - 1)[0] == [1, 2, 3]
    assert survey.firsts(len(counts(4)) - 1, counts(6).index(3))[0] == [1, 2, 3]


def test_the_multiplications_of_a_block_are_those_of_its_products() -> None:
    assert projecting_cost((1000, 500), 128, (8, 8)) == 128 * (1000 * 8 + 500 * 8 + 64)
    assert projecting_cost((1000, 500), 128, (1000, 8)) == 128 * (500 * 8 + 1000 * 8)
    assert projecting_cost((1000, 500), 128, (8, 500)) == 128 * (1000 * 8 + 500 * 8)
    few = 128 * (500 * 8 + 1000 * 8) + 1000 * 200 * 8
    assert projecting_cost((1000, 500), 128, (200, 8)) == projecting_cost((500, 1000), 128, (8, 200)) == few
    # What comes first is put against every query, the rest against a tenth of them.
    found = estimates_cost([(1000, 500), (500, 1000)], 128, 1000, [Seen(200, 8, 3), Seen.of((8, 200))], 0.1)
    assert found == (2 * few + 1000 * 200 * (3 + 8), pytest.approx(100 * 200 * 5))
    # All pairs chosen, every gradient formed, nothing estimated: the contraction itself.
    assert relative_cost([(30, 20)], 128, 1000, 1.0, COUNTED, estimates=0.0) == pytest.approx(1)
    for own in (Pace(5.0, 2.5), Pace(11.0, 5.5)):
        found = relative_cost([(30, 20)], 128, 1000, 0.1, own, estimates=1200.0, formed=0.0, refined=600.0)
        assert found == pytest.approx((own.narrow * 2 + own.gathered * (1 + 100)) / 1128)
    assert pace("float64") == pace("float32") != pace("bfloat16")


def test_shares_of_a_normal_distribution() -> None:
    assert share_within(0.02, 0.0) == pytest.approx(0.02)
    assert share_within(0.5, 1.0) == pytest.approx(0.8413, abs=1e-4)
    assert share_within(1.0, 0.0) == 1
    assert reached(0.0, 10) == 0 and reached(1.0, 10) == 1
    assert reached(0.1, 2) == pytest.approx(0.19)
    assert reached(200 / 1_000_000, 1000) == pytest.approx(1 - math.exp(-0.2), rel=1e-3)


def test_counts_end_in_all() -> None:
    assert counts(1) == [1] and counts(5) == [1, 2, 3, 4, 5] and counts(21)[-3:] == [12, 16, 21]
