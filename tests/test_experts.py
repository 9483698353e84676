"""Mixtures of experts against a loop over experts: values, captured rows, factors and scores."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.mixtral import modeling_mixtral

import raylux
from raylux.batches import IGNORED, TokenRow, collate
from raylux.capture import Capture
from raylux.cost.model import ModelShape
from raylux.cost.sizes import covariance_bytes, covariance_products, layer_bytes
from raylux.engine.shard import FactorShard
from raylux.engine.worker import GradientWorker
from raylux.errors import UserError
from raylux.experts import SplitExperts, split_experts
from raylux.groups import input_groups
from raylux.influence.dots import sequence_gradients
from raylux.layers import coverage
from raylux.routed import ROW_BLOCK, Routed
from raylux.store import RunFolder
from tests import reference
from tests.apart import processes
from tests.architectures import MIXTURES, build
from tests.interrupts import Interrupt
from tests.mixtures import unfused
from tests.reference import Example, Question
from tests.small import Inputs, contents, differing, make_inputs
from tests.test_exact import QUESTIONS, TEXTS, VOCAB, attribute, corpus_of, encode, fitted_on

# RMS norms and routers round to float32: a last bit of a float64 that padding changes may become one of those.
ROUNDED = 1e-6
LEAVES = ("gate", "up", "down")


def split(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    split_experts(model)
    return model


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param, torch.float64, VOCAB)


def rows_of(lengths: Sequence[int], seed: int = 0) -> list[TokenRow]:
    draw = np.random.default_rng(seed)
    tokens = [draw.integers(VOCAB, size=length) for length in lengths]
    return [TokenRow(own, np.concatenate([[IGNORED], own[1:]]), key) for key, own in enumerate(tokens)]


# ------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_a_model_says_the_same_with_its_experts_taken_apart(mixture: PreTrainedModel, implementation: str) -> None:
    ids = torch.randint(0, VOCAB, (3, 13), generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(mixture)
    plain.set_experts_implementation(implementation)
    expected, parameters = plain(input_ids=ids).logits, sum(p.numel() for p in plain.parameters())
    apart = split(mixture)
    assert any(isinstance(module, SplitExperts) for module in apart.modules())
    assert sum(p.numel() for p in apart.parameters()) == parameters
    assert reference.difference(apart(input_ids=ids).logits, expected) <= 1e-12
    # The reference of the tests below is the model too.
    assert reference.difference(unfused(mixture)(input_ids=ids).logits, expected) <= 1e-12


def test_float32_experts_are_those_of_grouped_products() -> None:
    model = build("mixtral", torch.float32, VOCAB)
    model.set_experts_implementation("grouped_mm")
    ids = torch.randint(0, VOCAB, (3, 13), generator=torch.Generator().manual_seed(1))
    assert reference.difference(split(model)(input_ids=ids).logits, model(input_ids=ids).logits) <= 1e-5


def test_weights_are_shared_not_copied() -> None:
    model = build("mixtral")
    fused = model.get_submodule("model.layers.0.mlp.experts").gate_up_proj.data_ptr()
    split_experts(model)
    assert model.get_submodule("model.layers.0.mlp.experts.0.gate_proj").weight.data_ptr() == fused


# ----------------------------------------------------------------------------------------------------- coverage


def test_every_matrix_of_every_expert_is_tracked(mixture: PreTrainedModel) -> None:
    apart, loop = split(mixture), unfused(mixture)
    found = coverage(apart, strict=True)
    experts = [layer for layer in found.tracked if layer.routed]
    assert [layer.name for layer in experts] == [
        name for name, module in loop.named_modules() if isinstance(module, nn.Linear) and ".experts." in name
    ]
    for layer in experts:
        module = loop.get_submodule(layer.name)
        assert layer.shape == (module.out_features, module.in_features + (module.bias is not None))
        assert layer.share == apart.config.num_experts_per_tok / len(loop.get_submodule(layer.name.rsplit(".", 2)[0]))
    assert found.parameters == sum(p.numel() for p in mixture.parameters())
    groups = input_groups(apart, found.tracked)
    for layer in experts:
        assert groups[layer.name] == layer.name.replace("up_proj", "gate_proj")


def test_without_weights_it_is_the_same(mixture: PreTrainedModel) -> None:
    with torch.device("meta"):
        empty = type(mixture)(mixture.config)
    empty.tie_weights()
    split_experts(empty)
    apart = split(mixture)
    assert coverage(empty) == coverage(apart)
    assert input_groups(empty, coverage(empty).tracked) == input_groups(apart, coverage(apart).tracked)


def test_experts_that_cannot_be_taken_apart_are_listed_and_refused_where_strict() -> None:
    model = build("qwen2_moe")
    block = model.get_submodule("model.layers.1.mlp.experts")
    block.extra = nn.Parameter(torch.zeros(3))
    split_experts(model)
    found = coverage(model)
    assert not [layer for layer in found.tracked if ".experts." in layer.name]
    missing = [layer for layer in found.skipped if layer.wanted]
    assert [layer.name for layer in missing] == ["model.layers.1.mlp.experts"]
    assert missing[0].reason == "fused experts (type Qwen2MoeExperts) of a kind that cannot be taken apart"
    with pytest.raises(UserError, match=r"model\.strict: .*1\.mlp\.experts. cannot be .*=false"):
        coverage(model, strict=True)
    # What is named can be tracked, and nothing else was asked for.
    assert coverage(model, ["*.shared_expert.*"], strict=True).tracked


def test_the_router_is_not_tracked_and_says_so() -> None:
    found = coverage(split(build("qwen2_moe")), strict=True)
    reasons = {layer.name: layer.reason for layer in found.skipped}
    assert reasons["model.layers.1.mlp.gate"].startswith("router: ")
    assert reasons["model.layers.1.mlp.shared_expert_gate"].startswith("router: ")
    assert "model.layers.1.mlp.experts" not in reasons


# ------------------------------------------------------------------------------------------------------ capture


def captured_by(model: PreTrainedModel, rows: Sequence[TokenRow], padded: int) -> Any:
    layers = coverage(model).tracked
    capture = Capture(model, layers, input_groups(model, layers))
    return capture, capture.run(collate(rows, range(len(rows)), padded))


def test_captured_rows_are_those_of_the_loop(mixture: PreTrainedModel) -> None:
    rows = rows_of([5, 12, 9])
    capture, captured = captured_by(split(mixture), rows, 16)
    loop, seen = unfused(mixture), 0
    names = [layer.name for layer in capture.layers]
    for place, row in enumerate(rows):
        example = Example(row.tokens, row.labels)
        pairs, grads = reference.token_pairs(loop, names, example), reference.gradients(loop, names, example)
        for layer in capture.layers:
            a, g = captured.inputs[capture.groups[layer.name]], captured.grads[layer.name]
            gradient = sequence_gradients(a, g)[place].numpy()
            assert np.abs(gradient - grads[layer.name]).max() <= ROUNDED * (1 + np.abs(grads[layer.name]).max())
            if not layer.routed:
                continue
            assert isinstance(a, Routed) and isinstance(g, Routed)
            real = g.places.split(g.sizes)[place] >= 0  # type: ignore[union-attr]
            own_a, own_g = pairs[layer.name]
            assert g.sizes[place] % ROW_BLOCK == 0 and int(real.sum()) == len(own_a)
            np.testing.assert_allclose(a[place][real].numpy(), own_a, atol=ROUNDED)
            np.testing.assert_allclose(g[place][real].numpy(), own_g, atol=ROUNDED)
            assert not a[place][~real].any() and not g[place][~real].any()
            seen += len(own_a)
    assert seen > 0


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_bits_do_not_depend_on_company(name: str) -> None:
    model = split(build(name, torch.float32, VOCAB))
    rows, others = rows_of([9, 11, 14]), rows_of([10, 13, 9, 15], seed=1)
    one = captured_by(model, [rows[0], *rows[1:]], 16)[1]
    for company in ([others[0], rows[0], others[1]], [others[2], others[3], rows[0]]):
        other = captured_by(model, company, 16)[1]
        place = next(at for at, row in enumerate(company) if row is rows[0])
        for layer, g in one.grads.items():
            assert torch.equal(g[0], other.grads[layer][place])
        for group, a in one.inputs.items():
            assert torch.equal(a[0], other.inputs[group][place])


# ------------------------------------------------------------------------------------------------------- scores


def expected_of(model: PreTrainedModel, run: raylux.Run, questions: Sequence[Question]) -> dict[str, np.ndarray]:
    """Layer -> scores [Q, N] of the loop; experts share the least damping."""
    setting, layers = run.config.curvature, run.settings["model"]["layers"]
    corpus = corpus_of(run)
    fit = fitted_on(run) if setting.kind not in ("identity", "cosine") else []
    pools: dict[str, list[str]] = {}
    for name in layers:
        block, _, leaf = name.rsplit(".", 2)
        pools.setdefault(f"{block} {leaf}" if ".experts." in name else name, []).append(name)
    shared = {name: names for names in pools.values() for name in names}
    loop = unfused(model)
    found = reference.influences(loop, layers, fit, corpus, questions, setting.kind, setting.damping, shared)
    scale = 1 / len(corpus) if run.unit == "nats" else 1.0
    return {name: scale * values for name, values in found.items()}


def check(model: PreTrainedModel, run: raylux.Run, tolerance: float) -> None:
    """Each layer's scores, by the size of all layers' (an expert may have next to nothing to do with a query)."""
    expected = expected_of(model, run, QUESTIONS)
    total = np.sum(list(expected.values()), 0)
    for place, query in enumerate(run.queries):
        assert reference.difference(run.scores().sel(query=query), total[place]) <= tolerance
        if run.config.score.layers:
            size, found = float(np.sqrt((total[place] ** 2).mean())), run.layer_scores(query)
            for name, values in expected.items():
                assert np.abs(found.sel(layer=name).values - values[place]).max() <= tolerance * size


def test_scores_are_those_of_the_loop(mixture: PreTrainedModel) -> None:
    check(mixture, attribute(mixture, "score.layers=true", "fit.labels=dataset"), ROUNDED)


@pytest.mark.parametrize("kind", ["kfac", "tkfac", "eshampoo", "diagonal", "cosine"])
def test_scores_of_other_kinds(kind: str) -> None:
    model = build("mixtral", torch.float64, VOCAB)
    some = 'model.layers=["*.experts.*.down_proj"]'
    check(model, attribute(model, f"curvature.kind={kind}", some, "fit.labels=dataset"), ROUNDED)


def test_scores_in_the_eigenbasis_and_by_tokens() -> None:
    model = build("mixtral", torch.float64, VOCAB)
    some = 'model.layers=["*.experts.1.*", "*.experts.2.down_proj"]', "fit.labels=dataset"
    check(model, attribute(model, "query.basis=eigen", *some), ROUNDED)
    low = attribute(model, "query.max_error=0.01", "query.low_rank=always", "query.max_rank=64", *some)
    expected = np.sum(list(expected_of(model, low, QUESTIONS).values()), 0)
    off = np.sqrt(((low.scores().values - expected) ** 2).mean(1) / (expected**2).mean(1))
    assert (off <= 0.01).all()


def test_where_nothing_rounds_to_float32_scores_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def route(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = nn.functional.linear(x.reshape(-1, self.hidden_dim), self.weight)
        best, chosen = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        return logits, best / best.sum(-1, keepdim=True), chosen

    monkeypatch.setattr(modeling_mixtral.MixtralRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_mixtral.MixtralTopKRouter, "forward", route)
    monkeypatch.setattr(modeling_mixtral.MixtralRotaryEmbedding, "forward", _rotary)
    model = build("mixtral", torch.float64, VOCAB, num_hidden_layers=2, num_local_experts=3)
    check(model, attribute(model, "score.layers=true", "fit.labels=dataset"), 1e-9)


def _rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = position_ids[..., None].to(x) * self.inv_freq.to(x)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def test_an_expert_that_is_never_chosen_has_zeros_and_a_damping() -> None:
    model = build("mixtral", torch.float64, VOCAB, num_local_experts=5)
    weight = model.get_submodule("model.layers.0.mlp.gate").weight.data
    # Of x, 2x, -x, -2x and 0 the last is never among the best two, whatever the token.
    weight[:] = weight[:1] * torch.tensor([[1.0], [2.0], [-1.0], [-2.0], [0.0]])
    run = attribute(model, "score.layers=true", "fit.labels=dataset")
    scores = run.layer_scores(run.queries[0])
    assert not np.asarray(scores.sel(layer=[f"model.layers.0.mlp.experts.4.{leaf}_proj" for leaf in LEAVES])).any()
    assert np.asarray(scores).any()
    check(model, run, ROUNDED)


def test_tokens_sum_to_the_score() -> None:
    model = build("mixtral", torch.float64, VOCAB)
    some = 'model.layers=["*.experts.*.up_proj", "*.experts.*.gate_proj"]'
    run = attribute(model, f"score.token_top={len(TEXTS)}", "score.layers=true", some)
    for query in run.queries:
        scores = run.scores().sel(query=query)
        tokens = [run.token_scores(query, name) for name in scores["sequence"].values]
        assert [len(table) for table in tokens] == [len(encode(text)) for text in TEXTS]
        assert reference.difference([table["influence"].sum() for table in tokens], scores) <= ROUNDED
        assert reference.difference(run.layer_scores(query).sum("layer"), scores) <= 1e-12


# --------------------------------------------------------------------------------------------------- equal bits


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inputs, Path]:
    base = tmp_path_factory.mktemp("experts")
    inputs = make_inputs(base / "inputs", "olmoe", num_experts=3, num_experts_per_tok=1)
    inputs.run(base / "usual", "query.max_error=0")
    return inputs, base


def test_interrupted_and_without_kept_rows_it_ends_with_the_same_bits(small: tuple[Inputs, Path]) -> None:
    inputs, base = small
    how = "query.max_error=0", "engine.keep_captured=never", "fit.snapshot=0"
    for owner, method in ((FactorShard, "add"), (GradientWorker, "moment_unit"), (GradientWorker, "score_unit")):
        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            Interrupt(patch, owner, method, 3, True)
            inputs.run(base / "never", *how)
    inputs.run(base / "never", *how)
    assert differing(contents(base / "never"), contents(base / "usual")) == []


def test_added_queries_have_the_bits_of_all_at_once(small: tuple[Inputs, Path]) -> None:
    inputs, base = small
    inputs.ask("c", "a")
    inputs.run(base / "grown", "query.max_error=0")
    inputs.ask()
    inputs.run(base / "grown", "query.max_error=0")
    assert differing(contents(base / "grown"), contents(base / "usual")) == []


def test_workers_and_shards_do_not_change_bits(small: tuple[Inputs, Path]) -> None:
    inputs, base = small
    with processes():
        inputs.run(base / "many", "query.max_error=0", "engine.backend=ray", "engine.workers=3", "engine.shards=3")
    assert differing(contents(base / "many"), contents(base / "usual")) == []


def test_processes_on_ray_that_know_nothing_of_this_one_do_not_change_bits(
    small: tuple[Inputs, Path], ray_cluster: Any
) -> None:
    inputs, base = small
    inputs.run(base / "ray", "query.max_error=0", "engine.backend=ray", "engine.workers=1", "engine.shards=1")
    assert RunFolder(str(base / "ray")).committed("score")
    assert differing(contents(base / "ray"), contents(base / "usual")) == []


# --------------------------------------------------------------------------------------------------------- plans


def test_a_plan_counts_experts_by_their_share_of_the_tokens() -> None:
    """Factors of every expert, products of two in four."""
    apart = split(build("mixtral", vocab=VOCAB))
    layers = coverage(apart).tracked
    groups = input_groups(apart, layers)
    shape = ModelShape.of(apart, coverage(apart), groups)
    width, inner, attention = 16, 12, 2 * 16 * 16 + 2 * 16 * 8
    active = 2 * 3 * width * inner
    assert sum(size for _, size in shape.linears) == active + attention + VOCAB * width
    assert layer_bytes(layers, 1) == 4 * 3 * width * inner
    assert covariance_bytes(layers, groups, 1) == 4 * (width**2 + 2 * inner**2 + inner**2 + width**2)
    assert 2 * covariance_products(layers, groups) == covariance_bytes(layers, groups, 1)
    assert shape.activation_bytes(1, layers) - shape.activation_bytes(1, []) == 2 * (width + 2 * inner + inner + width)
