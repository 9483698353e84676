"""Second moments of the optimizer that trained a model, from a file beside its checkpoint.

Either ``optimizer.pt``, the state of an Adam as transformers' Trainer or torch alone saves it, or safetensors with a
tensor for each tracked parameter, by the parameter's name and of its shape. A pickle is read without running anything
of it.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from raylux import sources
from raylux.errors import UserError, shown
from raylux.layers import TrackedLayer
from raylux.parameters import matrix_of, parameters_of
from raylux.sources import one_line

_KEY = "curvature.optimizer"
# As Adam and its kin call the running mean of squared gradients.
_MOMENT = "exp_avg_sq"
_INSTEAD = "write the second moments as safetensors, a tensor for each tracked parameter by its name in the model"


def check(kind: str, projected: bool, path: str | None) -> None:
    """Raises UserError where a config names an optimizer that its kind of curvature has no use for."""
    if path is not None and not projected:
        raise UserError(
            f"{_KEY}: curvature.kind={kind} does not divide by an optimizer's second moments; leave the key out, or "
            "set curvature.kind=trackstar"
        )


class OptimizerMoments:
    """The second moments of some layers; checked as a whole before any of it is used.

    Args:
        path: a local file.
        structure: the model, with or without its weights.
        layers: tracked.

    Raises:
        UserError: there is no such file, or it is not of an optimizer with second moments of just these parameters.
    """

    def __init__(self, path: str, structure: nn.Module, layers: Sequence[TrackedLayer]) -> None:
        self._where = f"{_KEY} '{path}'"
        local = sources.resolve(path)
        if not os.path.isfile(local):
            raise UserError(f"{self._where}: no such local file; name one, or leave the key out")
        self._layers = {layer.name: layer for layer in layers}
        shapes = {name: tuple(p.shape) for name, p in parameters_of(structure, layers).items()}
        read = _safetensors if local.endswith(".safetensors") else _state
        self._read = read(local, self._where, structure)
        for name, shape in shapes.items():
            found = self._one(name)
            if tuple(found.shape) != shape:
                raise UserError(
                    f"{self._where}: the second moments of '{name}' are {list(found.shape)} and the parameter is "
                    f"{list(shape)}; take the optimizer of this very model"
                )
            if not bool((found >= 0).all()):  # nor NaN
                raise UserError(f"{self._where}: the second moments of '{name}' are not all numbers from 0 on")

    def of(self, name: str, dtype: torch.dtype) -> Tensor:
        """v [P, M] of a layer."""
        layer = self._layers[name]
        leaves = ("weight", "bias") if layer.bias else ("weight",)
        names = [f"{name}.{leaf}" if name else leaf for leaf in leaves]
        return matrix_of(layer, {each: self._one(each).to(dtype) for each in names}).contiguous()

    def _one(self, name: str) -> Tensor:
        found = self._read(name)
        if found is None:
            raise UserError(f"{self._where}: no second moments of '{name}', which is tracked; {_INSTEAD}")
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise UserError(f"{self._where}: the second moments of '{name}' are no tensor of floats; {_INSTEAD}")
        return found


def _safetensors(path: str, where: str, structure: nn.Module) -> Callable[[str], Any]:
    try:
        file: Any = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: no readable safetensors file ({one_line(error)})") from None
    known = frozenset(file.keys())
    return lambda name: file.get_tensor(name) if name in known else None


def _state(path: str, where: str, structure: nn.Module) -> Callable[[str], Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:  # what torch says of it is advice to read it all the same
        raise UserError(
            f"{where}: no optimizer's state that can be read safely, without running code of the file; {_INSTEAD}"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{where}: no optimizer's state that can be read safely ({one_line(error)})") from None
    state = found.get("state") if isinstance(found, Mapping) else None
    groups = found.get("param_groups") if isinstance(found, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(groups, Sequence) or not groups:
        raise UserError(f"{where}: no optimizer's state (with 'state' and 'param_groups') but {shown(found)}")
    if not any(isinstance(one, Mapping) and _MOMENT in one for one in state.values()):
        raise UserError(f"{where}: the optimizer keeps no second moments by weight ({_MOMENT}), as Adam does")
    places = _places(groups, where, structure)

    def read(name: str) -> Any:
        one = state.get(places.get(name))
        return one.get(_MOMENT) if isinstance(one, Mapping) else None

    return read


def _places(groups: Sequence[Any], where: str, structure: nn.Module) -> dict[str, Any]:
    """Parameter -> its number in the state.

    A state knows names only where the optimizer was given them. Otherwise the parameters stand in the order of the
    model: of one group all of them, of the Trainer's two first those with weight decay, then the others.
    """
    numbers = [list(group.get("params", ())) if isinstance(group, Mapping) else [] for group in groups]
    known = [group.get("param_names") if isinstance(group, Mapping) else None for group in groups]
    named = [list(one) for one in known if isinstance(one, Sequence)]
    if len(named) < len(groups):
        named = _by_group(structure, len(groups))
    if [len(one) for one in numbers] != [len(one) for one in named]:
        raise UserError(
            f"{where}: groups of {', '.join(str(len(one)) for one in numbers)} parameters, which are not this model's "
            f"{sum(1 for _ in structure.named_parameters())} as transformers' Trainer groups them; {_INSTEAD}"
        )
    pairs = [pair for names, own in zip(named, numbers, strict=True) for pair in zip(names, own, strict=True)]
    return {name: number for name, number in pairs if isinstance(number, int)}


def _by_group(structure: nn.Module, count: int) -> list[list[str]]:
    names = [name for name, _ in structure.named_parameters()]
    if count != 2:
        return [names]
    from transformers import Trainer

    decayed = frozenset(Trainer.get_decay_parameter_names(None, structure))  # type: ignore[arg-type]
    return [[name for name in names if (name in decayed) == first] for first in (True, False)]
