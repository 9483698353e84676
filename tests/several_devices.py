"""A second device that is not there: tensors of the CPU that say they lie on it, and refuse to meet those that do not.

With the numbers of the CPU they find out whether what a model over several GPUs computes is brought together where it
has to be: what is raised here, torch raises for GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from raylux.placement import Placement, parts_of, runs

SECOND = "cpu:1"
_ATEN = torch.ops.aten
# Their first argument says where; an index may lie on the CPU.
_LED = {_ATEN.copy_.default, _ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default}


class Far(Tensor):
    """A tensor of the CPU that is said to lie on the second device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Far:
        found = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(SECOND),
        )  # fmt: skip
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.inner.clone()

    def numpy(self, *_: Any, **__: Any) -> np.ndarray:
        return self.inner.numpy()


class _Devices(TorchDispatchMode):
    """Has what is made on the second device, or goes there, lie there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    far = [x for x in tensors if isinstance(x, Far)]
    there = bool(far)
    if kwargs.get("device") is not None:
        there = str(kwargs["device"]) == SECOND
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif function in _LED:
        there = isinstance(args[0], Far)
    elif far and any(x.dim() for x in tensors if not isinstance(x, Far)):
        raise RuntimeError(f"{function}: tensors on cpu and {SECOND} meet")
    found = function(*_near(args), **_near(kwargs))
    old = {id(x.inner): x for x in far}
    return tree_map_only(Tensor, lambda x: old[id(x)] if id(x) in old else Far(x), found) if there else found


def _near(values: Any) -> Any:
    return tree_map_only(Far, lambda x: x.inner, values)


@contextmanager
def second_device() -> Iterator[None]:
    """While open, there is one."""
    with _Devices():
        yield


def halves(model: nn.Module) -> Placement:
    """One half of the parts on the CPU, the other on the second device."""
    parts = parts_of(model)
    where = dict(zip((part.name for part in parts), runs([part.parameters for part in parts], 2), strict=True))
    numbers = [where[part.tied or part.name] for part in parts]
    return Placement(parts, tuple(SECOND if number else "cpu" for number in numbers), "cpu", 2)


def spread(model: Any, placement: Placement) -> Any:
    """The model as accelerate dispatches it."""
    for part in placement.parts:
        module, where = model.get_submodule(part.name), placement.runs_on(part.name)
        if where == SECOND:
            _move(module)
        add_hook_to_module(module, AlignDevicesHook(execution_device=torch.device(where)), append=True)
    root = AlignDevicesHook(execution_device=torch.device("cpu"), io_same_device=True)
    add_hook_to_module(model, root, append=True)
    model.hf_device_map = placement.device_map
    return model


def _move(module: nn.Module) -> None:
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None:
                one._parameters[name] = nn.Parameter(Far(parameter.detach()), requires_grad=False)
        for name, buffer in one._buffers.items():
            if buffer is not None:
                one._buffers[name] = Far(buffer)
