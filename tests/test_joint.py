"""The exact Gauss-Newton kind: against dense matrices, the Hessian of a linear model, full PCG, and the other kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import raylux
from raylux.config import EngineSection
from raylux.curvature.joint import MOST, Joint
from raylux.engine.demand import demand_of
from raylux.engine.worker import GradientWorker
from raylux.errors import NumericsError, UserError
from raylux.groups import input_groups
from raylux.layers import coverage
from raylux.ledger import MOMENTS
from tests import reference
from tests import test_exact as exact
from tests.apart import processes
from tests.architectures import build
from tests.interrupts import Interrupt
from tests.reference import difference
from tests.small import Inputs, contents, differing, make_inputs
from tests.test_solving import EXACT, TO_THE_END, direct, expected, matrices, scores

__all__ = ["direct", "matrices"]  # fixtures

JOINT = "curvature.kind=gauss_newton"


@pytest.fixture(scope="module")
def run() -> raylux.Run:
    return exact.attribute(exact.gpt2(), *EXACT, JOINT, "score.self_influence=true")


def test_scores_are_those_of_the_dense_matrix_and_of_full_pcg(
    run: raylux.Run, matrices: tuple[Tensor, Tensor, Tensor]
) -> None:
    assert run.unit == "nats"
    assert difference(scores(run), expected(matrices, 3.0)) < 1e-10
    pcg = exact.attribute(exact.gpt2(), *EXACT, *TO_THE_END, "curvature.solver=pcg")
    assert difference(scores(run), scores(pcg)) < 1e-8
    g, _, sequences = matrices
    solved = torch.linalg.solve(g + 3.0 * torch.eye(len(g), dtype=g.dtype), sequences.T).T
    squares = torch.stack([(x * y).sum(1) for x, y in ((sequences, sequences), (sequences, solved), (solved, solved))])
    for found, wanted in zip(run.squares[1], squares, strict=True):
        assert difference(found, wanted) < 1e-10


def test_auto_damping_is_a_tenth_of_each_layers_mean(matrices: tuple[Tensor, Tensor, Tensor]) -> None:
    run = exact.attribute(exact.gpt2(), *EXACT, JOINT, "curvature.damping=auto")
    g, asked, sequences = matrices
    sizes = [24 * 17, 16 * 25]
    assert sum(sizes) == len(g)
    damping = torch.cat([0.1 * part.mean().expand(len(part)) for part in g.diagonal().split(sizes)])
    solved = torch.linalg.solve(g + damping.diag(), asked.T)
    assert difference(scores(run), (solved.T @ sequences.T).numpy()) < 1e-8


def test_of_a_linear_model_it_is_the_hessian() -> None:
    """Logits are linear in the head's weights, so that the Gauss-Newton matrix lacks nothing."""
    model = build("neox", torch.float64, exact.VOCAB)
    setting = ('model.layers=["lm_head"]', "fit.sequences=3", "curvature.damping=0.5")
    run = exact.attribute(model, *setting, JOINT)
    backbone: Any = model.get_submodule("gpt_neox")
    weight: Any = model.get_submodule("lm_head").weight
    ids = run.sequences["sequence"].tolist()
    corpus = exact.corpus_of(run)
    from raylux.engine.plan import choose_fit_rows

    rows = [corpus[row] for row in choose_fit_rows(ids, 3, 0)]

    def total(flat: Tensor) -> Tensor:
        found: Any = 0.0
        for row in rows:
            hidden = backbone(input_ids=torch.tensor(np.asarray(row.tokens, np.int64))[None]).last_hidden_state[0]
            lost = torch.log_softmax(hidden @ flat.view_as(weight).T, -1)
            targets = torch.tensor(np.asarray(row.tokens, np.int64))[1:]
            found = found - lost[:-1].gather(1, targets[:, None]).sum()
        return found / len(rows)

    hessian = torch.autograd.functional.hessian(total, weight.detach().flatten())
    solved = hessian + 0.5 * torch.eye(len(hessian), dtype=torch.float64)
    asked = [reference.question_gradient(model, ["lm_head"], one)["lm_head"].ravel() for one in exact.QUESTIONS]
    sequences = [-reference.gradients(model, ["lm_head"], row)["lm_head"].ravel() for row in corpus]
    x = torch.linalg.solve(solved, torch.tensor(np.stack(asked)).T)
    assert difference(scores(run), (x.T @ torch.tensor(np.stack(sequences)).T).numpy()) < 1e-8


def test_with_a_large_damping_it_tends_to_the_dot_product(matrices: tuple[Tensor, Tensor, Tensor]) -> None:
    run = exact.attribute(exact.gpt2(), *EXACT, JOINT, "curvature.damping=1e9")
    assert difference(scores(run) * 1e9, (matrices[1] @ matrices[2].T).numpy()) < 1e-6


@pytest.mark.parametrize("kind", ["tkfac", "tekfac", "shampoo"])
def test_of_one_token_its_fisher_matrix_is_a_kronecker_product(kind: str) -> None:
    """One sequence with one label: vec(g aᵀ) vec(g aᵀ)ᵀ, whole in kinds that weigh tokens by gradients."""
    setting = ("fit.sequences=1", "fit.labels=dataset", "curvature.damping=0.01", 'model.layers=["*.h.1.mlp.*"]')
    run = exact.attribute(exact.gpt2(), *setting, f"curvature.kind={kind}", train=["anna lives"] * 2)
    names = run.settings["model"]["layers"]
    own = reference.gradients(exact.gpt2(), names, exact.corpus_of(run)[0])
    expected = 0.0
    for name in names:
        v = own[name].ravel()
        asked = [reference.question_gradient(exact.gpt2(), [name], q)[name].ravel() for q in exact.QUESTIONS]
        solved = np.linalg.solve(np.outer(v, v) + 0.01 * np.eye(len(v)), np.stack(asked).T)
        expected = expected - solved.T @ v
    assert difference(scores(run), np.stack([expected] * 2, 1)) < 1e-8


def test_it_needs_no_calibration_and_says_its_degrees_of_freedom(
    run: raylux.Run, matrices: tuple[Tensor, Tensor, Tensor]
) -> None:
    found = raylux.calibrate(run, raylux.CalibrationOptions(queries=1, pairs=6, products=60)).calibration
    assert found is not None and found.solved
    assert found.slope == pytest.approx(1.0, abs=1e-2)
    values = torch.linalg.eigvalsh(matrices[0]).clamp(min=0)
    assert found.freedom == pytest.approx(float((values / (values + 3.0)).sum()), rel=1e-8)


# ----------------------------------------------------------------------------------------- bits


SHORT = (
    *("fit.sequences=5", "fit.unit_tokens=60", "score.token_top=0", "score.self_influence=true", JOINT),
    'model.layers=["*.0.self_attn.k_proj", "*.0.self_attn.o_proj"]',
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "llama", num_hidden_layers=1)


def test_bits_over_workers_and_after_an_interruption(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In process, query by query and interrupted in the fit; and with several workers and shards."""
    first = inputs.run(tmp_path / "usual", *SHORT)
    usual = contents(first.folder)
    assert len([name for name in usual if name.startswith(MOMENTS)]) == 4  # rows of G and a diagonal of each
    more = ("engine.backend=ray", "engine.workers=2", "engine.shards=2")
    with processes():
        over = inputs.run(tmp_path / "processes", *SHORT, *more)
    assert differing(contents(over.folder), usual) == []
    assert len(over.squares[0]) == 60 and np.array_equal(over.squares[1], first.squares[1])
    inputs.ask("a", "b")
    with monkeypatch.context() as patch:
        Interrupt(patch, GradientWorker, "joint_unit", 2, False)
        with pytest.raises(KeyboardInterrupt):
            inputs.run(tmp_path / "run", *SHORT, "fit.snapshot=0")
    inputs.run(tmp_path / "run", *SHORT, "fit.snapshot=0")
    inputs.ask()
    run = inputs.run(tmp_path / "run", *SHORT)
    assert differing(contents(run.folder), usual) == []
    assert run.problems() == []
    assert not list((tmp_path / "run").rglob("solves/**/zarr.json"))


# -------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (('model.layers=["*"]',), "a dense matrix over at most 8,192 tracked weights"),
        (("model.dtype=bfloat16",), "its products need full precision"),
        (("curvature.solver=pcg",), "is solved exactly as it is; set curvature.solver=direct"),
        (("curvature.blocks=2",), "has no A and S to be kept in blocks"),
    ],
)
def test_what_it_cannot_serve(inputs: Inputs, tmp_path: Path, overrides: tuple[str, ...], said: str) -> None:
    large = make_inputs(tmp_path / "large", "llama", hidden_size=48, intermediate_size=96)
    with pytest.raises(UserError, match=said) as error:
        large.run(tmp_path / "run", JOINT, *overrides)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    assert MOST == 8192


def test_memory_for_the_matrix_is_asked_for() -> None:
    model = build("gpt2")
    layers = coverage(model).tracked
    groups, total = input_groups(model, layers), sum(layer.parameters for layer in layers)
    usual, joint = (
        demand_of(EngineSection(), "float32", "cpu", layers, groups, coverage(model).parameters, 1, joint=joint)
        for joint in (False, True)
    )
    matrix = 8 * total**2
    # A worker sums one; a shard reads one beside the symmetric one that is taken apart.
    assert joint.worker_bytes - usual.worker_bytes >= matrix
    assert joint.shards_bytes - usual.shards_bytes >= 3 * matrix


def test_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="belongs to an expert, and there are no products with G for experts"):
        exact.attribute(build("mixtral", torch.float64, exact.VOCAB), JOINT)


def test_a_singular_matrix_says_what_to_set() -> None:
    panel = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(NumericsError, match=r"set curvature\.damping above 0"):
        Joint.of("gauss_newton", {"one": (1, 2)}, {"one": panel}, {"one": 0.0})
    matrix = Joint.of("gauss_newton", {"one": (1, 2)}, {"one": panel}, {"one": 1.0})
    torch.testing.assert_close(
        matrix.solve(torch.tensor([1.0, 1.0], dtype=torch.float64)), torch.full((2,), 1 / 3).double()
    )
