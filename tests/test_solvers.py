"""Iterative solves against a dense matrix in memory, float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.solving import logistic
from jobs.solving.page import LARGEST_CG, LEAST_LISSA
from raylux.config import CurvatureSection
from raylux.curvature import Spectral
from raylux.curvature.solvers import SOLVERS, Rule, solve_here
from raylux.errors import UserError
from tests.reference import difference
from tests.test_gauss_newton import joined

# Two blocks of unlike size and scale, as two layers.
SHAPES = {"one": (3, 4), "two": (5, 2)}
DAMPING = {"one": 0.3, "two": 0.7}


@cache
def system(seed: int = 0) -> tuple[Tensor, Tensor]:
    """G [22, 22], positive semidefinite and far from diagonal, and the vectors [3, 22]."""
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(22, 15, dtype=torch.float64, generator=draw)
    return root @ root.T / 5, torch.randn(3, 22, dtype=torch.float64, generator=draw)


def by_layer(flat: Tensor) -> dict[str, Tensor]:
    parts = flat.split([p * m for p, m in SHAPES.values()])
    return {name: part.view(shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def damped(matrix: Tensor) -> Tensor:
    return matrix + torch.diag(
        joined({name: torch.full(shape, DAMPING[name], dtype=torch.float64) for name, shape in SHAPES.items()})
    )


def preconditioner(matrix: Tensor) -> dict[str, Spectral]:
    """The diagonal of G: an operator as the run's kinds have it, good enough to be of use."""
    return {name: Spectral(part) for name, part in by_layer(matrix.diagonal()).items()}


def solved(name: str, iterations: int, step: float = 0.01, tolerance: float = 0.0) -> tuple[Tensor, Any]:
    matrix, vectors = system()

    def products(_: int, given: Sequence[dict[str, Tensor]]) -> list[Mapping[str, Tensor]]:
        return [by_layer(matrix @ joined(vector)) for vector in given]

    rule = Rule(SOLVERS[name], iterations, tolerance, step)
    found, trace = solve_here(products, [by_layer(v) for v in vectors], preconditioner(matrix), DAMPING, rule)
    return torch.stack([joined(x) for x in found]), trace


def truth() -> Tensor:
    matrix, vectors = system()
    return torch.linalg.solve(damped(matrix), vectors.T).T


@pytest.mark.parametrize("name", ["cg", "pcg"])
def test_conjugate_gradients_find_the_dense_solution_in_as_many_steps_as_dimensions(name: str) -> None:
    found, trace = solved(name, 25)
    assert difference(found, truth()) < 1e-9
    assert trace.iteration == 25
    assert all(seen[-1] < 1e-7 for seen in trace.residuals)


def test_fixed_steps_go_to_the_same_solution() -> None:
    matrix, _ = system()
    largest = float(torch.linalg.eigvalsh(damped(matrix))[-1])
    assert difference(solved("lissa", 3000, 1 / largest)[0], truth()) < 1e-9
    assert difference(solved("astra", 3000, 0.2)[0], truth()) < 1e-9


def test_preconditioned_solvers_start_at_the_direct_solution() -> None:
    matrix, vectors = system()
    direct = torch.stack(
        [joined({n: p.solve(by_layer(v)[n], DAMPING[n]) for n, p in preconditioner(matrix).items()}) for v in vectors]
    )
    found, trace = solved("pcg", 1)
    assert difference(found, direct) < 1e-12
    residual = (vectors - direct @ damped(matrix)).norm(dim=1) / vectors.norm(dim=1)
    assert difference([seen[0] for seen in trace.residuals], residual) < 1e-12
    # The multiple of the direct solution that has the least error in the norm of G + λ.
    slopes = (vectors * direct).sum(1) / ((direct @ damped(matrix)) * direct).sum(1)
    assert difference(trace.slopes, slopes) < 1e-12


def test_each_query_stops_by_itself_and_keeps_what_it_found() -> None:
    matrix, vectors = system()
    alone = []
    for v in vectors:
        found, trace = solve_here(
            lambda _, given: [by_layer(matrix @ joined(vector)) for vector in given],
            [by_layer(v)], preconditioner(matrix), DAMPING, Rule(SOLVERS["pcg"], 60, 1e-3, 1.0),
        )  # fmt: skip
        alone.append((joined(found[0]), trace.residuals[0]))
    together, trace = solved("pcg", 60, tolerance=1e-3)
    assert len({len(seen) for seen in trace.residuals}) > 1 or trace.iteration < 60
    for place, (x, residuals) in enumerate(alone):
        assert torch.equal(together[place], x)
        assert trace.residuals[place] == residuals
        assert residuals[-1] <= 1e-3 < min(residuals[:-1])


def test_a_diverging_iteration_says_which_number_to_set_and_that_number_serves() -> None:
    with pytest.raises(UserError, match=r"diverges.*set curvature\.scale=") as caught:
        solved("lissa", 500, 1.0)
    scale = float(str(caught.value).split("curvature.scale=")[1].split(" ")[0])
    assert difference(solved("lissa", 5000, 1 / scale)[0], truth()) < 1e-6
    with pytest.raises(UserError, match=r"diverges.*set curvature\.step="):
        solved("astra", 500, 5.0)


def test_an_indefinite_matrix_is_refused() -> None:
    matrix, vectors = system()
    for name in ("cg", "pcg"):
        with pytest.raises(UserError, match=r"not positive definite.*curvature\.damping higher"):
            solve_here(
                lambda _, given: [by_layer(-matrix @ joined(vector)) for vector in given],
                [by_layer(v) for v in vectors], preconditioner(matrix), DAMPING, Rule(SOLVERS[name], 60, 0.0, 1.0),
            )  # fmt: skip
    with pytest.raises(UserError, match="NaN or infinity"):
        solve_here(
            lambda _, given: [by_layer(matrix @ joined(vector) * float("nan")) for vector in given],
            [by_layer(v) for v in vectors], preconditioner(matrix), DAMPING, Rule(SOLVERS["cg"], 60, 0.0, 1.0),
        )  # fmt: skip


def test_a_query_without_a_gradient_is_solved_by_zero() -> None:
    matrix, vectors = system()
    given = [by_layer(torch.zeros(22, dtype=torch.float64)), by_layer(vectors[0])]
    for name in SOLVERS:
        found, trace = solve_here(
            lambda _, given: [by_layer(matrix @ joined(vector)) for vector in given],
            given, preconditioner(matrix), DAMPING, Rule(SOLVERS[name], 5, 0.0, 0.01),
        )  # fmt: skip
        assert not joined(found[0]).any()
        assert joined(found[1]).any()
        assert trace.done == [True, True]


def test_numbers_are_those_of_the_config_or_the_solver() -> None:
    setting = CurvatureSection(solver="lissa")
    assert Rule.of(setting, 40.0).step == 1 / 40.0
    assert Rule.of(CurvatureSection(solver="lissa", scale=10.0), 40.0).step == 0.1
    assert Rule.of(CurvatureSection(solver="astra"), 40.0).step == 0.01
    assert Rule.of(CurvatureSection(solver="pcg"), 40.0).iterations == 30


def test_logistic_regression_as_in_the_study() -> None:
    """The short form of jobs/solvers.py: fewer queries, the same gates."""
    found = logistic.study(2, cg=(10, 50), lissa=(5000,), queries=2)
    assert found.cg[50] <= LARGEST_CG < found.cg[10]
    assert found.lissa[5000][1] >= LEAST_LISSA
