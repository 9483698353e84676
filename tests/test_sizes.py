"""Slopes and their intervals: exact numbers, and how often an interval holds what it says it holds."""

from __future__ import annotations

import numpy as np
import pytest

from raylux.evaluate import agreement, slope, whole


def test_the_slope_is_the_least_squares_line_through_the_origin() -> None:
    random = np.random.default_rng(0)
    p, m = random.normal(size=(3, 7)), random.normal(size=(3, 7))
    wanted = np.linalg.lstsq(p.reshape(-1, 1), m.ravel(), rcond=None)[0][0]
    assert slope(p, m) == pytest.approx(wanted, rel=1e-12)
    found = agreement(p, 0.3 * p, draws=50)
    assert (found.slope.value, found.slope.low, found.slope.high) == pytest.approx((0.3, 0.3, 0.3))
    assert found.r_squared == pytest.approx(1.0) and found.pairs == 21


def test_pairs_that_lack_a_number_do_not_count() -> None:
    random = np.random.default_rng(1)
    p, m = random.normal(size=(4, 6)), random.normal(size=(4, 6))
    holes = m.copy()
    holes[0, 0] = holes[3, 2] = np.nan
    kept = ~np.isnan(holes)
    assert slope(p, holes) == pytest.approx(slope(p[kept][None], m[kept][None]))
    assert agreement(p, holes, draws=50).pairs == 22
    assert np.isnan(slope(p, np.full_like(p, np.nan)))


def test_the_interval_covers_the_slope_of_a_quadratic_model() -> None:
    """Queries and sequences are drawn from a model with curvature A that P approximates; the truth is in closed form.

    For v ~ (0, V) and g ~ (0, S): E[vᵀP⁻¹g · vᵀA⁻¹g] = tr(V P⁻¹ S A⁻¹).
    """
    random = np.random.default_rng(2)
    size = 12
    root = random.normal(size=(size, size))
    curvature = root @ root.T / size + 0.3 * np.eye(size)
    exact, diagonal = np.linalg.inv(curvature), np.diag(1 / np.diag(curvature) / 0.4)
    spread = np.diag(random.uniform(0.5, 2.0, size))
    truth = np.trace(diagonal @ spread @ exact) / np.trace(diagonal @ spread @ diagonal)
    inside, repeats = 0, 200
    for _ in range(repeats):
        queries = random.normal(size=(12, size))
        sequences = random.normal(size=(40, size)) @ np.sqrt(spread)
        predicted = queries @ diagonal @ sequences.T
        found = agreement(predicted, queries @ exact @ sequences.T, level=0.9, draws=300).slope
        inside += found.low <= truth <= found.high
    assert 0.80 <= inside / repeats <= 0.97


def test_a_whole_copy_is_exact_where_the_sequence_is_one_residual() -> None:
    """Least squares: J = ½ δᵀA δ, and copies of one row x, residual 1, so H_z = x xᵀ and ∇log p = x."""
    random = np.random.default_rng(3)
    root = random.normal(size=(6, 6))
    a, n = root @ root.T + np.eye(6), 10
    x, query = random.normal(size=6), random.normal(size=6)
    per_copy, leverage = query @ np.linalg.solve(a, x) / n, np.array([x @ np.linalg.solve(a, x) / n])
    for copies in (-0.5, 1.0, 4.0):
        moved = np.linalg.solve(a + copies / n * np.outer(x, x), copies / n * x)
        assert whole(np.array([per_copy]), leverage, copies)[0] == pytest.approx(query @ moved, rel=1e-12)
    assert np.isnan(whole(np.array([1.0]), np.array([1.5]), -1.0)[0])
