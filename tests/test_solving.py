"""Iterative solves of whole runs: against the dense Gauss-Newton matrix, and bit for bit however they ran."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import raylux
from raylux.batches import TokenRow
from raylux.engine.iterating import IterativeSolves
from raylux.engine.quarantine import give_up
from raylux.engine.stages import solving
from raylux.engine.work import Failure, ShardLostError
from raylux.engine.worker import GradientWorker
from raylux.errors import UserError
from raylux.layers import coverage
from raylux.ledger import COVARIANCE, PRODUCT, QUERY, SOLVE
from raylux.store import RunFolder
from tests import test_exact as exact
from tests.apart import processes
from tests.interrupts import Interrupt
from tests.reference import difference, gradients, question_gradient
from tests.small import Inputs, contents, differing, make_inputs
from tests.test_gauss_newton import dense, joined

# Few sequences, few weights, and a damping at which some tens of steps are enough.
EXACT = ("fit.sequences=4", "curvature.damping=3.0", "model.layers=[transformer.h.1.mlp.*]")
TO_THE_END = ("curvature.tolerance=1e-11", "curvature.iterations=150")


@pytest.fixture(scope="module")
def direct() -> raylux.Run:
    return exact.attribute(exact.gpt2(), *EXACT)


@pytest.fixture(scope="module")
def matrices(direct: raylux.Run) -> tuple[Tensor, Tensor, Tensor]:
    """G of the fitted sequences [D, D], gradients of the queries [Q, D] and of log p of the sequences [N, D]."""
    model = exact.gpt2()
    layers = coverage(model, ["transformer.h.1.mlp.*"]).tracked
    names = [layer.name for layer in layers]
    fitted = exact.fitted_on(direct)
    rows = [TokenRow(np.asarray(row.tokens), np.asarray(row.labels)) for row in fitted]
    g = dense(model, layers, rows) / len(rows)

    def flat(found: dict[str, np.ndarray]) -> Tensor:
        return joined({name: torch.as_tensor(found[name]) for name in names})

    asked = [flat(question_gradient(model, names, exact.logprob(*pair))) for pair in exact.ASKED]
    sequences = [flat(gradients(model, names, row)) for row in exact.corpus_of(direct)]
    return g, torch.stack(asked), -torch.stack(sequences)


def scores(run: raylux.Run) -> np.ndarray:
    """Not divided by N, in the order of the corpus."""
    return run.scores().to_numpy() * run.train_size


def expected(matrices: tuple[Tensor, Tensor, Tensor], damping: float) -> np.ndarray:
    g, asked, sequences = matrices
    solved = torch.linalg.solve(g + damping * torch.eye(len(g), dtype=g.dtype), asked.T)
    return (solved.T @ sequences.T).numpy()


@pytest.mark.parametrize("solver", ["cg", "pcg"])
def test_conjugate_gradients_score_as_the_dense_inverse(matrices: tuple[Tensor, Tensor, Tensor], solver: str) -> None:
    run = exact.attribute(exact.gpt2(), *EXACT, *TO_THE_END, f"curvature.solver={solver}")
    assert difference(scores(run), expected(matrices, 3.0)) < 1e-8
    facts = next(iter(RunFolder(run.folder).units(QUERY).values())).meta["solver"]
    assert facts["name"] == solver and all(seen[-1] <= 1e-11 for seen in facts["residuals"])
    solves = run.solves()
    assert list(solves.index) == run.queries and (solves["solver"] == solver).all() and solves["solved"].all()


@pytest.mark.parametrize("solver", ["astra", "lissa"])
def test_fixed_steps_over_all_sequences_score_as_the_dense_inverse(
    matrices: tuple[Tensor, Tensor, Tensor], solver: str
) -> None:
    """A batch of as many sequences as were fitted is G itself; both take the same path each time, so few steps do."""
    steps = ("curvature.batch=4", "curvature.step=0.5", f"curvature.scale={float(matrices[0].trace()) / 3 + 30}")
    ends = ("curvature.damping=30.0", "curvature.iterations=60", "curvature.tolerance=1e-7")
    run = exact.attribute(exact.gpt2(), *EXACT, *steps, *ends, f"curvature.solver={solver}")
    assert difference(scores(run), expected(matrices, 30.0)) < 1e-5


def test_without_steps_the_preconditioned_solve_is_the_direct_one(direct: raylux.Run) -> None:
    run = exact.attribute(exact.gpt2(), *EXACT, "curvature.solver=pcg", "curvature.iterations=1")
    assert difference(scores(run), scores(direct)) < 1e-10


@pytest.mark.parametrize("solver", ["direct", "pcg", "cg", "astra", "lissa"])
def test_with_a_large_damping_every_solver_tends_to_the_dot_product(
    matrices: tuple[Tensor, Tensor, Tensor], solver: str
) -> None:
    """At astra's and lissa's natural step, 1, respectively 1/λ."""
    large = 1e9
    more = ("curvature.step=1.0", f"curvature.scale={large}", "curvature.iterations=3")
    run = exact.attribute(exact.gpt2(), *EXACT, f"curvature.damping={large}", f"curvature.solver={solver}", *more)
    assert difference(scores(run) * large, (matrices[1] @ matrices[2].T).numpy()) < 1e-6


# ----------------------------------------------------------------------------------------- bits


SHORT = ("query.max_error=0", "score.token_top=0", "fit.sequences=24", "curvature.iterations=4", "curvature.batch=5")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "llama", num_hidden_layers=1)


@pytest.fixture(scope="module", params=["pcg", "astra"])
def solver(request: pytest.FixtureRequest) -> str:
    """One of conjugate directions, one of steps over drawn batches."""
    return f"curvature.solver={request.param}"


@pytest.fixture(scope="module")
def usual(inputs: Inputs, solver: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("usual") / "run"
    inputs.run(folder, *SHORT, solver)
    store = RunFolder(str(folder))
    assert not store.committed(SOLVE) and not list(folder.glob("solves/**/c*"))
    return contents(folder)


@pytest.mark.parametrize("solver", ["pcg"], indirect=True)
def test_workers_and_shards_that_die_change_no_bits(
    inputs: Inputs, solver: str, usual: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """On Ray the same solves are those of ``test_verify``."""
    with processes():
        inputs.run(tmp_path / "many", *SHORT, solver, "engine.backend=ray", "engine.workers=3", "engine.shards=2")
    assert differing(contents(tmp_path / "many"), usual) == []


def test_queries_asked_one_by_one_have_the_bits_of_a_block(
    inputs: Inputs, solver: str, usual: dict[str, np.ndarray], tmp_path: Path
) -> None:
    try:
        for last in range(1, 5):
            inputs.ask(*"abcd"[:last])
            inputs.run(tmp_path / "run", *SHORT, solver)
    finally:
        inputs.ask()
    assert len(RunFolder(str(tmp_path / "run")).committed(QUERY)) == 4
    assert differing(contents(tmp_path / "run"), usual) == []


@pytest.mark.parametrize(
    ("owner", "method", "call", "taken"),
    [
        (GradientWorker, "product_unit", 3, None),
        (IterativeSolves, "begin_solve", 1, 0),
        (IterativeSolves, "advance", 3, 2),
        (IterativeSolves, "turn", 2, 1),
        (RunFolder, "delete", 3, None),
    ],
)
def test_an_interrupted_solve_goes_on_from_its_last_product(
    inputs: Inputs,
    solver: str,
    usual: dict[str, np.ndarray],
    tmp_path: Path,
    owner: type,
    method: str,
    call: int,
    taken: int | None,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Interrupt(patch, owner, method, call, False)
        with pytest.raises(KeyboardInterrupt):
            inputs.run(tmp_path / "run", *SHORT, solver)
    store = RunFolder(str(tmp_path / "run"))
    if taken:
        assert store.manifest(SOLVE, "b00000").meta["trace"]["iteration"] == taken
    inputs.run(tmp_path / "run", *SHORT, solver)
    assert differing(contents(tmp_path / "run"), usual) == []
    told = [json.loads(line) for line in (tmp_path / "run" / "progress.jsonl").read_text().splitlines()]
    steps = [event["iteration"] for event in told if event["event"] == "solve"]
    assert sorted(set(steps)) == [1, 2, 3, 4]
    # None is taken again once it is committed.
    assert len(steps) == 4
    assert not store.committed(SOLVE)


@pytest.mark.parametrize("method", ["take_products", "advance", "turn"])
def test_a_shard_that_began_anew_is_given_the_last_commit(
    inputs: Inputs,
    solver: str,
    usual: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    usually = getattr(IterativeSolves, method)
    calls: list[int] = []

    def lost(self: Any, *args: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 3:
            self._solves = {}
            if method != "take_products":  # that one is asked within a pass, which only sees that nothing comes
                raise ShardLostError(method)
        return usually(self, *args)

    monkeypatch.setattr(IterativeSolves, method, lost)
    inputs.run(tmp_path / "run", *SHORT, solver)
    assert len(calls) == 5
    assert differing(contents(tmp_path / "run"), usual) == []


def test_a_unit_that_is_given_up_is_left_out_of_every_product(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever that happens: a solve does not go on with another matrix than it began with."""
    usually, steps = solving._step, []

    def step(when: int, ctx: Any, *rest: Any) -> Any:
        steps.append(when)
        if len(steps) == when:
            give_up(ctx.folder, PRODUCT, "f000001", ["s1"], Failure(4, "its process ended"))
        return usually(ctx, *rest)

    for when in (1, 3):
        steps.clear()
        monkeypatch.setattr(solving, "_step", partial(step, when))
        inputs.run(tmp_path / str(when), *SHORT, "curvature.solver=pcg")
        assert len(steps) == when + 4
    monkeypatch.undo()
    inputs.run(tmp_path / "usual", *SHORT, "curvature.solver=pcg")
    found = [contents(tmp_path / name) for name in ("1", "3", "usual")]
    assert differing(found[0], found[1]) == []
    assert any(name.startswith("s_test") for name in differing(found[0], found[2]))


def test_another_solver_solves_again_and_fits_nothing(inputs: Inputs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    inputs.run(folder, *SHORT)
    before = {name: x for name, x in contents(folder).items() if name.startswith("fit.")}
    keys = {unit: manifest.meta["key"] for unit, manifest in RunFolder(str(folder)).units(COVARIANCE).items()}
    with pytest.raises(UserError, match=r"curvature\.solver is 'direct' there and 'cg' here"):
        inputs.run(folder, *SHORT, "curvature.solver=cg")
    inputs.run(folder, *SHORT, "curvature.solver=cg", restart="query")
    after = contents(folder)
    assert keys == {unit: manifest.meta["key"] for unit, manifest in RunFolder(str(folder)).units(COVARIANCE).items()}
    assert all(np.array_equal(after[name], x) for name, x in before.items())
    assert "solver" in next(iter(RunFolder(str(folder)).units(QUERY).values())).meta


# ----------------------------------------------------------------------------------------- refusals


def test_a_diverging_solve_says_what_to_set_and_leaves_nothing(inputs: Inputs, tmp_path: Path) -> None:
    wrong = ("curvature.solver=lissa", "curvature.scale=0.01", "curvature.iterations=50")
    with pytest.raises(UserError, match=r"diverges.*curvature\.scale=") as error:
        inputs.run(tmp_path / "run", *SHORT, *wrong)
    assert error.value.exit_code == 2
    store = RunFolder(str(tmp_path / "run"))
    assert not store.committed(SOLVE) and not store.committed(QUERY) and not store.committed(PRODUCT)
    # The same folder takes the number that helps.
    inputs.run(tmp_path / "run", *SHORT, *wrong, "curvature.scale=1e5")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("curvature.kind=identity",), "no curvature to solve with"),
        (("curvature.kind=cosine",), "no curvature to solve with"),
        (("fit.labels=dataset",), "fit.labels=sampled"),
        (("model.dtype=bfloat16",), "model.dtype=float32"),
    ],
)
def test_what_a_solver_cannot_serve_is_refused_before_anything_is_written(
    inputs: Inputs, tmp_path: Path, overrides: Sequence[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        inputs.run(tmp_path / "run", *SHORT, "curvature.solver=pcg", *overrides)
    assert error.value.exit_code == 2
    assert not (tmp_path / "run").exists()
