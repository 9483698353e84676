"""Short digests that tell one state of an input from another, and say what changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylux import sources
from raylux.errors import UserError
from raylux.hashing import of_file
from raylux.tokens import TOKENIZER_FILES
from raylux.weights import tensor_hashes

if TYPE_CHECKING:
    from raylux.modelfiles import ModelFiles
    from raylux.queries import Query

__all__ = [
    "ModelPrint",
    "digest",
    "of_config",
    "of_file",
    "of_model",
    "of_query",
    "of_source",
    "of_tokenizer",
    "of_weights",
]

# What config.json, of a model or an adapter, says of where and by what it was written does not reach the numbers.
_ASIDE = ("_name_or_path", "transformers_version", "base_model_name_or_path", "peft_version", "revision")


@dataclass(frozen=True)
class ModelPrint:
    """What a model is, whatever its path.

    Attributes:
        tensors: name of each tensor -> hash of its name, dtype, shape and bytes.
        config: hash of what config.json says.
        code: Python file that ships with the model -> hash.
        tokenizer: file of the tokenizer -> hash.
    """

    tensors: dict[str, str]
    config: str
    code: dict[str, str]
    tokenizer: dict[str, str]

    def dump(self) -> dict[str, Any]:
        """As run.yaml keeps it."""
        return {"config": self.config, "tokenizer": self.tokenizer, "code": self.code, "tensors": self.tensors}

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> ModelPrint:
        """From what ``dump`` gave. Raises KeyError where that is not what it is."""
        return cls(dict(data["tensors"]), str(data["config"]), dict(data["code"]), dict(data["tokenizer"]))

    def weights_changed(self, now: ModelPrint) -> str | None:
        """Which tensors are not as they were, in one phrase; None: they are."""
        changed = _changed(self.tensors, now.tensors)
        if not changed:
            return None
        total = len(self.tensors.keys() | now.tensors.keys())
        return f"weights differ: {len(changed)} of {total} tensors (first: {changed[0]})"

    def config_changed(self, now: ModelPrint) -> str | None:
        """The same of config.json."""
        return None if self.config == now.config else "config.json differs"

    def code_changed(self, now: ModelPrint) -> str | None:
        """The same of the code that ships with the model."""
        changed = _changed(self.code, now.code)
        return f"the model's code differs ({_few(changed)})" if changed else None

    def tokenizer_changed(self, now: ModelPrint) -> str | None:
        """The same of the tokenizer's files."""
        changed = _changed(self.tokenizer, now.tokenizer)
        return f"tokenizer differs ({_few(changed)})" if changed else None


def of_model(files: ModelFiles) -> ModelPrint:
    """Of a model at hand. Weights are read once per state of their files, then their hashes come from the cache.

    Raises:
        UserError: a file cannot be read.
    """
    folder = Path(files.folder)
    tensors, config = tensor_hashes(folder), of_config(folder)
    if files.adapter is not None:
        adapter = Path(files.adapter)
        tensors |= {f"adapter {name}": value for name, value in tensor_hashes(adapter).items()}
        config = digest({"model": config, "adapter": of_config(adapter, "adapter_config.json")})
    return ModelPrint(tensors, config, _of_code(folder), of_tokenizer(files.tokenizer))


def of_weights(folder: str, adapter: str | None = None) -> str:
    """One digest of all tensors of a model folder, with its config.json and code: 32 hexadecimal digits.

    Two folders have the same digest where they hold the same model, however its tensors are spread over files. A
    worker computes it from the files that lie on its own node.

    Raises:
        UserError: a file cannot be read.
    """
    path = Path(folder)
    parts = [tensor_hashes(path), {"config.json": of_config(path)}, _of_code(path)]
    if adapter is not None:
        parts += [tensor_hashes(Path(adapter)), {"adapter": of_config(Path(adapter), "adapter_config.json")}]
    return digest(*parts)


def of_tokenizer(folder: str) -> dict[str, str]:
    """Of each file of a tokenizer: file name -> digest."""
    return _of_files(Path(folder), TOKENIZER_FILES)


def digest(*parts: Mapping[str, str]) -> str:
    """Hashes by name folded into one string of 32 hexadecimal digits; the order of the names does not count."""
    folded = hashlib.blake2b(digest_size=16)
    for part in parts:
        folded.update(json.dumps(part, sort_keys=True).encode())
    return folded.hexdigest()


def of_source(path: str) -> dict[str, Any]:
    """Of a corpus as a config names it: the digest of local files, only the name of what lies elsewhere."""
    where = sources.resolve(path)
    if sources.is_url(where):
        return {"path": path}
    try:
        files = sources.find_files(where)
    except UserError:
        return {"path": path}
    folded = hashlib.blake2b(digest_size=8)
    for file in files:
        folded.update(of_file(Path(file.path)).encode())
    return {"path": path, "files": len(files), "content": folded.hexdigest()}


def of_query(query: Query) -> str:
    """Of what is computed for a query: its parts' tokens, labels and weights."""
    folded = hashlib.blake2b(query.measurement.encode(), digest_size=8)
    for part in query.parts:
        folded.update(f"{part.tokens.tolist()} {part.labels.tolist()} {part.weight}".encode())
    return folded.hexdigest()


def of_config(folder: Path, name: str = "config.json") -> str:
    """What config.json, of a model or an adapter, says that reaches its numbers: 16 hexadecimal digits."""
    path = folder / name
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: cannot be read as JSON") from None
    kept = {key: value for key, value in data.items() if key not in _ASIDE} if isinstance(data, dict) else data
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8).hexdigest()


def _of_code(folder: Path) -> dict[str, str]:
    return _of_files(folder, ("*.py",))


def _of_files(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.name: of_file(path) for path in sorted(found)}


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return sorted(name for name in {**before, **now} if before.get(name) != now.get(name))


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
