"""Capture: a and g of every architecture give the weight gradients that autograd gives."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raylux import prepare
from raylux.batches import IGNORED, Batch, TokenRow, collate
from raylux.capture import Capture, Captured
from raylux.errors import NumericsError
from raylux.groups import input_groups
from raylux.influence import sequence_gradients
from raylux.layers import TrackedLayer, coverage, tracked_layer
from raylux.sampling import sample_labels
from tests import reference
from tests.architectures import NAMES, build
from tests.small import Inputs, make_inputs

VOCAB = 40
# These compute in the dtype of the model; the RMS norms of the others round to float32 always, and a
# difference in the last bit of a float64 may cross a rounding border there.
FLOAT64 = ("gpt2", "neox", "opt")
LENGTHS = (5, 12, 9)


def rows_of(lengths: Sequence[int] = LENGTHS, masked: bool = False, seed: int = 0) -> list[TokenRow]:
    random = np.random.default_rng(seed)
    rows = []
    for place, length in enumerate(lengths):
        tokens = random.integers(2, VOCAB, length).astype(np.int32)
        labels = tokens.copy()
        labels[0] = IGNORED
        if masked:
            labels[: length // 2] = IGNORED
            labels[-1] = IGNORED if place == 1 else labels[-1]
        rows.append(TokenRow(tokens, labels, key=100 + place))
    return rows


def batch_of(rows: Sequence[TokenRow], pad_left: bool = False, padded: int = 14) -> Batch:
    return collate(rows, range(len(rows)), padded, pad_left=pad_left)


def captured_gradients(captured: Captured, groups: dict[str, str]) -> dict[str, np.ndarray]:
    return {name: sequence_gradients(captured.inputs[groups[name]], g).numpy() for name, g in captured.grads.items()}


def worst(model: PreTrainedModel, batch: Batch, rows: Sequence[TokenRow]) -> float:
    """The largest max|Δ| / RMS over layers, against autograd on one unpadded sequence at a time."""
    layers = coverage(model).tracked
    groups = input_groups(model, layers)
    found = captured_gradients(Capture(model, layers, groups).run(batch), groups)
    names = [layer.name for layer in layers]
    expected = [reference.gradients(model, names, reference.Example(row.tokens, row.labels)) for row in rows]
    assert set(found) == set(names)
    return max(reference.difference(found[name], np.stack([one[name] for one in expected])) for name in names)


class TestAgainstAutograd:
    @pytest.mark.parametrize("pad_left", [False, True], ids=["right", "left"])
    @pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
    @pytest.mark.parametrize("name", NAMES)
    def test_every_architecture(self, name: str, masked: bool, pad_left: bool) -> None:
        model = build(name, torch.float64, VOCAB)
        rows = rows_of(masked=masked)
        assert worst(model, batch_of(rows, pad_left), rows) <= (1e-9 if name in FLOAT64 else 1e-6)

    @pytest.mark.parametrize("pad_left", [False, True], ids=["right", "left"])
    @pytest.mark.parametrize("name", NAMES)
    def test_in_float32_too(self, name: str, pad_left: bool) -> None:
        """By the norm of each sequence's gradient, as near to float64 as autograd in float32 is."""
        model, rows = build(name, torch.float32, VOCAB), rows_of(masked=True)
        wide = copy.deepcopy(model).double()
        layers = coverage(model).tracked
        groups = input_groups(model, layers)
        found = captured_gradients(Capture(model, layers, groups).run(batch_of(rows, pad_left)), groups)
        for place, row in enumerate(rows):
            example = reference.Example(row.tokens, row.labels)
            expected, exact = (reference.gradients(each, list(found), example) for each in (model, wide))
            for layer, gradient in found.items():
                error, usual = (np.linalg.norm(x - exact[layer]) for x in (gradient[place], expected[layer]))
                assert error <= 2 * usual

    def test_tied_embeddings_are_what_the_models_have(self) -> None:
        for name in ("gpt2", "llama", "opt"):
            model = build(name, vocab=VOCAB)
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    @pytest.mark.parametrize("pad_left", [False, True], ids=["right", "left"])
    def test_a_module_used_twice_sums_its_calls(self, pad_left: bool) -> None:
        model = build("gpt2", torch.float64, VOCAB)
        model.transformer.h[1].mlp = model.transformer.h[0].mlp
        layers = coverage(model).tracked
        assert [layer.name for layer in layers] == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
        rows = rows_of(masked=True)
        batch = batch_of(rows, pad_left)
        captured = Capture(model, layers).run(batch)
        for layer in layers:
            assert captured.inputs[layer.name].shape == (3, 2 * 14, layer.inputs)
            assert captured.grads[layer.name].shape == (3, 2 * 14, layer.outputs)
        assert worst(model, batch, rows) <= 1e-9

    def test_a_call_that_takes_no_part_in_the_loss_adds_nothing(self) -> None:
        model = build("gpt2", torch.float64, VOCAB)
        first, second = model.transformer.h
        second.mlp = first.mlp

        class Cut(nn.Module):
            """Calls the shared MLP and throws its output away."""

            def forward(self, x: Tensor) -> Tensor:
                return x + 0.0 * first.mlp(x).detach()

        second.mlp = Cut()
        rows = rows_of()
        assert worst(model, batch_of(rows), rows) <= 1e-9

    def test_the_loss_of_each_sequence(self) -> None:
        model, rows = build("gpt2", torch.float64, VOCAB), rows_of(masked=True)
        captured = Capture(model, coverage(model).tracked).run(batch_of(rows))
        expected = [float(reference.loss(model, reference.Example(row.tokens, row.labels))) for row in rows]
        np.testing.assert_allclose(captured.loss.numpy(), expected, rtol=1e-12)

    def test_padding_is_zero_and_the_bias_coordinate_one(self) -> None:
        model, rows = build("gpt2", torch.float64, VOCAB), rows_of()
        for pad_left in (False, True):
            batch = batch_of(rows, pad_left)
            captured = Capture(model, coverage(model).tracked).run(batch)
            for name, g in captured.grads.items():
                a = captured.inputs[name]
                assert not a[~batch.mask].any()
                assert not g[~batch.mask].any()
                assert (a[batch.mask][:, -1] == 1).all()

    def test_a_sequence_without_labels_has_no_gradient(self) -> None:
        model, rows = build("gpt2", torch.float64, VOCAB), rows_of()
        empty = TokenRow(rows[0].tokens, np.full_like(rows[0].labels, IGNORED))
        captured = Capture(model, coverage(model).tracked).run(batch_of([empty, rows[1]]))
        assert captured.loss[0] == 0
        for g in captured.grads.values():
            assert not g[0].any()
            assert g[1].any()


def as_linear(module: Conv1D) -> nn.Linear:
    inputs, outputs = module.weight.shape
    linear = nn.Linear(inputs, outputs, dtype=module.weight.dtype)
    linear.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
    return linear


def test_conv1d_is_linear() -> None:
    conv, linear = build("gpt2", torch.float64, VOCAB), build("gpt2", torch.float64, VOCAB)
    for block in linear.transformer.h:
        block.mlp.c_fc, block.mlp.c_proj = as_linear(block.mlp.c_fc), as_linear(block.mlp.c_proj)
    batch = batch_of(rows_of(masked=True))
    layers = coverage(conv).tracked, coverage(linear).tracked
    assert [layer.shape for layer in layers[0]] == [layer.shape for layer in layers[1]]
    assert [layer.conv1d for layer in layers[0]] == [True] * 4
    assert [layer.conv1d for layer in layers[1]] == [False] * 4
    one, other = Capture(conv, layers[0]).run(batch), Capture(linear, layers[1]).run(batch)
    for name in one.grads:
        assert reference.difference(one.inputs[name], other.inputs[name]) <= 1e-12
        assert reference.difference(one.grads[name], other.grads[name]) <= 1e-12


@pytest.mark.parametrize(("size", "padded"), [(5, 23), (3, 24), (4, 13)])
@pytest.mark.parametrize("name", NAMES)
def test_company_changes_no_bit(name: str, size: int, padded: int) -> None:
    """In float32: a row's numbers do not depend on the other rows of a batch, nor on its place among them."""
    model = build(name, vocab=VOCAB)
    capture = Capture(model, coverage(model).tracked)
    rows = rows_of([4, 12, 7, 11, 9, 5, 12, 3])
    found: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for seed in range(4):
        chosen = np.random.default_rng(seed).permutation(len(rows))[:size].tolist()
        # The last batch is filled up with its first row.
        chosen = chosen[:2] if seed == 3 else chosen
        captured = capture.run(collate([rows[place] for place in chosen], chosen, padded, size))
        for layer, g in captured.grads.items():
            for place, row in enumerate(chosen):
                one = captured.inputs[layer][place], g[place]
                other = found.setdefault((layer, row), one)
                assert torch.equal(one[0], other[0])
                assert torch.equal(one[1], other[1])


class TestWhatIsComputed:
    def test_no_weight_gradient_is_formed(self) -> None:
        model = build("llama", vocab=VOCAB)
        Capture(model, coverage(model).tracked).run(batch_of(rows_of()))
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_the_backward_pass_stops_below_the_lowest_tracked_layer(self) -> None:
        model = build("gpt2", vocab=VOCAB)
        last = "transformer.h.1.mlp.c_proj"
        in_graph: dict[str, bool] = {}

        def look(name: str) -> object:
            def hook(_: nn.Module, inputs: object, output: object) -> None:
                in_graph[name] = isinstance(output, Tensor) and output.requires_grad

            return hook

        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(look(name))  # type: ignore[arg-type]
        captured = Capture(model, coverage(model, (last,)).tracked).run(batch_of(rows_of()))
        assert list(captured.grads) == [last]
        # Hooks of the test's run first: the tracked layer's own output is not yet part of the graph.
        above = {name for name, there in in_graph.items() if there}
        assert above == {"transformer.h.1.mlp.dropout", "transformer.ln_f", "lm_head"}

    @pytest.mark.parametrize("name", NAMES)
    def test_no_logits_without_a_loss(self, name: str) -> None:
        """A question by itself: its prompt goes through no output embedding, and the gradients are the same."""
        model = build(name, torch.float64, VOCAB)
        seen: list[int] = []
        model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
        (row,) = rows_of((11,))
        labels = np.where(np.arange(11) < 7, IGNORED, row.labels).astype(np.int32)
        asked = TokenRow(row.tokens, labels)
        batch = batch_of([asked])
        captured = Capture(model, coverage(model).tracked).run(batch)
        assert seen == [4 if "logits_to_keep" in inspect.signature(model.forward).parameters else 14]
        assert captured.labels[0, :11].tolist() == labels.tolist()
        assert float(captured.loss) == pytest.approx(
            float(reference.loss(model, reference.Example(asked.tokens, asked.labels)))
        )
        assert worst(model, batch, [asked]) <= (1e-9 if name in FLOAT64 else 1e-6)

    def test_hooks_are_gone_afterwards(self) -> None:
        model = build("gpt2", vocab=VOCAB)
        capture = Capture(model, coverage(model).tracked)
        capture.run(batch_of(rows_of()))
        assert not any(module._forward_hooks for module in model.modules())

    def test_nan_in_the_loss_is_an_error(self) -> None:
        model = build("gpt2", vocab=VOCAB)
        model.transformer.ln_f.weight.data[0] = torch.nan
        with pytest.raises(NumericsError, match="loss"):
            Capture(model, coverage(model).tracked).run(batch_of(rows_of()))

    def test_a_layer_that_is_never_called_is_an_error_with_its_name(self) -> None:
        model = build("gpt2", vocab=VOCAB)
        model.spare = nn.Linear(3, 4)
        with pytest.raises(NumericsError, match="'spare'"):
            Capture(model, [tracked_layer("spare", model.spare)]).run(batch_of(rows_of()))


class TestLabeller:
    @pytest.mark.parametrize("pad_left", [False, True], ids=["right", "left"])
    def test_is_asked_where_a_label_counts_by_the_place_in_the_sequence(self, pad_left: bool) -> None:
        model, rows = build("gpt2", vocab=VOCAB), rows_of(masked=True)
        asked: list[tuple[int, int]] = []

        def labeller(logits: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
            assert logits.shape == (len(keys), VOCAB)
            asked.extend(zip(keys.tolist(), positions.tolist(), strict=True))
            return torch.full_like(keys, 7)

        batch = batch_of(rows, pad_left)
        labels = Capture(model, coverage(model).tracked).run(batch, labeller).labels
        wanted = [(row.key, int(place)) for row in rows for place in np.flatnonzero(row.labels != IGNORED)]
        assert asked == wanted
        assert torch.equal(labels, torch.where(batch.labels == IGNORED, IGNORED, 7))

    def test_draws_do_not_depend_on_padding(self) -> None:
        model, rows = build("gpt2", torch.float64, VOCAB), rows_of()
        capture = Capture(model, coverage(model).tracked)
        drawn = []
        for pad_left, padded in ((False, 12), (False, 20), (True, 12), (True, 17)):
            batch = batch_of(rows, pad_left, padded)
            labels = capture.run(batch, lambda *asked: sample_labels(*asked, seed=3)).labels
            drawn.append([labels[place][batch.mask[place]].tolist() for place in range(len(rows))])
        assert all(labels == drawn[0] for labels in drawn)
        assert drawn[0] != [row.labels.tolist() for row in rows]

    def test_gradients_are_those_of_the_drawn_labels(self) -> None:
        model, rows = build("gpt2", torch.float64, VOCAB), rows_of()
        layers = coverage(model).tracked
        batch = batch_of(rows)
        captured = Capture(model, layers).run(batch, lambda *asked: sample_labels(*asked, seed=3))
        found = captured_gradients(captured, {layer.name: layer.name for layer in layers})
        for place, row in enumerate(rows):
            labels = captured.labels[place, : len(row.tokens)].tolist()
            expected = reference.gradients(model, list(found), reference.Example(row.tokens, labels))
            for name, gradient in found.items():
                assert reference.difference(gradient[place], expected[name]) <= 1e-9


class TestInputGroups:
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    @pytest.mark.parametrize("name", NAMES)
    def test_gate_and_up_share_their_input(self, name: str, device: str) -> None:
        model = build(name, vocab=VOCAB)
        if device == "meta":
            with torch.device("meta"):
                model = type(model)(model.config)
        layers = coverage(model).tracked
        expected = {layer.name: layer.name.replace("up_proj", "gate_proj") for layer in layers}
        assert input_groups(model, layers) == expected

    def test_a_bias_parts_a_group(self) -> None:
        model = build("llama", torch.float64, VOCAB)
        for block in model.model.layers:
            up = block.mlp.up_proj
            up.bias = nn.Parameter(torch.linspace(-1, 1, up.out_features, dtype=torch.float64), requires_grad=False)
        layers = coverage(model).tracked
        groups = input_groups(model, layers)
        assert all(leader == name for name, leader in groups.items())
        rows = rows_of()
        assert worst(model, batch_of(rows), rows) <= 1e-6

    def test_a_shared_input_changes_nothing(self) -> None:
        model = build("llama", vocab=VOCAB)
        layers: tuple[TrackedLayer, ...] = coverage(model).tracked
        groups = input_groups(model, layers)
        batch = batch_of(rows_of())
        shared, single = Capture(model, layers, groups).run(batch), Capture(model, layers).run(batch)
        assert set(shared.inputs) == set(groups.values())
        assert len(shared.inputs) < len(single.inputs) == len(layers)
        for name, leader in groups.items():
            assert torch.equal(shared.inputs[leader], single.inputs[name])
            assert torch.equal(shared.grads[name], single.grads[name])

    def test_they_are_found_once_of_models_that_config_and_code_say_are_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Other weights make no other groups; another config, other layers, and another module may."""
        asked: list[int] = []
        monkeypatch.setattr(prepare, "_FOUND", {})
        monkeypatch.setattr(prepare, "input_groups", lambda *args: asked.append(1) or input_groups(*args))
        inputs = make_inputs(tmp_path / "one")

        def groups(base: Path, *overrides: str) -> dict[str, str]:
            return prepare.Model.find(Inputs(base).config(tmp_path / "run", *overrides)).groups

        first = groups(inputs.base)
        assert any(name != leader for name, leader in first.items()) and len(asked) == 1
        first["model.layers.0.mlp.up_proj"] = "changed by a caller"
        with torch.random.fork_rng():
            torch.manual_seed(5)
            other = build("llama", num_hidden_layers=2)
            for weight in other.parameters():
                weight.data = torch.randn_like(weight)
        shutil.copytree(inputs.base, tmp_path / "two")
        other.save_pretrained(tmp_path / "two" / "model")
        assert groups(tmp_path / "two")["model.layers.0.mlp.up_proj"] == "model.layers.0.mlp.gate_proj"
        assert len(asked) == 1
        assert set(groups(inputs.base, "model.layers='*.up_proj'").values()) == {
            f"model.layers.{number}.mlp.up_proj" for number in range(2)
        }
        assert len(asked) == 2
        build("llama", num_hidden_layers=1).save_pretrained(tmp_path / "two" / "model")
        assert len(groups(tmp_path / "two")) < len(first) and len(asked) == 3
