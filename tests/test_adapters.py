"""LoRA adapters: their own matrices are tracked, exactly, and what cannot be served is refused in one line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import raylux
from raylux.adapters import CONFIG, WEIGHTS
from raylux.config import Config, ModelSection
from raylux.errors import UserError
from raylux.layers import coverage
from raylux.models import find_model, load_model, load_structure
from tests import reference
from tests.architectures import build
from tests.test_exact import PARTS, QUESTIONS, TEXTS, VOCAB, check, corpus_of, example, tokenizer

RANK, ALPHA = 3, 7.0
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
ASKED = [("anna lives in", "paris"), ("boris and carla", "very dear to rome")]


def save_adapter(base: Path, out: Path, **more: Any) -> Path:
    """A random adapter of the model in ``base``, both matrices away from zero."""
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.2, **more)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    draw = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, adapter)"""
    base = tmp_path_factory.mktemp("lora")
    build("llama", torch.float64, VOCAB).save_pretrained(base / "model")
    tokenizer().save_pretrained(base / "model")
    return base / "model", save_adapter(base / "model", base / "adapter")


def section(folders: tuple[Path, Path], **more: Any) -> ModelSection:
    return ModelSection(path=str(folders[0]), adapter=str(folders[1]), dtype="float64", device="cpu", **more)


def attribute(folders: tuple[Path, Path], where: Path, *overrides: str) -> raylux.Run:
    where.mkdir()
    rows = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    asked = [json.dumps({"id": str(n), "prompt": p, "completion": c}) + "\n" for n, (p, c) in enumerate(ASKED)]
    (where / "train.jsonl").write_text("".join(rows))
    (where / "queries.jsonl").write_text("".join(asked))
    sections: dict[str, dict[str, Any]] = {
        "run": {"folder": str(where / "run")},
        "model": section(folders).model_dump(exclude_none=True),
        "corpus": {"path": str(where / "train.jsonl"), "max_length": 64},
        "queries": {"path": str(where / "queries.jsonl")},
        "prefilter": {"kind": "none"},
        "engine": {"backend": "local"},
    }
    return raylux.run(Config.parse(sections, [*PARTS, *overrides]))


def test_the_adapters_own_matrices_are_tracked_and_nothing_else(folders: tuple[Path, Path]) -> None:
    files = find_model(section(folders))
    found = coverage(load_structure(files), strict=True)
    assert {layer.name.split(".")[-2] for layer in found.tracked} == {"lora_A", "lora_B"}
    assert len(found.tracked) == 2 * 2 * len(TARGETS)
    stored = load_file(folders[1] / WEIGHTS)
    assert sorted(layer.shape for layer in found.tracked) == sorted(tuple(x.shape) for x in stored.values())
    reasons = {layer.name: layer.reason for layer in found.skipped}
    assert reasons["model.layers.0.mlp.gate_proj"].startswith("linear of the base model, which was frozen")
    assert reasons["model.layers.0.mlp.up_proj.base_layer"] == reasons["model.layers.0.mlp.gate_proj"]
    assert coverage(load_model(files, "float64", "cpu")) == found
    some = coverage(load_structure(files), ["*.1.mlp.*.lora_B.*"])
    assert [layer.name for layer in some.tracked] == [
        f"model.layers.1.mlp.{name}_proj.lora_B.default" for name in ("up", "down")
    ]
    with pytest.raises(UserError, match=r"matches nothing that can be tracked: .* is a linear of the base model"):
        coverage(load_structure(files), ["model.layers.0.mlp.gate_proj"])


def test_alpha_over_r_reaches_gradients_once(folders: tuple[Path, Path]) -> None:
    """Against autograd through merged weights W + (α/r) B A of the plain model."""
    adapted = load_model(find_model(section(folders)), "float64", "cpu")
    names = [layer.name for layer in coverage(adapted).tracked]
    one = example("anna lives in", "very dear to rome")
    found = reference.gradients(adapted, names, one)
    plain = build("llama", torch.float64, VOCAB)
    matrices = {name: adapted.get_submodule(name).weight.clone().requires_grad_(True) for name in names}
    merged = {}
    for name in names:
        if ".lora_A." in name:
            place = name.split(".lora_A.")[0]
            product = matrices[name.replace(".lora_A.", ".lora_B.")] @ matrices[name]
            merged[f"{place}.weight"] = plain.get_submodule(place).weight + ALPHA / RANK * product
    logits = torch.func.functional_call(plain, merged, kwargs={"input_ids": torch.tensor([one.tokens])}).logits[0]
    labels = torch.tensor(one.labels[1:])
    loss = torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum", ignore_index=-100)
    for name, gradient in zip(names, torch.autograd.grad(loss, list(matrices.values())), strict=True):
        np.testing.assert_allclose(found[name], gradient.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ekfac", "identity"])
def test_scores_are_exact(folders: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    run = attribute(folders, tmp_path / "run", f"curvature.kind={kind}", "fit.labels=dataset", "score.layers=true")
    assert len(corpus_of(run)) == len(TEXTS)
    # RMS norms round to float32 in the midst of float64.
    check(load_model(find_model(section(folders)), "float64", "cpu"), run, QUESTIONS, tolerance=1e-6)


def test_another_adapter_on_the_same_folder_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    attribute(folders, tmp_path / "run", "curvature.kind=diagonal", "fit.labels=dataset", "fit.sequences=4")
    other = shutil.copytree(folders[1], tmp_path / "other")
    tensors = load_file(other / WEIGHTS)
    first = min(tensors)
    save_file(tensors | {first: tensors[first] + 1}, other / WEIGHTS)
    config = raylux.open_run(tmp_path / "run" / "run").config
    moved = Config.parse(config.dump(), [f"model.adapter={other}"])
    with pytest.raises(UserError, match=r"weights differ: 1 of \d+ tensors \(first: adapter "):
        raylux.run(moved)


def _edit(folder: Path, **keys: Any) -> None:
    data = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(data | keys))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shutil.rmtree, r"model\.adapter '.*': no such file or folder"),
        (lambda at: (at / CONFIG).unlink(), r"model\.adapter '.*': no adapter_config\.json there"),
        (lambda at: (at / WEIGHTS).unlink(), r"model\.adapter '.*': no adapter_model\.safetensors there"),
        (lambda at: (at / WEIGHTS).write_bytes(b"torn"), r"a safetensors file is broken"),
        (lambda at: _edit(at, peft_type="IA3"), r"a PEFT adapter of type 'IA3'; raylux serves LORA"),
        (lambda at: _edit(at, use_dora=True), r"plain LoRA .* by use_dora = True"),
        (lambda at: _edit(at, modules_to_save=["lm_head"]), r"plain LoRA .* by modules_to_save = "),
        (lambda at: _edit(at, bias="all"), r"plain LoRA .* by bias = 'all'"),
        (lambda at: _edit(at, init_lora_weights="pissa"), r"plain LoRA .* by init_lora_weights = 'pissa'"),
        (lambda at: _edit(at, megatron_config={"hidden_size": 1}, megatron_core="this"), "by megatron_config = "),
        (lambda at: _edit(at, target_modules=["nowhere"]), r"cannot be put on this model \(.*nowhere"),
        (lambda at: _edit(at, target_modules=["q_proj"]), r"has more than fits: '.*'; is it an adapter of another"),
        (lambda at: _edit(at, target_modules=[*TARGETS, "k_proj"]), r"lacks '.*k_proj\.lora_A\.weight'; is it"),
        (lambda at: _edit(at, r=4), r"'.*' is \[3, 24\], on this model it is \[4, 24\]; is it an adapter of another"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    folders: tuple[Path, Path], tmp_path: Path, change: Any, said: str
) -> None:
    adapter = shutil.copytree(folders[1], tmp_path / "adapter")
    change(adapter)
    with pytest.raises(UserError, match=said) as caught:
        load_structure(find_model(section((folders[0], adapter))))
    assert "\n" not in str(caught.value)


def test_nan_in_an_adapter(folders: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(folders[1], tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS)
    save_file(tensors | {min(tensors): tensors[min(tensors)] * float("nan")}, adapter / WEIGHTS)
    with pytest.raises(UserError, match="NaN or infinity in the weights of"):
        load_model(find_model(section((folders[0], adapter))), "float32", "cpu")


def test_an_adapter_is_no_model_and_a_model_object_with_one_is_not_taken(folders: tuple[Path, Path]) -> None:
    both = shutil.copytree(folders[0], folders[0].with_name("both"), dirs_exist_ok=True)
    shutil.copy(folders[1] / CONFIG, both)
    with pytest.raises(UserError, match=r"holds an adapter .*name it in model\.adapter"):
        find_model(ModelSection(path=str(both)))
    adapted = load_model(find_model(section(folders)), "float32", "cpu")
    with pytest.raises(UserError, match=r"the model carries an adapter; .*model\.adapter"):
        raylux.attribute(adapted, tokenizer(), TEXTS, ASKED)


def test_without_peft_the_extra_is_named(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"needs PEFT; pip install 'raylux\[lora\]'"):
        find_model(section(folders))
