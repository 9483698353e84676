"""Modules of torch in memory: what is written down of them, and where this process finds them again.

A module that maps features [B, *shape] to logits [B, classes] is served like a classifier of texts, with features in
place of tokens; it computes in process. Beside the run go its weights and a description, by which a later call knows
whether it has the same module; the code of a module is written nowhere, so nothing else can run it.
"""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raylux.errors import UserError
from raylux.markup import parse_json

KIND = "raylux-module"
_MARK = "_raylux_features"
_HELD: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Features:
    """What a module reads and tells.

    Attributes:
        shape: of the features of an example.
        classes: names of the classes.
        whole: the features are whole numbers.
    """

    shape: tuple[int, ...]
    classes: tuple[str, ...]
    whole: bool = False


def features_of(model: nn.Module) -> Features | None:
    """What a module that was marked reads; None of a model of transformers."""
    found = getattr(model, _MARK, None)
    return found if isinstance(found, Features) else None


def marked(module: nn.Module, features: Features) -> nn.Module:
    """A frozen copy in eval mode that is known to read features."""
    own = copy.deepcopy(module).eval().requires_grad_(False)
    object.__setattr__(own, _MARK, features)
    return own


def logits_of(output: Any) -> Tensor:
    """A module's output as logits [B, V]: one number for each example is that of the second of two classes."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the module gives a {type(logits).__name__}; it must give logits, a tensor [examples, classes]"
        )
    logits = logits.unsqueeze(1) if logits.dim() == 1 else logits
    if logits.dim() != 2:
        raise UserError(f"the module gives a tensor of shape {list(logits.shape)}; logits are [examples, classes]")
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def hold(module: nn.Module, features: Features, folder: Path) -> None:
    """Write a module down in a folder, and find it there as long as it lives.

    Raises:
        UserError: a tensor of it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Names that share a tensor are written one by one: to tell modules apart is all that it is for.
    state = {name: x.detach().cpu().contiguous().clone() for name, x in module.state_dict().items()}
    save_file(state, str(folder / "model.safetensors"))
    described = {"model_type": KIND, **asdict(features), "module": repr(module)}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    _HELD[str(folder.resolve())] = module


def is_module(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a module which was written down."""
    return config.get("model_type") == KIND


def check_held(folder: str) -> None:
    """Raises UserError where this process does not have the module that was written down in a folder."""
    if str(Path(folder).resolve()) not in _HELD:
        raise UserError(
            f"{folder}: a module that was in memory of another call; call raylux.attribute with it again, on the same "
            "run folder, and what is computed stays"
        )


def held(folder: str, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
    """A copy of the module that was written down in a folder, marked.

    Raises:
        UserError: this process does not have it.
    """
    check_held(folder)
    path = Path(folder).resolve()
    module = _HELD[str(path)]
    described = parse_json((path / "config.json").read_text(encoding="utf-8"), f"{folder}/config.json")
    features = Features(tuple(described["shape"]), tuple(described["classes"]), bool(described["whole"]))
    return marked(module, features).to(device=device, dtype=dtype)
