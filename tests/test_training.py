"""Training by a recipe: leaving sequences out changes them and nothing else; log-probabilities are the worker's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from raylux.batches import TokenRow
from raylux.classes import class_labels
from raylux.errors import NumericsError
from raylux.evaluate import Answers, Proximity, Questions, Recipe, train
from raylux.evaluate.training import _backward, batches
from raylux.models import find_model, load_model
from raylux.queries import load_queries
from tests import classifiers
from tests.architectures import build
from tests.small import make_inputs, tokenizer

RECIPE = Recipe(epochs=2, batch_tokens=64, rate=1e-2)


def rows(count: int = 12) -> list[TokenRow]:
    random = np.random.default_rng(1)
    found = []
    for _ in range(count):
        tokens = random.integers(2, 60, random.integers(3, 20)).astype(np.int32)
        labels = tokens.copy()
        labels[0] = -100
        found.append(TokenRow(tokens, labels))
    found[3].labels[:2] = -100
    return found


def model() -> torch.nn.Module:
    return build("llama").double().requires_grad_(True)


def state(one: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in one.parameters()]


def after(weights: list[float] | None, seed: int = 0) -> list[torch.Tensor]:
    one = model()
    train(one, rows(), RECIPE, seed, weights)
    return state(one)


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_a_batch_without_a_row_has_the_gradient_of_the_others_in_the_whole_batch() -> None:
    """Σ w ∇L / T over those that are left, T the labelled tokens of the whole batch; a weight of 2 is a row twice."""
    given, one = rows(4), model()
    labelled = sum(int((row.labels[1:] != -100).sum()) for row in given)
    _backward(one, [given[0], given[2]], np.array([1.0, 2.0]) / labelled)
    found = [parameter.grad.clone() for parameter in one.parameters() if parameter.grad is not None]
    one.zero_grad()
    for row in (given[0], given[2], given[2]):
        logits = one(input_ids=torch.from_numpy(row.tokens[None].astype(np.int64))).logits[0, :-1]
        chosen = torch.from_numpy(row.labels[1:].astype(np.int64))
        loss = torch.nn.functional.cross_entropy(logits, chosen, ignore_index=-100, reduction="sum")
        (loss / labelled).backward()
    wanted = [parameter.grad for parameter in one.parameters() if parameter.grad is not None]
    assert len(found) == len(wanted) > 5
    for x, y in zip(found, wanted, strict=True):
        # The norms of transformers compute in float32.
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_classifier_is_trained_on_the_class_of_each_text(name: str) -> None:
    """Padding, which gpt2's head has to find its way around, changes nothing; a text of weight 0 is left out."""
    one, random = classifiers.classifier(name).requires_grad_(True), np.random.default_rng(2)
    given = [
        TokenRow(random.integers(4, 30, length).astype(np.int32), class_labels(length, number))
        for length, number in ((5, 0), (9, 2), (7, 1))
    ]
    _backward(one, given[:2], np.array([1.0, 2.0]) / 3)
    found = [parameter.grad.clone() for parameter in one.parameters() if parameter.grad is not None]
    one.zero_grad()
    for row, weight, number in ((given[0], 1, 0), (given[1], 2, 2)):
        logits = one(input_ids=torch.from_numpy(row.tokens[None].astype(np.int64))).logits[0]
        (-weight * logits.log_softmax(0)[number] / 3).backward()
    wanted = [parameter.grad for parameter in one.parameters() if parameter.grad is not None]
    assert len(found) == len(wanted) > 5
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)
    log_p = Answers(one).logprobs(given)
    logits = one(input_ids=torch.from_numpy(given[2].tokens[None].astype(np.int64))).logits[0]
    assert float(log_p[2]) == pytest.approx(float(logits.log_softmax(0)[1]), abs=1e-10)
    before, trained = state(one), []
    for weights in (None, np.ones(3), np.array([1.0, 1.0, 0.0])):
        other = classifiers.classifier(name).requires_grad_(True)
        # Dropout is drawn anew in training mode.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            train(other, given, RECIPE, 0, weights)
        trained.append(state(other))
    assert same(trained[0], trained[1]) and not same(trained[1], trained[2]) and not same(trained[0], before)


def test_a_seed_gives_the_same_bits_and_weights_of_one_are_the_whole_corpus() -> None:
    whole = after([1] * 12)
    assert same(whole, after([1] * 12)) and not same(whole, after([1] * 12, seed=1))
    # The model's own loss is the same mean, in float32.
    assert all(torch.allclose(x, y, atol=1e-3) for x, y in zip(whole, after(None), strict=True))
    for other in ([1] * 11 + [0], [2] + [1] * 11, [-1] + [1] * 11):
        assert max(float((x - y).abs().max()) for x, y in zip(whole, after(other), strict=True)) > 1e-3
    nothing = model()
    before = state(nothing)
    train(nothing, rows(), RECIPE, 0, np.zeros(12))
    assert same(before, state(nothing)), "without a sequence nothing moves"


def test_held_weights_follow_the_objective_with_its_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch a step: what the optimizer is given is the gradient of Σ L / N + λ/2 |θ − θ_s|², over tokens for N."""
    monkeypatch.setattr("raylux.evaluate.training._CLIP", float("inf"))
    one, given = model(), rows()
    name, damping = "model.layers.0.mlp.up_proj.weight", 3.0
    one.requires_grad_(False)
    held = one.get_parameter(name).requires_grad_(True)
    start, seen = held.detach().clone(), []

    def look(*_: object) -> None:
        seen.append((held.detach().clone(), held.grad.clone()))

    handle = register_optimizer_step_pre_hook(look)
    try:
        near = Proximity({name: damping}, {name: start})
        train(one, given, Recipe(3, 10_000, 1e-2), 0, np.ones(12), proximity=near)
    finally:
        handle.remove()
    assert torch.equal(seen[0][0], start) and not torch.equal(seen[2][0], start)
    per_sequence = np.mean([(row.labels[1:] != -100).sum() for row in given])
    for weights, gradient in seen:
        w = weights.clone().requires_grad_(True)
        total = damping / 2 * (w - start).square().sum()
        for row in given:
            ids = torch.from_numpy(row.tokens.astype(np.int64))[None]
            logits = torch.func.functional_call(one, {name: w}, kwargs={"input_ids": ids}).logits[0, :-1]
            labels = torch.from_numpy(row.labels[1:].astype(np.int64))
            total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / len(given)
        total.backward()
        # The norms of transformers compute in float32.
        torch.testing.assert_close(gradient * per_sequence, w.grad, rtol=1e-4, atol=1e-5)
    others = {key: x for key, x in one.named_parameters() if key != name}
    assert all(torch.equal(x, dict(model().named_parameters())[key]) for key, x in others.items())


def test_batches_hold_every_sequence_once_within_their_size() -> None:
    lengths = [len(row.tokens) for row in rows(40)]
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        order = batches(lengths, 48, generator)
        assert sorted(place for batch in order for place in batch) == list(range(40))
        assert all(len(batch) * max(lengths[place] for place in batch) <= 48 for batch in order)


def test_a_rate_that_is_too_large_is_said() -> None:
    with pytest.raises(NumericsError, match="lower the rate"):
        train(build("gpt2").requires_grad_(True), rows(), Recipe(30, 64, 1e30), 0)


def test_what_models_answer_is_what_a_run_measures(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    run = inputs.run(tmp_path / "run", "query.max_error=0")
    files = find_model(run.config.model)
    queries = load_queries(str(inputs.queries), tokenizer(), 10_000, None)
    parts = [[TokenRow(part.tokens, part.labels) for part in query.parts] for query in queries]
    weights = [[part.weight for part in query.parts] for query in queries]
    found = Questions(parts, weights).at(Answers(load_model(files, "float32", "cpu")))
    assert found == pytest.approx(run.measurements.loc[[query.id for query in queries], "measurement"], rel=1e-5)
