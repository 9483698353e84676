"""The exact Hessian kind: against autograd's, the Gauss-Newton matrix of convex heads, and what is not convex."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raylux.cli import main
from raylux.curvature.joint import Joint
from raylux.engine.worker import GradientWorker
from raylux.errors import UserError
from raylux.ledger import MOMENTS
from raylux.modules import logits_of
from tests import test_exact as exact
from tests import test_modules as modules
from tests.apart import processes
from tests.architectures import build
from tests.interrupts import Interrupt
from tests.reference import difference
from tests.small import Inputs, contents, differing, make_inputs

KIND = "curvature.kind=hessian"


def dense(model: nn.Module, train: list[tuple[Tensor, int]]) -> Tensor:
    """(1/N) Σ ∇²L over all layers together by autograd's own Hessian; weights of a layer beside its bias, [P, M]."""
    own = {name: p.detach() for name, p in model.named_parameters()}
    layers = modules.tracked(model)
    shapes = {name: (len(m.weight), m.weight[0].numel() + (m.bias is not None)) for name, m in layers.items()}
    x, y = torch.stack([x for x, _ in train]), torch.tensor([label for _, label in train])

    def loss(values: Tensor) -> Tensor:
        placed = dict(own)
        for (name, shape), part in zip(shapes.items(), values.split([p * m for p, m in shapes.values()]), strict=True):
            weight = own[f"{name}.weight".lstrip(".")]
            rows = part.view(shape)
            placed[f"{name}.weight".lstrip(".")] = rows[:, : weight[0].numel()].reshape(weight.shape)
            if layers[name].bias is not None:
                placed[f"{name}.bias".lstrip(".")] = rows[:, -1]
        logits = logits_of(torch.func.functional_call(model, placed, (x,)))
        return functional.cross_entropy(logits, y, reduction="sum") / len(y)

    parts = []
    for name, module in layers.items():
        weight = layers[name].weight.detach().flatten(1)
        parts.append(weight if module.bias is None else torch.cat([weight, module.bias.detach()[:, None]], 1))
    found: Any = torch.autograd.functional.hessian(loss, torch.cat([part.reshape(-1) for part in parts]))
    return found


@pytest.mark.parametrize("name", ["logistic", "mlp", "shared", "cnn"])
def test_scores_and_self_influence_are_those_of_the_dense_hessian(name: str) -> None:
    model, train = modules.make(name), modules.data(name)
    hessian = dense(model, train)
    smallest = float(torch.linalg.eigvalsh(hessian)[0])
    assert (smallest < -1e-3) == (name != "logistic"), "of the others it is indefinite"
    damping = 0.1 + max(0.0, -smallest)
    more = (KIND, f"curvature.damping={damping}", "score.self_influence=true")
    run = modules.attribute(model, train, train[:2], *more)
    assert run.unit == "nats"
    rows = torch.as_tensor(np.stack([modules.joined(modules.gradients(model, *row)) for row in train]))
    solved = torch.linalg.solve(hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype), rows.T)
    assert difference(run.scores().to_numpy() * len(train), rows[:2] @ solved) < 1e-9
    assert difference(run.squares[1][1], (rows * solved.T).sum(1)) < 1e-9


@pytest.mark.parametrize("name", ["linear", "logistic"])
def test_of_a_linear_head_it_is_the_gauss_newton_matrix(name: str) -> None:
    model, train = modules.make(name), modules.data(name)
    other = [(x, 1 - label if label < 2 else label) for x, label in train]
    found = [
        modules.attribute(model, rows, [train[0]], kind, "curvature.damping=0.01").scores().to_numpy()
        for rows, kind in ((train, KIND), (train, "curvature.kind=gauss_newton"), (other, KIND))
    ]
    assert difference(found[0], found[1]) < 1e-9
    assert difference(found[0], found[2]) > 1e-2, "other labels have other gradients"


def test_of_a_language_model_it_is_the_gauss_newton_matrix_in_the_head_alone() -> None:
    model = build("neox", torch.float64, exact.VOCAB)
    setting = ('model.layers=["lm_head"]', "fit.sequences=3", "curvature.damping=0.5")
    one, two = (exact.attribute(model, *setting, kind) for kind in (KIND, "curvature.kind=gauss_newton"))
    assert difference(one.scores(), two.scores()) < 1e-9
    inside = ('model.layers=["*.h.1.mlp.c_fc"]', "fit.sequences=3", "curvature.damping=20")
    one, two = (exact.attribute(exact.gpt2(), *inside, kind) for kind in (KIND, "curvature.kind=gauss_newton"))
    assert difference(one.scores(), two.scores()) > 1e-3, "below the head it is another matrix"


def test_the_least_damping_is_named_and_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and with what it says the same folder goes on, its matrix not computed again."""
    model, train = modules.make("mlp"), modules.data("mlp")
    smallest = float(torch.linalg.eigvalsh(dense(model, train))[0])
    folder = tmp_path / "run"
    for setting in ("auto", "0.001"):
        with pytest.raises(UserError, match="the Hessian is not positive definite") as error:
            modules.attribute(model, train, train[:1], KIND, f"curvature.damping={setting}", folder=folder)
        said = str(error.value)
        assert "\n" not in said and error.value.exit_code == 2
        least = float(said.split("curvature.damping above ")[1].split(",")[0])
        assert -smallest <= least <= -1.1 * smallest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientWorker, "joint_unit", None)
        run = modules.attribute(model, train, train[:1], KIND, f"curvature.damping={least * 1.001}", folder=folder)
    assert np.isfinite(run.scores().to_numpy()).all()
    for command in ("calibrate", "verify"):
        assert main([command, str(folder)]) == 2
        assert "better solves are those of the Gauss-Newton matrix" in capsys.readouterr().err


def test_a_hessian_of_zeros_needs_damping_above_0() -> None:
    panel = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(UserError, match=r"set curvature\.damping above 0,"):
        Joint.of("hessian", {"one": (1, 2)}, {"one": panel}, {"one": 0.0})


SHORT = (
    *("fit.sequences=5", "fit.unit_tokens=60", "score.token_top=0", KIND, "curvature.damping=200"),
    'model.layers=["*.0.self_attn.k_proj", "*.0.self_attn.o_proj"]',
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "llama", num_hidden_layers=1)


def test_bits_over_workers_and_after_an_interruption(inputs: Inputs, tmp_path: Path) -> None:
    first = inputs.run(tmp_path / "usual", *SHORT)
    usual = contents(first.folder)
    assert len([name for name in usual if name.startswith(MOMENTS)]) == 4
    with processes():
        over = inputs.run(tmp_path / "over", *SHORT, "engine.backend=ray", "engine.workers=3", "engine.shards=2")
    assert differing(contents(over.folder), usual) == []
    with pytest.MonkeyPatch.context() as patch:
        Interrupt(patch, GradientWorker, "joint_unit", 2, False)
        with pytest.raises(KeyboardInterrupt):
            inputs.run(tmp_path / "run", *SHORT, "fit.snapshot=0")
    run = inputs.run(tmp_path / "run", *SHORT, "fit.snapshot=0")
    assert differing(contents(run.folder), usual) == []
    assert run.problems() == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model.dtype=bfloat16",), "its products need full precision"),
        (('model.device_map={"": cpu, model.layers: disk}',), "keep the whole model on them"),
        (("curvature.solver=pcg",), "is solved exactly as it is; set curvature.solver=direct"),
    ],
)
def test_what_it_cannot_serve(inputs: Inputs, tmp_path: Path, overrides: tuple[str, ...], said: str) -> None:
    if "device_map" in overrides[0]:
        pytest.importorskip("accelerate")
    with pytest.raises(UserError, match=said):
        inputs.run(tmp_path / "run", KIND, *overrides)
    assert not (tmp_path / "run").exists()
    mixture = build("mixtral", torch.float64, exact.VOCAB)
    with pytest.raises(UserError, match="there are no products with the Hessian for experts"):
        exact.attribute(mixture, KIND)
