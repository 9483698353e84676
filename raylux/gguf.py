"""GGUF files (llama.cpp's format, often quantised) become a plain safetensors folder, once.

Reading one dequantises every tensor in numpy, about a minute for 135 M parameters; the converted folder
loads in seconds. The weights are those of the quantised file, kept as float32.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from raylux.cache import build_once, entry_name
from raylux.errors import UserError
from raylux.sources import one_line

FORMAT = 1  # raise it when what a conversion writes changes: older entries are then left alone


def converted(path: Path, label: str | None = None) -> Path:
    """The converted folder of a GGUF file, made in the cache on the first call.

    Args:
        path: the file.
        label: how messages call it (a ``package://`` path, say); default: the path.

    Raises:
        UserError: no GGUF file, an architecture that transformers cannot read, a missing package.
    """
    path = path.resolve()
    facts = path.stat()
    name = entry_name(path.stem, FORMAT, path, facts.st_size, facts.st_mtime_ns)
    return build_once("models", name, lambda folder: convert(path, folder, label or str(path)))


def convert(path: Path, folder: Path, label: str) -> None:
    """Write config, safetensors weights (float32) and tokenizer of a GGUF file into ``folder``."""
    _need_packages(label)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{label}: not a GGUF file (its first bytes are not 'GGUF')")
    print(f"converting {path.name} to safetensors in the cache: happens once, takes a minute or more", file=sys.stderr)
    model, tokenizer = read_gguf(path, label)
    try:
        plain = plain_model(model)
    except Exception as error:
        raise UserError(f"{label}: its tensors make no {type(model).__name__} ({one_line(error)})") from None
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_gguf(path: Path, label: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32) and tokenizer as transformers reads them from the file."""
    place = str(path.parent)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=path.name, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=path.name, local_files_only=True)
    except MemoryError:
        raise
    except BaseException as error:
        # A cut or odd file fails in numpy, struct or the tokenizer, each in its own way; the last one panics.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{label}: transformers cannot read this GGUF file ({one_line(error)})") from None
    model, report = loaded
    missing = sorted(str(name) for name in report["missing_keys"])
    if missing:  # transformers only warns, and makes up random weights
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{label}: the file has no weights for {missing[0]}{more}")
    return model, tokenizer


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that can be saved: transformers refuses to save one marked as quantised."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    state = model.state_dict()
    # On the meta device nothing is allocated or initialised; assign=True then takes over the tensors as they are.
    with torch.device("meta"):
        plain = type(model)(config)
    missing, unexpected = plain.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise RuntimeError(
            f"GGUF weights do not fit {type(model).__name__}: missing {missing}, unexpected {unexpected}"
        )
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _need_packages(label: str) -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{label}: reading GGUF needs the package {' and '.join(missing)}: pip install gguf accelerate")
