"""TrackStar's kind of curvature against a dense reference by autograd; its bits, its inputs, what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import raylux
from raylux.config import EngineSection
from raylux.cost import costs
from raylux.cost.planner import plan_run
from raylux.curvature.projected import sides
from raylux.engine.demand import demand_of
from raylux.engine.worker import GradientWorker
from raylux.errors import NumericsError, UserError
from raylux.layers import coverage
from raylux.ledger import MOMENTS, PROJECTED
from raylux.optimizer import OptimizerMoments
from tests import reference
from tests import test_exact as exact
from tests.apart import processes
from tests.architectures import build
from tests.interrupts import Interrupt
from tests.small import Inputs, contents, differing, make_inputs
from tests.test_cost_solving import _cluster, _work

KIND, SIZE = "curvature.kind=trackstar", 4
SETTING = (KIND, f"curvature.projection={SIZE}", "fit.sequences=9", "score.layers=true", "score.self_influence=true")
Gradients = Mapping[str, np.ndarray]


def dense(
    run: raylux.Run, model: nn.Module, moments: Mapping[str, np.ndarray] | None, damping: float | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Layer -> its part of the cosines [Q, N]; and vᵀ M v of the sequences [N], M the metric, by matrices alone."""
    layers = run.settings["model"]["layers"]
    corpus = [{n: -g for n, g in reference.gradients(model, layers, row).items()} for row in exact.corpus_of(run)]
    rows = raylux_fit_rows(run)
    asked = [reference.question_gradient(model, layers, question) for question in exact.QUESTIONS]
    inner: dict[str, np.ndarray] = {}
    for name in layers:
        fitted = [corpus[row][name] for row in rows]
        v = np.mean([g**2 for g in fitted], 0) if moments is None else moments[name]
        left, right = (side.numpy() for side in sides(name, v.shape, SIZE, 0))
        # vec(L (G / √v) Rᵀ) = (L ⊗ R) vec(G / √v), row by row.
        matrix = np.kron(left, right) / np.sqrt(v + 1e-8 * v.mean()).ravel()
        phi = np.stack([matrix @ g.ravel() for g in fitted])
        second = phi.T @ phi / len(phi)
        share = 0.1 * np.trace(second) / len(second) if damping is None else damping
        metric = matrix.T @ np.linalg.inv(second + share * np.eye(len(second))) @ matrix
        flat = np.stack([each[name].ravel() for each in [*asked, *corpus]])
        inner[name] = flat @ metric @ flat.T
    squares = np.diagonal(sum(inner.values()))
    count = len(asked)
    lengths = np.sqrt(np.outer(squares[:count], squares[count:]))
    return {name: found[:count, count:] / lengths for name, found in inner.items()}, squares[count:]


def raylux_fit_rows(run: raylux.Run) -> np.ndarray:
    from raylux.engine.plan import choose_fit_rows

    return choose_fit_rows(run.sequences["sequence"].tolist(), run.config.fit.sequences, run.config.fit.seed)


def check(run: raylux.Run, model: nn.Module, moments: Gradients | None = None, damping: float | None = None) -> None:
    parts, squares = dense(run, model, moments, damping)
    assert run.unit == "cosine"
    assert reference.difference(run.scores().to_numpy(), sum(parts.values())) < 1e-9
    for place, query in enumerate(run.queries):
        layers = run.layer_scores(query)
        for name, wanted in parts.items():
            assert reference.difference(layers.sel(layer=name), wanted[place]) < 1e-9
    assert reference.difference(run.squares[1][1], squares) < 1e-9
    for query in run.queries:
        best = run.top(query, 3)
        for sequence, influence in zip(best["sequence"], best["influence"], strict=True):
            assert run.token_scores(query, sequence)["influence"].sum() == pytest.approx(influence, rel=1e-9)


def drawn(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Second moments of every parameter of the tracked layers, in the model's own layout."""
    random = torch.Generator().manual_seed(seed)
    names = {layer.name for layer in coverage(model).tracked}
    return {
        name: torch.rand(parameter.shape, generator=random, dtype=torch.float64) ** 4
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] in names
    }


def as_matrices(model: nn.Module, moments: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """[P, M] of each layer: a Conv1D keeps [in, out], a bias is the last column."""
    found = {}
    for layer in coverage(model).tracked:
        weight = moments[f"{layer.name}.weight"].numpy()
        weight = weight.T if layer.conv1d else weight
        parts = [weight, moments[f"{layer.name}.bias"].numpy()[:, None]] if layer.bias else [weight]
        found[layer.name] = np.hstack(parts)
    return found


def test_without_an_optimizer_the_fitted_gradients_own_squares_stand_for_it() -> None:
    """Of the data's own labels, whatever the other kinds are fitted on."""
    run = exact.attribute(exact.gpt2(), *SETTING)
    assert run.config.fit.labels == "sampled"
    check(run, exact.gpt2())
    found = run.store.group(run.store.manifest(PROJECTED, "transformer.h.0.mlp.c_fc").meta["key"]).read("matrix")
    assert found.shape == (SIZE**2, SIZE**2)


@pytest.mark.parametrize(("architecture", "damping"), [("gpt2", None), ("llama", 0.3)])
def test_with_moments_by_parameter(architecture: str, damping: float | None, tmp_path: Path) -> None:
    model = build(architecture, torch.float64, exact.VOCAB)
    moments = drawn(model)
    save_file(moments, tmp_path / "moments.safetensors")
    setting = (*SETTING, f"curvature.optimizer={tmp_path / 'moments.safetensors'}", "query.low_rank=always")
    run = exact.attribute(model, *setting, *([f"curvature.damping={damping}"] if damping else []))
    if architecture == "llama":  # RMS norms round to float32
        parts, _ = dense(run, model, as_matrices(model, moments), damping)
        assert reference.difference(run.scores().to_numpy(), sum(parts.values())) < 1e-4
    else:
        check(run, model, as_matrices(model, moments), damping)


def test_a_layers_moments_count_up_to_a_factor(tmp_path: Path) -> None:
    """As those do that Adam has not corrected for their start."""
    found = []
    for factor in (1.0, 1e-3):
        moments = drawn(exact.gpt2())
        for name in moments:
            if ".h.1." in name:
                moments[name] *= factor
        save_file(moments, tmp_path / "moments.safetensors")
        more = (*SETTING, f"curvature.optimizer={tmp_path / 'moments.safetensors'}")
        found.append(exact.attribute(exact.gpt2(), *more).scores().to_numpy())
    assert reference.difference(*found) < 1e-9


def test_signs_keep_inner_products_on_average() -> None:
    random = np.random.default_rng(1)
    x, y = random.normal(size=(2, 5, 7))
    products = []
    for place in range(4000):
        left, right = (side.numpy() for side in sides(str(place), (5, 7), 4, 0))
        assert set(np.abs(left).ravel()) == {0.5} and left.shape == (4, 5) and right.shape == (4, 7)
        products.append(((left @ x @ right.T) * (left @ y @ right.T)).sum())
    assert abs(np.mean(products) - (x * y).sum()) < 4 * np.std(products) / len(products) ** 0.5
    one, other = (sides("a", (5, 70), 4, seed)[1] for seed in (0, 1))
    assert not torch.equal(one, other) and torch.equal(one, sides("a", (5, 70), 4, 0)[1])


# ------------------------------------------------------------------------------------------ optimizers


def read(path: Path, model: nn.Module) -> OptimizerMoments:
    """Of a model without its weights, as a run reads it."""
    structure: Any = copy.deepcopy(model).to("meta")
    structure.tie_weights()
    return OptimizerMoments(str(path), structure, coverage(model).tracked)


def small_model() -> Any:
    return build("gpt2", torch.float64, exact.VOCAB).requires_grad_(True)


def stepped(model: nn.Module, groups: Any) -> torch.optim.Optimizer:
    """An AdamW that has seen one gradient, another one for each parameter."""
    random = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
    optimizer.step()
    return optimizer


def one_group(model: nn.Module) -> Any:
    return model.parameters()


def named(model: nn.Module) -> Any:
    return list(model.named_parameters())[::-1]


def in_two_groups(model: nn.Module) -> Any:
    """Matrices, then biases and norms: GPT-2's linear weights and embeddings are its only matrices."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if (p.dim() > 1) == first]} for first in (True, False)]


@pytest.mark.parametrize("groups", [one_group, named, in_two_groups])
def test_moments_of_an_adam(groups: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    model = small_model()
    optimizer = stepped(model, groups(model))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    moments = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    found = read(tmp_path / "optimizer.pt", model)
    for name, wanted in as_matrices(model, moments).items():
        np.testing.assert_array_equal(found.of(name, torch.float64), wanted)


def test_moments_as_the_trainer_saves_them(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = build("llama", vocab=exact.VOCAB, num_hidden_layers=1).requires_grad_(True)
    rows = [{"input_ids": exact.encode(text)[:5], "labels": exact.encode(text)[:5]} for text in exact.TEXTS[:4]]
    trained = str(tmp_path / "trained")
    said = TrainingArguments(trained, max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, said, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    state = trainer.optimizer.optimizer.state  # type: ignore[union-attr]
    moments = {name: state[parameter]["exp_avg_sq"] for name, parameter in model.named_parameters()}
    path = tmp_path / "trained" / "checkpoint-2" / "optimizer.pt"
    run = exact.attribute(model.eval().requires_grad_(False), *SETTING, f"curvature.optimizer={path}")
    for name, wanted in as_matrices(model, moments).items():
        kept = run.store.group(run.store.manifest(MOMENTS, name).meta["key"]).read("matrix")
        np.testing.assert_array_equal(kept, wanted)


class _Runs:
    """What a pickle must not do."""

    def __reduce__(self) -> Any:
        return print, ("run from a pickle",)


def _without(moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in moments.items() if "h.1.mlp.c_fc.bias" not in name}


def _negative(moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: -x for name, x in moments.items()}


def _flipped(moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.mT.contiguous() if x.dim() == 2 else x for name, x in moments.items()}


def _whole(moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.to(torch.int64) for name, x in moments.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without, r"no second moments of 'transformer\.h\.1\.mlp\.c_fc\.bias', which is tracked"),
        (_negative, "are not all numbers from 0 on"),
        (_flipped, "take the optimizer of this very model"),
        (_whole, "are no tensor of floats"),
    ],
)
def test_moments_that_are_not_the_models(change: Callable[[Any], Any], said: str, tmp_path: Path) -> None:
    save_file(change(drawn(exact.gpt2())), tmp_path / "moments.safetensors")
    with pytest.raises(UserError, match=said) as error:
        read(tmp_path / "moments.safetensors", exact.gpt2())
    assert "\n" not in str(error.value)


def _of_another_model(path: Path) -> None:
    model = build("gpt2", torch.float64, exact.VOCAB, n_layer=1).requires_grad_(True)
    torch.save(stepped(model, model.parameters()).state_dict(), path)


def _of_momentum(path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), path)


def _that_runs(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state": _Runs(), "param_groups": []}))


def _text(path: Path) -> None:
    path.write_text("no optimizer")


def _list(path: Path) -> None:
    torch.save([1, 2], path)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_of_another_model, "which are not this model's"),
        (_of_momentum, r"keeps no second moments by weight \(exp_avg_sq\)"),
        (_that_runs, "no optimizer's state that can be read safely"),
        (_text, "no optimizer's state that can be read safely"),
        (_list, "no optimizer's state .* but a list of 2"),
        (lambda path: None, "no such local file"),
    ],
)
def test_files_that_are_no_optimizers(
    write: Callable[[Path], None], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match=said) as error:
        read(tmp_path / "optimizer.pt", exact.gpt2())
    assert "\n" not in str(error.value) and "run from a pickle" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ the engine


SHORT = (KIND, "curvature.projection=3", "fit.sequences=20", "score.self_influence=true", "score.token_top=2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "llama")


@pytest.fixture(scope="module")
def usual(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> raylux.Run:
    return inputs.run(tmp_path_factory.mktemp("usual") / "run", *SHORT)


def test_bits_over_workers_and_shards_that_die(inputs: Inputs, usual: raylux.Run, tmp_path: Path) -> None:
    more = ("engine.backend=ray", "engine.workers=2", "engine.shards=2", "fit.passes=2")
    with processes() as found:
        over = inputs.run(tmp_path / "processes", *SHORT, *more)
    assert {who for who, _ in found.died} == {"worker", "shard"}
    assert differing(contents(over.folder), contents(usual.folder)) == []
    assert np.array_equal(over.squares[1], usual.squares[1])


@pytest.mark.parametrize("method", ["projected_unit", "score_unit"])
def test_bits_after_an_interruption(
    method: str, inputs: Inputs, usual: raylux.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And query by query: what scores are divided by does not depend on what they stand beside."""
    inputs.ask("a", "b")
    with monkeypatch.context() as patch:
        Interrupt(patch, GradientWorker, method, 2, False)
        with pytest.raises(KeyboardInterrupt):
            inputs.run(tmp_path / "run", *SHORT, "fit.snapshot=0")
    inputs.run(tmp_path / "run", *SHORT, "fit.snapshot=0")
    inputs.ask()
    run = inputs.run(tmp_path / "run", *SHORT)
    known = contents(usual.folder)
    assert len([name for name in known if name.startswith(PROJECTED)]) == len(run.settings["model"]["layers"])
    assert differing(contents(run.folder), known) == []
    assert run.problems() == [] and next(stage for stage in run.status() if stage.name == "fit").done


def test_what_the_fit_lacks_is_said_and_another_projection_is_another_fit(
    inputs: Inputs, usual: raylux.Run, tmp_path: Path
) -> None:
    assert "whitening 6 of 6 layers" in next(stage for stage in usual.status() if stage.name == "fit").detail
    with pytest.raises(UserError, match=r"curvature\.projection is 3 there and 4 here.*--restart fit"):
        inputs.run(usual.folder, *SHORT, "curvature.projection=4")
    run = inputs.run(tmp_path / "run", *SHORT, "curvature.projection=4", "score.token_top=0")
    wanted = run.scores().to_numpy()
    run = inputs.run(tmp_path / "run", *SHORT, "score.token_top=0", restart="fit")
    assert not np.array_equal(run.scores().to_numpy(), wanted)
    np.testing.assert_array_equal(run.scores().to_numpy(), usual.scores().to_numpy())


def test_moments_are_read_once(inputs: Inputs, tmp_path: Path) -> None:
    """The file may be gone when the fit has what it held."""
    path = tmp_path / "moments.safetensors"
    save_file(drawn(build("llama")), path)
    more = (*SHORT, f"curvature.optimizer={path}")
    wanted = inputs.run(tmp_path / "run", *more)
    path.unlink()
    assert differing(contents(inputs.run(tmp_path / "run", *more).folder), contents(wanted.folder)) == []
    with pytest.raises(UserError, match="no such local file"):
        inputs.run(tmp_path / "run", *more, restart="fit")


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("curvature.projection=17",), "cannot be projected to 17 by 17; set it to 16 or lower"),
        (("curvature.projection=65",), "less than or equal to 64"),
        (("curvature.solver=pcg",), "kind=trackstar has no curvature to solve with"),
        (("curvature.segment=0.5",), "kind=trackstar has no eigenvalues layer by layer"),
        (("curvature.blocks=2",), "has no A and S to be kept in blocks"),
        (("curvature.kind=ekfac", "curvature.optimizer=x.pt"), "kind=ekfac does not divide by an optimizer's"),
        (("curvature.optimizer=x.pt",), "no such local file"),
    ],
)
def test_what_it_cannot_serve(inputs: Inputs, tmp_path: Path, overrides: Sequence[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        inputs.run(tmp_path / "run", *SHORT, *overrides)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_experts_and_words_are_refused() -> None:
    with pytest.raises(UserError, match="is the word embedding, of which gradients are kept by word"):
        exact.attribute(build("neox", torch.float64, exact.VOCAB), KIND, 'model.layers=["*embed_in"]')
    with pytest.raises(UserError, match="belongs to an expert, whose few gradients do not whiten"):
        exact.attribute(build("mixtral", torch.float64, exact.VOCAB), KIND, "curvature.projection=2")


def test_its_scores_are_cosines_and_nothing_else(usual: raylux.Run) -> None:
    assert np.abs(usual.scores().to_numpy()).max() <= 1 + 1e-6
    with pytest.raises(UserError, match="cosines are normalised as they are"):
        usual.top("a", normalise="norm")
    with pytest.raises(UserError, match="predicts no change in nats"):
        raylux.calibrate(usual)
    with pytest.raises(UserError, match="predicts no change in nats"):
        raylux.verify(usual)


def test_without_damping_fewer_sequences_than_coordinates_are_singular() -> None:
    with pytest.raises(NumericsError, match=r"layer '.*': .* set curvature\.damping above 0"):
        exact.attribute(exact.gpt2(), *SETTING, "curvature.damping=0")


def test_memory_and_work_are_counted() -> None:
    model = build("gpt2")
    layers = coverage(model).tracked
    groups, count = {layer.name: layer.name for layer in layers}, coverage(model).parameters
    usual, projected = (
        demand_of(EngineSection(), "float32", "cpu", layers, groups, count, 1, projection=size) for size in (0, 16)
    )
    held = 8 * len(layers) * 16**4
    assert projected.worker_bytes - usual.worker_bytes >= held + 4 * sum(layer.parameters for layer in layers)
    assert projected.shards_bytes - usual.shards_bytes >= held
    work = _work(basis=False, moments=True, projection=16)
    plan = plan_run(work, _cluster(), costs.ENGINE)
    stage, tracked = plan.stage("whitening"), work.model.tracked
    assert stage.disk_bytes == work.stored * len(tracked) * 16**4
    # Formed, and projected from the left at the least.
    least = work.fit_sequences * sum(layer.parameters for layer in tracked) * 2 * (work.tokens + 16)
    assert next(one for one in stage.works if one.kind == "projecting").flops >= least
    assert {one.kind for one in plan.stage("score").works} >= {"lengths"}
    assert [one.name for one in plan.stages][:2] == ["lambda", "whitening"]
