"""The proximal optimum against dense matrices on models small enough to hold them, float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import functional_call, jacrev

from raylux.batches import TokenRow
from raylux.errors import UserError
from raylux.evaluate import ProximalObjective
from raylux.layers import coverage
from tests.architectures import build

VOCABULARY, TRAIN = 12, 6


def sequences(count: int) -> list[TokenRow]:
    rng = np.random.default_rng(0)
    rows = []
    for place in range(count):
        tokens = rng.integers(2, VOCABULARY, 5 + place % 3).astype(np.int32)
        labels = tokens.copy()
        labels[: 1 + place % 2] = -100
        rows.append(TokenRow(tokens, labels))
    return rows


# Conv1D, and Linear; one tracked layer each, so that G is a small dense matrix.
@pytest.mark.parametrize(("name", "pattern"), [("gpt2", "*h.1.mlp.c_proj"), ("neox", "*layers.0.mlp.dense_h_to_4h")])
def test_first_order_change_is_the_damped_gauss_newton_step(name: str, pattern: str) -> None:
    model = build(name, torch.float64, vocab=VOCABULARY)
    layers = coverage(model, (pattern,)).tracked
    (layer,) = layers
    rows, damping, epsilon = sequences(TRAIN), 0.3, 1e-5
    objective = ProximalObjective(model, layers, rows, {layer.name: damping})
    names = [f"{layer.name}.{leaf}" for leaf in (("weight", "bias") if layer.bias else ("weight",))]
    own = {key: model.get_parameter(key) for key in names}

    def log_probabilities(weights: dict[str, torch.Tensor], row: TokenRow) -> torch.Tensor:
        ids = torch.from_numpy(row.tokens).long().unsqueeze(0)
        logits = functional_call(model, weights, kwargs={"input_ids": ids}).logits[0, :-1]
        return logits[torch.from_numpy(row.labels[1:]) >= 0].log_softmax(-1)

    def jacobian(row: TokenRow) -> torch.Tensor:
        parts = jacrev(lambda weights: log_probabilities(weights, row))(own)
        return torch.cat([parts[key].flatten(2) for key in names], 2)

    size = layer.parameters
    curvature = damping * torch.eye(size, dtype=torch.float64)
    for row in rows:
        # The Fisher matrix of a softmax: Σ_v p_v ∇log p_v ∇log p_vᵀ.
        j, p = jacobian(row), log_probabilities(own, row).exp()
        curvature += torch.einsum("tv,tvi,tvj->ij", p, j, j) / TRAIN
    added = rows[1]
    targets = torch.from_numpy(added.labels[1:])
    gradient = jacobian(added).gather(1, targets[targets >= 0].long()[:, None, None].expand(-1, 1, size)).sum((0, 1))

    found = objective.optimum(added, epsilon, 400, 1e-8)
    change = torch.cat([(found.weights[key] - own[key]).flatten() for key in names]) / epsilon
    wanted = torch.linalg.solve(curvature, gradient)
    assert (change - wanted).abs().max() <= 2e-3 * wanted.square().mean().sqrt()
    # And what it does to a measurement, which is the prediction.
    f = (objective.logprobs([rows[2]], found.weights) - objective.logprobs([rows[2]]))[0] / epsilon
    targets = torch.from_numpy(rows[2].labels[1:])
    slope = jacobian(rows[2]).gather(1, targets[targets >= 0].long()[:, None, None].expand(-1, 1, size)).sum((0, 1))
    torch.testing.assert_close(f, slope @ wanted, rtol=2e-3, atol=1e-4)
    # Without the search: the linearised objective is solved as it is.
    step = objective.linearised(added, epsilon)
    torch.testing.assert_close(
        torch.cat([step[key].flatten() for key in names]) / epsilon, wanted, rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(objective.slopes([rows[2]], step)[0] / epsilon, slope @ wanted, rtol=1e-6, atol=1e-8)


def test_a_set_is_the_sum_of_its_sequences_to_first_order() -> None:
    model = build("gpt2", torch.float64, vocab=VOCABULARY)
    layers, rows = coverage(model).tracked, sequences(TRAIN)
    objective = ProximalObjective(model, layers, rows, {layer.name: 5.0 for layer in layers})
    together = objective.optimum(rows[:3], 1e-5, 400, 1e-9).weights
    alone = [objective.optimum(row, 1e-5, 400, 1e-9).weights for row in rows[:3]]
    for name, x in together.items():
        start = model.get_parameter(name)
        added = sum(one[name] - start for one in alone)
        assert (x - start - added).abs().max() <= 1e-3 * added.abs().max()
    same = objective.optimum([rows[0]], 1e-5, 400, 1e-9).weights
    assert all(torch.equal(same[name], x) for name, x in alone[0].items())


def test_the_coordinates_of_the_search_do_not_move_the_optimum() -> None:
    model = build("gpt2", torch.float64, vocab=VOCABULARY)
    layers, rows = coverage(model).tracked, sequences(TRAIN)
    damping = {layer.name: 5.0 + place for place, layer in enumerate(layers)}
    found = []
    for draws, batch_tokens in ((4, 8), (200, 4096)):
        objective = ProximalObjective(model, layers, rows, damping, batch_tokens, draws)
        found.append(objective.optimum(rows[0], 1 / TRAIN, 400, 1e-9))
    change = torch.cat([(found[0].weights[key] - model.get_parameter(key)).flatten() for key in found[0].weights])
    apart = torch.cat([(found[0].weights[key] - x).flatten() for key, x in found[1].weights.items()])
    assert apart.abs().max() <= 1e-5 * change.abs().max()
    assert found[0].value == pytest.approx(found[1].value, rel=1e-9)
    assert all(optimum.gradient <= 1e-5 * optimum.start for optimum in found)


def test_the_model_is_left_as_it_is_and_the_added_sequence_gains() -> None:
    model = build("llama", torch.float64, vocab=VOCABULARY)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    layers, rows = coverage(model).tracked, sequences(TRAIN)
    objective = ProximalObjective(model, layers, rows, {layer.name: 5.0 for layer in layers})
    more, less = (objective.optimum(rows[0], weight) for weight in (0.1, -0.1))
    base = float(objective.logprobs(rows[:1])[0])
    assert (
        float(objective.logprobs(rows[:1], more.weights)[0])
        > base
        > float(objective.logprobs(rows[:1], less.weights)[0])
    )
    assert all(torch.equal(before[key], x) for key, x in model.state_dict().items())


@pytest.mark.parametrize(("damping", "count"), [(0.0, 2), (1.0, 0)])
def test_what_cannot_be_solved_is_said(damping: float, count: int) -> None:
    model = build("llama", torch.float64, vocab=VOCABULARY)
    layers = coverage(model).tracked
    with pytest.raises(UserError, match="proximal optimum"):
        ProximalObjective(model, layers, sequences(count), {layer.name: damping for layer in layers})
