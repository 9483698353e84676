"""What a model's folder must be before any of it is loaded: config.json, file names, headers of the weights.

Everything here reads text and headers alone; nothing of a model runs, nothing large is allocated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from raylux.classes import Asked, TaskName, task_named
from raylux.errors import UserError, shown
from raylux.markup import parse_json
from raylux.modules import check_held, is_module
from raylux.sources import read_text
from raylux.weights import check_indexes, read_header, weight_files

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")

# Models are built before their weights are looked at, a module at a time: without a bound a wrong number hangs.
_COUNTED = re.compile(r"(?:num|n)_(?:\w+_)?(?:layer|head|expert|block|label)s?(?:_\w+)?")
_MOST_COUNTED = 10_000
_LARGEST = 1 << 40


def check_folder(folder: Path, label: str, trust_remote_code: bool, task: Asked = "auto") -> TaskName:
    """Refuse, in one line, a folder that could not be served; say what its model is for.

    Args:
        folder: of the model.
        label: how the user called it.
        trust_remote_code: whether code that ships with the model may run.
        task: ``model.task``.

    Raises:
        UserError: no config.json or one of another kind of model, no weights that can be read without running
            something, code of its own that is not allowed.
    """
    config = read_config(folder, label)
    if is_module(config):
        check_held(str(folder))
        return "module"
    kind = config["model_type"]
    own_code = bool(config.get("auto_map")) and kind not in CONFIG_MAPPING_NAMES
    if own_code and not trust_remote_code:
        raise UserError(
            f"{label}: this model ships its own code; set model.trust_remote_code=true to run it, if you trust it"
        )
    if own_code and task == "classification":
        raise UserError(f"{label}: a classifier that ships its own code is not served")
    named: TaskName = "causal-lm" if own_code else task_of_config(config, label, task)
    _check_numbers(config, f"{folder / 'config.json'}")
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UserError(
            f"{label}: the weights are quantised ({method or 'unknown method'}); gradients need the unquantised model"
        )
    _check_weight_files(folder, label, config)
    return named


def check_shapes(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights whose shapes are not those that config.json asks for; ``shapes`` are the built model's.

    Tensors that go by other names in the file are left to the loader.
    """
    for path in weight_files(folder):
        for tensor in read_header(path):
            wanted = shapes.get(tensor.name, tensor.shape)
            if wanted != tensor.shape:
                raise UserError(
                    f"{path}: '{tensor.name}' is {list(tensor.shape)}, config.json makes it {list(wanted)}; "
                    "do they belong together?"
                )


def _check_weight_files(folder: Path, label: str, config: dict[str, Any]) -> None:
    if config.get("transformers_weights") is not None:
        raise UserError(f"{folder / 'config.json'}: 'transformers_weights' is not served; use the usual file names")
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{label}: holds an adapter (adapter_config.json): name it in model.adapter, its base in model.path"
        )
    check_indexes(folder)
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
        raise UserError(_no_safetensors(folder, label, pickled))
    for path in weight_files(folder):
        read_header(path)
        try:
            # Checks dtypes, sizes, overlaps and holes; reads nothing. For torch it would map the file as memory to be
            # written, which Linux refuses of a file larger than that: the model may be for another machine.
            with safe_open(str(path), "np"):
                pass
        except Exception as error:  # SafetensorError derives from Exception alone
            raise UserError(f"{path}: a safetensors file is broken ({error}); bring the model's files again") from None


def read_config(folder: Path, label: str) -> dict[str, Any]:
    """config.json of a model's folder; raises UserError where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        gguf = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; it holds {gguf[0]}: name that file" if gguf else ""
        raise UserError(f"{label}: no config.json there, so not a transformers model{hint}")
    config = parse_json(read_text(str(path)), str(path))
    if not isinstance(config, dict) or not config.get("model_type") or not isinstance(config["model_type"], str):
        raise UserError(f"{path}: names no model_type, so not the config of a transformers model")
    return config


def task_of_config(config: dict[str, Any], label: str, task: Asked = "auto") -> TaskName:
    """What a known type of model is for; arguments as of ``task_named``."""
    kind = config["model_type"]
    if kind not in CONFIG_MAPPING_NAMES:
        raise UserError(f"{label}: this version of transformers does not know model type '{kind}'")
    return task_named(config, label, task)


def _check_numbers(config: dict[str, Any], where: str) -> None:
    """Refuse numbers that no model has: NaN, or counts and sizes that would never end or fit."""
    for key, value in _numbers(config):
        absurd = abs(value) > _LARGEST and math.isfinite(value)
        if _COUNTED.fullmatch(key):
            absurd = absurd or value > _MOST_COUNTED
        if key in ("max_position_embeddings", "n_positions"):
            absurd = absurd or value < 1
        if absurd or math.isnan(value):
            raise UserError(f"{where}: '{key}' is {shown(value)}, which no model has")


def _numbers(data: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of nested mappings and lists with the key that it stands under."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _numbers(value, name)
    elif isinstance(data, list):
        for value in data:
            yield from _numbers(value, key)
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield key, data


def _no_safetensors(folder: Path, label: str, pickled: list[str]) -> str:
    if not pickled:
        return f"{label}: no *.safetensors weights there"
    return (
        f"{label}: the weights are {pickled[0]}, a format that can run code when read; raylux reads safetensors only. "
        'If you trust it, convert it: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}')\""
    )
