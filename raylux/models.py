"""Find a model (local folder, GGUF, hub name, fsspec URL, package file) and load it, ready for gradients.

``find_model`` runs once, on the driver, and may reach for the network; what it returns is a local folder,
and ``load_model`` and ``load_tokenizer`` read that alone. Weights come from safetensors only: nothing is
unpickled, and code that ships with a model runs only if the config says so.
"""

from __future__ import annotations

import contextlib
import errno
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from transformers.utils import logging as transformers_logging

from raylux import adapters
from raylux.cache import build_once, entry_name
from raylux.config import ModelSection
from raylux.errors import UserError
from raylux.experts import split_experts
from raylux.layers import Coverage, SkippedLayer, TrackedLayer, coverage
from raylux.modelcheck import check_folder, check_shapes
from raylux.sources import is_url, one_line, resolve

__all__ = [
    "Coverage",
    "ModelFiles",
    "SkippedLayer",
    "TrackedLayer",
    "context_length",
    "coverage",
    "find_adapter",
    "find_model",
    "load_config",
    "load_model",
    "load_structure",
    "load_tokenizer",
    "on_this_node",
    "resolve_device",
    "vocabulary_size",
]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "*.jinja", "*.tiktoken")
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py")


@dataclass(frozen=True)
class ModelFiles:
    """A model that is at hand: ``folder`` has config.json and safetensors, the others are local folders too.

    ``source`` and ``adapter_source``: the URLs that ``folder`` and ``adapter`` are copies of, if they are.
    """

    folder: str
    tokenizer: str
    adapter: str | None = None
    source: str = ""
    adapter_source: str = ""


def find_model(config: ModelSection) -> ModelFiles:
    """Bring the model of a config to a local folder and check that it is one that raylux can serve.

    A GGUF file is converted once and a remote folder copied once, both into ``$RAYLUX_CACHE``; a hub name
    is downloaded by huggingface_hub into its own cache.

    Raises:
        UserError: not found, not reachable, no safetensors weights, no causal language model, its own code
            needed but not allowed.
    """
    folder = _bring(config.path, MODEL_FILES + TOKENIZER_FILES, "model.path")
    check_folder(folder, config.path, config.trust_remote_code)
    tokenizer = folder
    if config.tokenizer is not None:
        tokenizer = _bring(config.tokenizer, (*TOKENIZER_FILES, "config.json"), "model.tokenizer")
    adapter = config.adapter or ""
    return ModelFiles(
        str(folder),
        str(tokenizer),
        find_adapter(config),
        config.path if is_url(config.path) else "",
        adapter if is_url(adapter) else "",
    )


def find_adapter(config: ModelSection) -> str | None:
    """Bring the adapter of a config, if it names one, to a local folder and check that it can be served.

    Raises:
        UserError: as ``find_model``.
    """
    if config.adapter is None:
        return None
    folder = _bring(config.adapter, adapters.FILES, "model.adapter")
    adapters.check_adapter(folder, config.adapter)
    return str(folder)


def on_this_node(files: ModelFiles) -> ModelFiles:
    """The same model where this process runs: copied from its URLs where the driver's own copies are out of reach.

    Raises:
        UserError: a URL cannot be read here.
    """
    if files.source and not Path(files.folder).is_dir():
        files = replace(files, folder=str(_bring(files.source, MODEL_FILES + TOKENIZER_FILES, "model.path")))
    if files.adapter and files.adapter_source and not Path(files.adapter).is_dir():
        files = replace(files, adapter=str(_bring(files.adapter_source, adapters.FILES, "model.adapter")))
    return files


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
        raise _no_tokenizer(files, f"{type(error).__name__}: {_first_line(error)}") from None
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
        return config
    except Exception as error:  # each architecture's config checks itself in its own way, or not at all
        raise UserError(f"{files.folder}/config.json: transformers cannot read it ({_first_line(error)})") from None


def load_structure(files: ModelFiles, trust_remote_code: bool = False, weights: bool = True) -> PreTrainedModel:
    """The model without its weights (meta device): enough for ``coverage``, costs neither time nor memory.

    Args:
        files: from ``find_model``.
        trust_remote_code: whether code that ships with the model may run.
        weights: hold its shapes against those of the weights' files; False: a folder with config.json alone will do.

    Raises:
        UserError: config.json describes no model that can be built, or not the one whose weights are there.
    """
    config = load_config(files, trust_remote_code)
    try:
        with torch.device("meta"), quiet():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        model.tie_weights()
    except Exception as error:  # as in load_config: a bad size fails wherever it is first used
        raise UserError(
            f"{files.folder}/config.json: no model can be built from it ({type(error).__name__}: {_first_line(error)})"
        ) from None
    if weights:
        check_shapes(Path(files.folder), {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    with torch.device("meta"):
        return _prepared(model, files, weights=False)


def load_model(files: ModelFiles, dtype: str, device: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the model for gradients: eval mode (no dropout), frozen, no key-value cache, fused experts taken apart.

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
    except MemoryError:
        raise
    except Exception as error:  # SafetensorError derives from Exception alone
        raise UserError(f"{files.folder}: the weights cannot be loaded ({_first_line(error)})") from None
    model, report = loaded
    _check_weights(model, report, files.folder)
    model.config.use_cache = False
    return _prepared(model.eval().requires_grad_(False).to(device), files, weights=True)


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
            return value
    return None


def vocabulary_size(config: PretrainedConfig) -> int:
    """How many token ids the model has an embedding for."""
    return int(config.get_text_config().vocab_size)


# --- bringing files here ---------------------------------------------------------------------------------------


def _bring(path: str, patterns: tuple[str, ...], key: str) -> Path:
    """The local folder that a path of any kind stands for."""
    place = resolve(path)
    if is_url(place):
        place = str(_copied(place, patterns))
    try:
        local = Path(place).expanduser()
        single = local.is_file()
    except (OSError, RuntimeError) as error:  # too long a name, no such user's home
        raise UserError(f"{key} '{path}': cannot be read ({_first_line(error)})") from None
    if single:
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
    except Exception as error:  # every remote file system has its own exceptions
        raise UserError(f"model.path '{url}': cannot be read ({one_line(error)})") from None
    if not chosen:
        raise UserError(f"model.path '{url}': nothing of a model there (no config.json, no *.safetensors, no .gguf)")

    def fetch(folder: Path) -> None:
        for name in chosen:
            try:
                with fs.open(name, "rb") as source, (folder / Path(name).name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 22)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # of the cache
                raise UserError(f"model.path '{url}': {name} cannot be read ({one_line(error)})") from None

    label = url.rstrip("/").rsplit("/", 1)[-1]
    folder = build_once("models", entry_name(label, url, *facts), fetch)
    return folder / Path(root).name if single else folder


def _stamp(info: dict[str, Any]) -> str:
    """What a filesystem says about the state of a file's content, under the names that filesystems use."""
    return str([info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated") if key in info])


# --- checks ----------------------------------------------------------------------------------------------------


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
    """What an error says, without what follows on further lines; a first line that announces brings the next."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    first = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return first.rstrip(".") or type(error).__name__


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
