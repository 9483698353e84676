"""A backward pass that begins at what the head reads: where it may, and that it gives what the logits' own would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2ForSequenceClassification

from raylux import heads
from raylux.capture import Capture, Captured
from raylux.cost.model import ModelShape
from raylux.experts import split_experts
from raylux.groups import input_groups
from raylux.heads import ends_in_head
from raylux.layers import coverage
from raylux.loss import hidden_loss
from raylux.sampling import sample_labels
from tests.architectures import MIXTURES, NAMES, build
from tests.several_devices import halves, second_device, spread
from tests.test_capture import VOCAB, batch_of, rows_of


def draw(probabilities: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    return sample_labels(probabilities, keys, positions, 3)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a loss was taken at what a head reads."""
    calls: list[int] = []

    def counting(*args: Any) -> Any:
        calls.append(1)
        return hidden_loss(*args)

    monkeypatch.setattr(heads, "hidden_loss", counting)
    return calls


def taken(model: Any, patterns: tuple[str, ...] | None = None, whole: bool = False) -> Captured:
    """Of three sequences, drawn and given labels; ``whole``: by gradients of the logits."""
    layers = coverage(model, patterns).tracked
    capture = Capture(model, layers, input_groups(model, layers))
    if whole:
        capture._head = None
    return capture.run(batch_of(rows_of(masked=True)), draw, both=True)


def equal(one: Captured, other: Captured, digits: float) -> None:
    assert torch.equal(one.labels, other.labels)
    torch.testing.assert_close(one.loss, other.loss, rtol=digits, atol=digits)
    for found, expected in ((one.grads, other.grads), (one.given, other.given)):
        assert found.keys() == expected.keys()
        for name in found:
            a, b = (getattr(each[name], "rows", each[name]) for each in (found, expected))
            assert isinstance(a, Tensor) and isinstance(b, Tensor)
            assert (a - b).norm() <= digits * b.norm()


@pytest.mark.parametrize("name", [*NAMES, *MIXTURES])
def test_it_begins_at_what_the_head_reads(name: str, counted: list[int]) -> None:
    model = build(name, torch.float64, vocab=VOCAB)
    split_experts(model)
    found = taken(model)
    assert counted and ends_in_head(model, [])
    del counted[:]
    expected = taken(model, whole=True)
    assert not counted
    # RMS norms and routers compute in float32 whatever the model's precision.
    equal(found, expected, 1e-12 if name in ("gpt2", "neox", "opt") else 1e-6)


def test_bits_do_not_depend_on_what_else_is_asked_for(counted: list[int]) -> None:
    """Drawn labels alone, given ones alone, and both: a run that goes on may ask otherwise than the first did."""
    model = build("gpt2", vocab=VOCAB)
    layers = coverage(model).tracked
    capture, batch = Capture(model, layers), batch_of(rows_of())
    both, drawn, given = capture.run(batch, draw, both=True), capture.run(batch, draw), capture.run(batch)
    assert len(counted) == 3
    for layer in layers:
        assert torch.equal(both.grads[layer.name], drawn.grads[layer.name])
        assert torch.equal(both.given[layer.name], given.grads[layer.name])


def test_a_head_on_another_device_changes_no_bit(counted: list[int]) -> None:
    """In float32, where the two ways differ; the second device is not there."""
    plain, far = (build("llama", vocab=VOCAB, tie_word_embeddings=False) for _ in range(2))
    expected = taken(plain)
    with second_device():
        found = taken(spread(far, halves(far)))
    assert len(counted) == 2 and torch.equal(found.labels, expected.labels) and torch.equal(found.loss, expected.loss)
    for ours, usual in ((found.grads, expected.grads), (found.given, expected.given)):
        for name, g in ours.items():
            assert torch.equal(g.cpu(), usual[name])


def test_a_head_that_is_tracked_has_gradients_of_its_own(counted: list[int]) -> None:
    model = build("qwen2", torch.float64, vocab=VOCAB)
    found = taken(model, ("lm_head", "*.down_proj"))
    assert not counted and found.grads["lm_head"].shape[-1] == VOCAB
    assert not ends_in_head(model, ["lm_head"]) and ends_in_head(model, ["model.layers.0.mlp.down_proj"])


def gemma(softcap: float | None) -> Any:
    """Bends the logits where a bound is given."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    heads_of = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Gemma2Config(vocab_size=VOCAB, final_logit_softcapping=softcap, **sizes, **heads_of)
        return Gemma2ForCausalLM(config).double().eval().requires_grad_(False)


def test_logits_that_are_changed_behind_the_head_are_seen(counted: list[int]) -> None:
    bent, plain = gemma(0.05), gemma(None)
    assert not ends_in_head(bent, []) and ends_in_head(plain, [])
    equal(taken(bent), taken(bent, whole=True), 1e-12)
    assert not counted
    equal(taken(plain), taken(plain, whole=True), 1e-6)
    assert len(counted) == 1


def test_logits_that_are_changed_in_place_are_seen(counted: list[int]) -> None:
    """They are the very tensor that the head gave."""
    model = build("gpt2", torch.float64, vocab=VOCAB)

    def halve(_: Any, __: Any, output: Any) -> None:
        output.logits.mul_(0.5)

    plain = taken(model)
    del counted[:]
    handle = model.register_forward_hook(halve)
    found, expected = taken(model), taken(model, whole=True)
    handle.remove()
    assert not counted and not torch.equal(found.loss, plain.loss)
    equal(found, expected, 1e-12)


def test_a_classifier_has_no_such_head(counted: list[int]) -> None:
    config = build("gpt2", vocab=VOCAB).config
    config.num_labels = 3
    assert not ends_in_head(GPT2ForSequenceClassification(config), [])


def test_what_is_turned_into_the_heads_precision_is_seen_as_turned(counted: list[int]) -> None:
    """By a hook before the head, as loaders do."""
    model = build("qwen2", vocab=VOCAB)
    model.lm_head.to(torch.float64)
    handle = model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    found = taken(model)
    assert len(counted) == 1
    equal(found, taken(model, whole=True), 1e-5)
    handle.remove()


def test_the_plan_knows_of_it() -> None:
    """A second backward pass spares the head's product, and logits have no gradient as wide as they."""
    model = build("gpt2", vocab=VOCAB)
    covered = coverage(model)
    shape = ModelShape.of(model, covered, input_groups(model, covered.tracked))
    assert shape.linear_head and shape.spared_flops == 2 * 16 * VOCAB
    other = ModelShape(**{**vars(shape), "linear_head": False})
    assert other.spared_flops == 0 and shape.activation_bytes(4, []) == other.activation_bytes(4, []) - 4 * VOCAB
    assert shape.again_bytes(4) < other.again_bytes(4) and shape.pass_bytes(4) < other.pass_bytes(4)
