"""Find a model (local folder, GGUF, hub name, fsspec URL, package file) and load it, ready for gradients.

``find_model`` runs once, on the driver, and may reach for the network; what it returns is a local folder,
and ``load_model`` and ``load_tokenizer`` read that alone. Weights come from safetensors only: nothing is
unpickled, and code that ships with a model runs only if the config says so.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from raylux.cache import build_once, entry_name
from raylux.config import ModelSection
from raylux.errors import UserError
from raylux.layers import Coverage, SkippedLayer, TrackedLayer, coverage
from raylux.weights import check_indexes

__all__ = [
    "Coverage",
    "ModelFiles",
    "SkippedLayer",
    "TrackedLayer",
    "context_length",
    "coverage",
    "find_model",
    "load_config",
    "load_model",
    "load_structure",
    "load_tokenizer",
    "resolve_device",
    "vocabulary_size",
]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "*.jinja", "*.tiktoken")
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py")


@dataclass(frozen=True)
class ModelFiles:
    """A model that is at hand: ``folder`` has config.json and safetensors, ``tokenizer`` is a local folder too."""

    folder: str
    tokenizer: str


def find_model(config: ModelSection) -> ModelFiles:
    """Bring the model of a config to a local folder and check that it is one that raylux can serve.

    A GGUF file is converted once and a remote folder copied once, both into ``$RAYLUX_CACHE``; a hub name
    is downloaded by huggingface_hub into its own cache.

    Raises:
        UserError: not found, not reachable, no safetensors weights, no causal language model, its own code
            needed but not allowed.
    """
    folder = _bring(config.path, MODEL_FILES + TOKENIZER_FILES, "model.path")
    _check_folder(folder, config.path, config.trust_remote_code)
    tokenizer = folder
    if config.tokenizer is not None:
        tokenizer = _bring(config.tokenizer, (*TOKENIZER_FILES, "config.json"), "model.tokenizer")
    return ModelFiles(str(folder), str(tokenizer))


def load_tokenizer(files: ModelFiles, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: there is none in the folder, or it cannot be read.
    """
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                files.tokenizer, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # tokenizer backends raise bare Exception for a file they cannot parse
        raise UserError(
            f"{files.tokenizer}: no tokenizer could be loaded ({_first_line(error)}); "
            "set model.tokenizer to a folder or hub name that has one"
        ) from None


def load_config(files: ModelFiles, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config, as transformers reads it."""
    try:
        return AutoConfig.from_pretrained(files.folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise UserError(f"{files.folder}/config.json: transformers cannot read it ({_first_line(error)})") from None


def load_structure(files: ModelFiles, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without its weights (meta device): enough for ``coverage``, costs neither time nor memory."""
    config = load_config(files, trust_remote_code)
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model


def load_model(files: ModelFiles, dtype: str, device: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the model for gradients: eval mode (no dropout), frozen parameters, no key-value cache.

    Args:
        files: from ``find_model``; the network is not touched.
        dtype: ``float32``, ``float64`` or ``bfloat16``.
        device: ``cpu`` or ``cuda`` (see ``resolve_device``).

    Raises:
        UserError: weights missing, broken, or not finite.
    """
    config = load_config(files, trust_remote_code)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                files.folder,
                config=config,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{files.folder}: the weights cannot be loaded ({_first_line(error)})") from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # derives from Exception alone, lives in a binary module
            raise
        raise UserError(f"{files.folder}: a safetensors file is broken ({_first_line(error)})") from None
    model, report = loaded
    _check_weights(model, report, files.folder)
    model.config.use_cache = False
    return model.eval().requires_grad_(False).to(device)


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
            return value
    return None


def vocabulary_size(config: PretrainedConfig) -> int:
    """How many token ids the model has an embedding for."""
    return int(config.get_text_config().vocab_size)


# --- bringing files here ---------------------------------------------------------------------------------------


def _bring(path: str, patterns: tuple[str, ...], key: str) -> Path:
    """The local folder that a path of any kind stands for."""
    from raylux.sources import is_url, resolve

    place = resolve(path)
    if is_url(place):
        place = str(_copied(place, patterns))
    local = Path(place).expanduser()
    if local.is_file():
        if local.suffix.lower() != ".gguf":
            raise UserError(f"{key} '{path}' is a file; name the model's folder, or a .gguf file")
        from raylux.gguf import converted

        with quiet():
            return converted(local, path)
    if local.is_dir():
        return local.resolve()
    if _looks_local(path):
        raise UserError(f"{key} '{path}': no such file or folder")
    return _downloaded(path, patterns, key)


def _looks_local(path: str) -> bool:
    """A hub name is NAME or OWNER/NAME; everything else is meant as a path."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith((".gguf", "/")) or "\\" in path


def _downloaded(name: str, patterns: tuple[str, ...], key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        # Top-level files only: repositories keep other formats of the same weights in subfolders.
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except GatedRepoError:
        problem = "the hub grants access only after a request on its page; then log in with 'hf auth login'"
    except RepositoryNotFoundError:
        problem = "no such local folder, and no such model on the hub (or a private one: 'hf auth login')"
    except HFValidationError:
        problem = "no such local folder, and not a name the hub knows (write owner/name)"
    except LocalEntryNotFoundError:
        problem = "no such local folder, and the hub cannot be reached (offline?); give a local folder or a GGUF file"
    except Exception as error:  # whatever the HTTP library below raises: all of it means "not downloaded"
        problem = f"cannot be downloaded from the hub ({_first_line(error)})"
    raise UserError(f"{key} '{name}': {problem}")


def _copied(url: str, patterns: tuple[str, ...]) -> Path:
    """A remote folder or GGUF file, copied once into the cache; keyed by its listing, so that a change is seen."""
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url)
        single = fs.isfile(root)
        names = [root] if single else sorted(fs.ls(root, detail=False))
        chosen = [n for n in names if single or any(Path(n).match(pattern) for pattern in patterns)]
        facts = [(n, fs.size(n), _stamp(fs.info(n))) for n in chosen]
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"model.path '{url}': cannot be read ({_first_line(error)})") from None
    if not chosen:
        raise UserError(f"model.path '{url}': nothing of a model there (no config.json, no *.safetensors, no .gguf)")

    def fetch(folder: Path) -> None:
        for name in chosen:
            with fs.open(name, "rb") as source, (folder / Path(name).name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 22)

    label = url.rstrip("/").rsplit("/", 1)[-1]
    folder = build_once("models", entry_name(label, url, *facts), fetch)
    return folder / Path(root).name if single else folder


def _stamp(info: dict[str, Any]) -> str:
    """What a filesystem says about the state of a file's content, under the names that filesystems use."""
    return str([info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated") if key in info])


# --- checks ----------------------------------------------------------------------------------------------------


def _check_folder(folder: Path, label: str, trust_remote_code: bool) -> None:
    """Refuse, in one line, a folder that could not be served; reads config.json and file names only."""
    config = _read_config(folder, label)
    kind = config.get("model_type")
    own_code = bool(config.get("auto_map")) and kind not in CONFIG_MAPPING_NAMES
    if own_code and not trust_remote_code:
        raise UserError(
            f"{label}: this model ships its own code; set model.trust_remote_code=true to run it, if you trust it"
        )
    if not own_code:
        _check_causal(config, label)
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise UserError(f"{label}: the weights are quantised ({method}); gradients need the unquantised model")
    check_indexes(folder)
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
        raise UserError(_no_safetensors(folder, label, pickled))


def _read_config(folder: Path, label: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        gguf = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; it holds {gguf[0]}: name that file" if gguf else ""
        raise UserError(f"{label}: no config.json there, so not a transformers model{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)})") from None
    if not isinstance(config, dict) or not config.get("model_type"):
        raise UserError(f"{path}: names no model_type, so not the config of a transformers model")
    return config


def _check_causal(config: dict[str, Any], label: str) -> None:
    kind = config["model_type"]
    if kind not in CONFIG_MAPPING_NAMES:
        raise UserError(f"{label}: this version of transformers does not know model type '{kind}'")
    # BERT's kin can be built as causal LMs, but such a checkpoint is one only if it was trained as a decoder.
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder", False)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder or config.get("is_encoder_decoder", False):
        built = (config.get("architectures") or [kind])[0]
        raise UserError(f"{label}: '{built}' is not a causal language model, and raylux needs one")


def _no_safetensors(folder: Path, label: str, pickled: list[str]) -> str:
    if not pickled:
        return f"{label}: no *.safetensors weights there"
    return (
        f"{label}: the weights are {pickled[0]}, a format that can run code when read; raylux reads safetensors only. "
        'If you trust it, convert it: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}')\""
    )


def _check_weights(model: PreTrainedModel, report: dict[str, Any], folder: str) -> None:
    # transformers only warns here, and goes on with random weights.
    for key, what in (("missing_keys", "has no weights for"), ("mismatched_keys", "has weights of another shape for")):
        if report.get(key):
            raise UserError(f"{folder}: the checkpoint {what} {_names(sorted(str(name) for name in report[key]))}")
    bad = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
    if bad:
        raise UserError(f"{folder}: NaN or infinity in the weights of {_names(bad)}")


def _is_finite(tensor: torch.Tensor) -> bool:
    """Without a copy of the tensor: its least and greatest value are finite only if all are."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].strip().rstrip(".") if text else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars and warnings: what matters in them is checked here and an error."""
    level = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
