"""Load a model that is at hand, ready for gradients.

``load_model`` and ``load_tokenizer`` read the local folder that ``find_model`` brought, and nothing else. Weights come
from safetensors only: nothing is unpickled, and code that ships with a model runs only if the config says so.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raylux import adapters, modules
from raylux.classes import check_classifier, class_names, classes_of
from raylux.errors import UserError
from raylux.experts import split_experts
from raylux.layers import Coverage, SkippedLayer, TrackedLayer, coverage
from raylux.modelcheck import check_shapes
from raylux.modelfiles import ModelFiles, find_adapter, find_described, find_model, first_line, on_this_node, quiet
from raylux.placement import Placement

__all__ = [
    "LOADERS",
    "Coverage",
    "ModelFiles",
    "SkippedLayer",
    "TrackedLayer",
    "classes_at",
    "classes_of",
    "context_length",
    "coverage",
    "find_adapter",
    "find_described",
    "find_model",
    "load_config",
    "load_model",
    "load_structure",
    "load_tokenizer",
    "logit_width",
    "on_this_node",
    "reads",
    "resolve_device",
    "vocabulary_size",
]

LOADERS: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
}
# Types whose positions are counted from the number after their padding token on.
_LATE = frozenset(
    "camembert data2vec-text esm ibert longformer luke mpnet roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl "
    "xmod".split()
)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def load_tokenizer(files: ModelFiles, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: there is none in the folder, it cannot be read, or it knows no token.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                files.tokenizer, local_files_only=True, trust_remote_code=trust_remote_code
            )
            known = len(tokenizer) > len(set(tokenizer.all_special_ids))
    except BaseException as error:
        # Backends raise bare Exception for a file they cannot parse; the one in Rust panics, past Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _no_tokenizer(files, f"{type(error).__name__}: {first_line(error)}") from None
    if not known:
        # transformers builds some classes without their files, with an empty vocabulary.
        raise _no_tokenizer(files, "its vocabulary is empty")
    return tokenizer


def _no_tokenizer(files: ModelFiles, why: str) -> UserError:
    if "trust_remote_code" in why or "custom code" in why:
        why = "it ships its own code, which runs with model.trust_remote_code=true only"
    return UserError(
        f"{files.tokenizer}: no tokenizer could be loaded ({why}); "
        "set model.tokenizer to a folder or hub name that has one"
    )


def load_config(files: ModelFiles, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config, as transformers reads it.

    Raises:
        UserError: it cannot, or the config says nothing usable.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                files.folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        vocabulary_size(config)
    except Exception as error:  # each architecture's config checks itself in its own way, or not at all
        raise UserError(f"{files.folder}/config.json: transformers cannot read it ({first_line(error)})") from None
    if files.task == "classification":
        check_classifier(config, f"{files.folder}/config.json")
    return config


def classes_at(files: ModelFiles, trust_remote_code: bool = False) -> tuple[str, ...] | None:
    """``classes_of`` a model by its config alone."""
    return class_names(load_config(files, trust_remote_code)) if files.task == "classification" else None


def load_structure(files: ModelFiles, trust_remote_code: bool = False, weights: bool = True) -> PreTrainedModel:
    """The model without its weights (meta device): enough for ``coverage``, costs neither time nor memory.

    Args:
        files: from ``find_model``.
        trust_remote_code: whether code that ships with the model may run.
        weights: hold its shapes against those of the weights' files; False: a folder with config.json alone will do.

    Raises:
        UserError: config.json describes no model that can be built, or not the one whose weights are there.
    """
    if files.task == "module":
        return cast(PreTrainedModel, modules.held(files.folder))
    config = load_config(files, trust_remote_code)
    try:
        with torch.device("meta"), quiet():
            model = LOADERS[files.task].from_config(config, trust_remote_code=trust_remote_code)
        model.tie_weights()
    except Exception as error:  # as in load_config: a bad size fails wherever it is first used
        raise UserError(
            f"{files.folder}/config.json: no model can be built from it ({type(error).__name__}: {first_line(error)})"
        ) from None
    if weights:
        check_shapes(Path(files.folder), {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    with torch.device("meta"):
        return _prepared(model, files, weights=False)


def load_model(
    files: ModelFiles,
    dtype: str,
    device: str,
    trust_remote_code: bool = False,
    placement: Placement | None = None,
) -> PreTrainedModel:
    """Load the model for gradients: eval mode (no dropout), frozen, no key-value cache, fused experts taken apart.

    Args:
        files: from ``find_model``; the network is not touched.
        dtype: ``float32``, ``float64`` or ``bfloat16``.
        device: ``cpu`` or ``cuda`` (see ``resolve_device``).
        trust_remote_code: whether code that ships with the model may run.
        placement: which parts go elsewhere, by accelerate; a weight goes there as it is read, never through ``device``.

    Raises:
        UserError: weights missing, broken, or not finite.
    """
    if files.task == "module":
        return cast(PreTrainedModel, modules.held(files.folder, DTYPES[dtype], device))
    config = load_config(files, trust_remote_code)
    try:
        with quiet():
            loaded: Any = LOADERS[files.task].from_pretrained(
                files.folder,
                config=config,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **({} if placement is None else {"device_map": placement.device_map}),
            )
    except MemoryError:
        raise
    except Exception as error:  # SafetensorError derives from Exception alone
        raise UserError(f"{files.folder}: the weights cannot be loaded ({first_line(error)})") from None
    model, report = loaded
    _check_weights(model, report, files.folder)
    model.config.use_cache = False
    model = model.eval().requires_grad_(False)
    return _prepared(model if placement else model.to(device), files, weights=True)


def _prepared(model: PreTrainedModel, files: ModelFiles, weights: bool) -> PreTrainedModel:
    """With its adapter, if it has one, and with its fused experts taken apart."""
    if files.adapter is not None:
        model = adapters.attach(model, Path(files.adapter), weights)
    split_experts(model)
    return model


def resolve_device(device: str) -> str:
    """``auto`` becomes ``cuda`` where there is a CUDA device and ``cpu`` elsewhere.

    Raises:
        UserError: ``cuda`` was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("model.device is 'cuda' but torch sees no CUDA device here; use 'cpu' or 'auto'")
    return ("cuda" if available else "cpu") if device == "auto" else device


def context_length(config: PretrainedConfig) -> int | None:
    """The longest sequence the model's positions allow, in tokens; None where there is no such bound (ALiBi)."""
    text = config.get_text_config()
    if getattr(text, "alibi", False) or text.model_type == "bloom":
        return None
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            late = text.model_type in _LATE and isinstance(text.pad_token_id, int)
            return max(1, value - text.pad_token_id - 1) if late else value
    return None


def reads(model: Any) -> tuple[int, int | None]:
    """``vocabulary_size`` and ``context_length``; a module in memory knows no tokens, and reads one thing."""
    if modules.features_of(model) is not None:
        return 0, 1
    return vocabulary_size(model.config), context_length(model.config)


def logit_width(model: Any) -> int:
    """Entries of a row of logits: classes, or the vocabulary."""
    return len(classes_of(model) or ()) or vocabulary_size(model.config)


def vocabulary_size(config: PretrainedConfig) -> int:
    """How many token ids the model has an embedding for."""
    return int(config.get_text_config().vocab_size)


_NUMBER = re.compile(r"\.\d+\.")


def _check_weights(model: PreTrainedModel, report: dict[str, Any], folder: str) -> None:
    # transformers only warns here, and goes on with random weights.
    for key, what in (("missing_keys", "has no weights for"), ("mismatched_keys", "has weights of another shape for")):
        if report.get(key):
            raise UserError(f"{folder}: the checkpoint {what} {_names(sorted(str(name) for name in report[key]))}")
    own = {_NUMBER.sub(".0.", name) for name in model.state_dict()}
    beyond = sorted(str(name) for name in report.get("unexpected_keys", ()) if _NUMBER.sub(".0.", str(name)) in own)
    if beyond:  # a model cut short by its config would run, and answer for another one
        raise UserError(f"{folder}: config.json has fewer layers than the checkpoint, which has {_names(beyond)}")
    held = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.is_meta]
    bad = [name for name, parameter in held if not _is_finite(parameter)]
    if len(held) < len(list(model.parameters())):  # the others stayed in their files
        bad += _unfinite_in(Path(folder))
    if bad:
        raise UserError(f"{folder}: NaN or infinity in the weights of {_names(bad)}")


def _unfinite_in(folder: Path) -> list[str]:
    """Names of tensors in a model's files with a NaN or infinity, one tensor in memory at a time."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found += [name for name in file.keys() if not _is_finite(file.get_tensor(name))]  # noqa: SIM118
    return found


def _is_finite(tensor: torch.Tensor) -> bool:
    """Without a copy of the tensor: its least and greatest value are finite only if all are."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
