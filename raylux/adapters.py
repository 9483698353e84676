"""LoRA adapters (Hu et al. 2021): small matrices B A beside frozen weights, W x + (α/r) B A x, as PEFT keeps them.

With an adapter its own matrices are what is tracked, since they are what was trained: ``lora_A`` [r, in] and ``lora_B``
[out, r] are linear layers like any other. PEFT applies α/r to the output of ``lora_B``, so it reaches the gradients of
both once, by the backward pass. A merged model would be another question: its W has more parameters than were trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from raylux.errors import UserError, shown
from raylux.markup import parse_json
from raylux.sources import read_text
from raylux.weights import read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
# Ways to begin that leave the base model's weights as they are; others (PiSSA, OLoRA …) take something out of them.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# What a plain LoRA may say; anything else that is not as PEFT has it by default is another method.
_PLAIN = frozenset(
    {
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "lora_alpha", "lora_dropout", "lora_bias", "use_rslora", "rank_pattern", "alpha_pattern",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
        "init_lora_weights", "eva_config",
    }
)  # fmt: skip


def check_adapter(folder: Path, label: str) -> None:
    """Refuse, in one line, a folder that holds no LoRA adapter that could be served.

    Args:
        folder: of the adapter.
        label: how the user called it.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"model.adapter '{label}': no {CONFIG} there, so not a PEFT adapter")
    config = parse_json(read_text(str(folder / CONFIG)), str(folder / CONFIG))
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"model.adapter '{label}': a PEFT adapter of type {kind!r}; raylux serves LORA")
    usual = _peft().LoraConfig().to_dict()
    asked = [key for key, value in config.items() if key not in _PLAIN and value and value != usual.get(key)]
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        asked.append("init_lora_weights")
    if asked:
        raise UserError(
            f"model.adapter '{label}': raylux serves plain LoRA on linear layers; its {CONFIG} asks for more, by "
            f"{asked[0]} = {shown(config[asked[0]])}"
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"model.adapter '{label}': no {WEIGHTS} there; raylux reads safetensors only")
    read_header(folder / WEIGHTS)


def attach(model: Any, folder: Path, weights: bool) -> Any:
    """The model with the adapter's layers in it, frozen and in the model's precision.

    Args:
        model: its base, which is changed in place; may lie on the meta device.
        folder: passed ``check_adapter``.
        weights: read the adapter's weights too.

    Raises:
        UserError: it is not an adapter of this model.
    """
    peft, label = _peft(), str(folder)
    dtype = next(model.parameters()).dtype
    try:
        config = peft.PeftConfig.from_pretrained(label)
        # What it was begun with is overwritten.
        config.init_lora_weights, config.inference_mode = True, True
        with _unseen():
            adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    except Exception as error:  # PEFT checks a config in its own ways
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.adapter '{label}': cannot be put on this model ({first.rstrip('.')})") from None
    own = peft.get_peft_model_state_dict(adapted)
    _check_tensors(folder, {name: tuple(tensor.shape) for name, tensor in own.items()})
    if weights:
        tensors = load_file(folder / WEIGHTS)
        bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if bad:
            raise UserError(f"{folder / WEIGHTS}: NaN or infinity in the weights of {bad[0]}")
        peft.set_peft_model_state_dict(adapted, tensors)
    base = adapted.get_base_model()
    for name, parameter in base.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype)
    return base.eval().requires_grad_(False)


def is_adapter(name: str) -> bool:
    """Whether a module or parameter is one of an adapter's own, by its path."""
    return any(part.startswith("lora_") for part in name.split("."))


def has_adapter(model: nn.Module) -> bool:
    """Whether a model carries an adapter."""
    return any(is_adapter(name) for name, _ in model.named_modules())


def _check_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    path = folder / WEIGHTS
    there = {tensor.name: tensor.shape for tensor in read_header(path)}
    hint = "is it an adapter of another model?"
    for what, names in (("lacks", shapes.keys() - there.keys()), ("has more than fits:", there.keys() - shapes.keys())):
        if names:
            raise UserError(f"{path}: {what} '{min(names)}'; {hint}")
    for name, shape in there.items():
        if shape != shapes[name]:
            raise UserError(f"{path}: '{name}' is {list(shape)}, on this model it is {list(shapes[name])}; {hint}")


@contextmanager
def _unseen() -> Iterator[None]:
    """Neither the random numbers that are overwritten nor what PEFT warns of leaves a trace."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("model.adapter: reading an adapter needs PEFT; pip install 'raylux[lora]'") from None
    return peft
