"""Bring a model to a local folder: from a folder, a GGUF file, a hub name, an fsspec URL or a package's file.

``find_model`` runs once, on the driver, and may reach for the network; what it returns is local.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from raylux import adapters
from raylux.cache import build_once, entry_name
from raylux.classes import TaskName
from raylux.config import ModelSection
from raylux.errors import UserError
from raylux.modelcheck import check_folder, read_config, task_of_config
from raylux.sources import is_url, one_line, resolve
from raylux.tokens import TOKENIZER_FILES

MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py")


@dataclass(frozen=True)
class ModelFiles:
    """A model that is at hand: ``folder`` has config.json and safetensors, the others are local folders too.

    ``source`` and ``adapter_source``: the URLs that ``folder`` and ``adapter`` are copies of, if they are. ``task``:
    what the model is for.
    """

    folder: str
    tokenizer: str
    adapter: str | None = None
    source: str = ""
    adapter_source: str = ""
    task: TaskName = "causal-lm"


def find_model(config: ModelSection) -> ModelFiles:
    """Bring the model of a config to a local folder and check that it is one that raylux can serve.

    A GGUF file is converted once and a remote folder copied once, both into ``$RAYLUX_CACHE``; a hub name
    is downloaded by huggingface_hub into its own cache.

    Raises:
        UserError: not found, not reachable, no safetensors weights, neither causal language model nor classifier, its
            own code needed but not allowed.
    """
    folder = _bring(config.path, MODEL_FILES + TOKENIZER_FILES, "model.path")
    task = check_folder(folder, config.path, config.trust_remote_code, config.task)
    if task == "classification" and config.adapter is not None:
        raise UserError(f"model.adapter '{config.adapter}': adapters are served on causal language models alone")
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
        task,
    )


def find_described(config: ModelSection) -> tuple[ModelFiles, bool]:
    """As ``find_model``, where a folder that holds config.json alone will do; and whether there are weights.

    Raises:
        UserError: as ``find_model``.
    """
    local = Path(config.path).expanduser()
    if not (local / "config.json").is_file() or list(local.glob("*.safetensors")):
        return find_model(config), True
    task = task_of_config(read_config(local, config.path), config.path, config.task)
    tokenizer = local
    if config.tokenizer is not None:
        tokenizer = _bring(config.tokenizer, (*TOKENIZER_FILES, "config.json"), "model.tokenizer")
    return ModelFiles(str(local), str(tokenizer), find_adapter(config), task=task), False


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


def _bring(path: str, patterns: tuple[str, ...], key: str) -> Path:
    """The local folder that a path of any kind stands for."""
    place = resolve(path)
    if is_url(place):
        place = str(_copied(place, patterns, key))
    try:
        local = Path(place).expanduser()
        single = local.is_file()
    except (OSError, RuntimeError) as error:  # too long a name, no such user's home
        raise UserError(f"{key} '{path}': cannot be read ({first_line(error)})") from None
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
        problem = f"cannot be downloaded from the hub ({first_line(error)})"
    raise UserError(f"{key} '{name}': {problem}")


def _copied(url: str, patterns: tuple[str, ...], key: str) -> Path:
    """A remote folder or GGUF file, copied once into the cache; keyed by its listing, so that a change is seen."""
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url)
        single = fs.isfile(root)
        names = [root] if single else sorted(fs.ls(root, detail=False))
        chosen = [n for n in names if single or any(Path(n).match(pattern) for pattern in patterns)]
        facts = [(n, fs.size(n), _stamp(fs.info(n))) for n in chosen]
    except Exception as error:  # every remote file system has its own exceptions
        raise UserError(f"{key} '{url}': cannot be read ({one_line(error)})") from None
    if not chosen:
        raise UserError(f"{key} '{url}': no file there is one of {', '.join(patterns)}")

    def fetch(folder: Path) -> None:
        for name in chosen:
            try:
                with fs.open(name, "rb") as source, (folder / Path(name).name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 22)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # of the cache
                raise UserError(f"{key} '{url}': {name} cannot be read ({one_line(error)})") from None

    label = url.rstrip("/").rsplit("/", 1)[-1]
    folder = build_once("models", entry_name(label, url, *facts), fetch)
    return folder / Path(root).name if single else folder


def _stamp(info: dict[str, Any]) -> str:
    """What a filesystem says about the state of a file's content, under the names that filesystems use."""
    return str([info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated") if key in info])


def first_line(error: BaseException) -> str:
    """What an error says, without what follows on further lines; a first line that announces brings the next."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    first = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return first.rstrip(".") or type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars and warnings: what matters in them is checked here and an error."""
    level, spreading = transformers_logging.get_verbosity(), logging.getLogger("accelerate")
    spoken = spreading.level
    spreading.setLevel(logging.ERROR)
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        spreading.setLevel(spoken)
        if bar:
            transformers_logging.enable_progress_bar()
