"""Gradient checkpointing: each a and g is captured once, with the same bits, and less is kept meanwhile."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raylux.capture import Capture
from raylux.checkpointing import blocks_of, checkpointed
from raylux.cost.model import ModelShape
from raylux.experts import split_experts
from raylux.groups import input_groups
from raylux.models import coverage
from tests.architectures import build
from tests.small import contents, differing, make_inputs
from tests.test_capture import batch_of, rows_of


def captures(name: str, **sizes: Any) -> tuple[nn.Module, Capture, Capture]:
    model = build(name, **sizes)
    split_experts(model)
    layers = coverage(model).tracked
    groups = input_groups(model, layers)
    return model, Capture(model, layers, groups), Capture(model, layers, groups, checkpointing=True)


# OPT's blocks drop out in training mode, GPT-2 has other names, experts are routed anew when a block runs again.
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_captured_has_the_same_bits(name: str, both: bool) -> None:
    model, usual, again = captures(name)
    batch = batch_of(rows_of())
    labeller = (lambda p, keys, places: p.argmax(1)) if both else None
    runs: Counter[str] = Counter()
    block = usual.layers[0].name
    path = ".".join(block.split(".")[: next(at for at, part in enumerate(block.split(".")) if part.isdigit()) + 1])
    for module in model.get_submodule(path).children():
        module.register_forward_hook(lambda *_: runs.update([path]))
    wanted = usual.run(batch, labeller, both)
    once = runs[path]
    found = again.run(batch, labeller, both)
    assert runs[path] - once > once, "the block runs again"
    assert list(found.inputs) == list(wanted.inputs) and list(found.grads) == list(wanted.grads)
    pairs = [(found.inputs, wanted.inputs), (found.grads, wanted.grads), (found.given, wanted.given)]
    assert bool(found.given) == both
    for one, other in pairs:
        for layer, x in one.items():
            mine, theirs = (getattr(rows, "rows", rows) for rows in (x, other[layer]))
            assert torch.equal(mine, theirs), layer
    assert torch.equal(found.loss, wanted.loss)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_less_is_kept_for_the_backward_pass() -> None:
    """Bytes that the graph keeps beside the weights, by torch's own account, and what blocks keep of their own."""
    _, usual, again = captures("llama", num_hidden_layers=6)
    batch = batch_of(rows_of())

    def kept(capture: Capture) -> int:
        found: dict[int, int] = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in capture.model.parameters()}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in weights:
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        with checkpointed(capture._checkpointed), capture._recording(batch, capture.layers), hooks:
            capture._logits(batch, slice(None))
        return sum(found.values())

    hidden = 4 * batch.input_ids.numel() * usual.layers[0].inputs
    assert kept(again) + len(again._checkpointed) * hidden < kept(usual) / 3


def test_blocks_are_all_members_of_the_lists_that_hold_tracked_layers() -> None:
    model = build("llama", num_hidden_layers=3)
    found = blocks_of(model, ["model.layers.1.mlp.up_proj", "lm_head"])
    assert found == list(model.model.layers)


def test_a_run_has_the_same_bits(tmp_path: Path) -> None:
    """And may be gone on with either way."""
    inputs = make_inputs(tmp_path / "inputs", "llama")
    inputs.run(tmp_path / "usual", "query.max_error=0")
    inputs.run(tmp_path / "run", "query.max_error=0", "model.checkpointing=true", "fit.passes=2")
    assert differing(contents(tmp_path / "run"), contents(tmp_path / "usual")) == []
    inputs.run(tmp_path / "run", "query.max_error=0", restart="score")
    assert differing(contents(tmp_path / "run"), contents(tmp_path / "usual")) == []


def test_the_cost_model_keeps_less_and_runs_blocks_twice() -> None:
    model = build("llama", num_hidden_layers=6)
    covered = coverage(model)
    groups = input_groups(model, covered.tracked)
    usual = ModelShape.of(model, covered, groups)
    again = ModelShape(**{**vars(usual), "checkpointing": True})
    assert again.activation_bytes(4, []) < usual.activation_bytes(4, [])
    head = 2.0 * usual.hidden * usual.vocabulary
    assert again.again_flops(16) == usual.forward_flops(16) - head and usual.again_flops(16) == 0.0
