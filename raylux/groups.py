"""Which layers read the very same tensor, so that one A, one eigenbasis and one rotation serve them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from raylux.experts import DOWN
from raylux.layers import TrackedLayer
from raylux.modules import features_of


def input_groups(model: nn.Module, layers: Sequence[TrackedLayer]) -> dict[str, str]:
    """Layer -> the first layer that reads the very same tensor (gate and up projections share one).

    Found by one forward pass of two fake tokens, shapes without numbers, on any device and on meta too: layers
    whose calls were handed the same tensor object, unchanged in between. A model that cannot run so has every
    layer in a group of its own, which costs time and memory but changes no result. Of an expert, which does not run
    without numbers, gate and up projection read the same rows.
    """
    plain = [layer for layer in layers if not layer.routed]
    seen: dict[str, list[tuple[int, int]]] = {layer.name: [] for layer in plain}
    alive: list[Tensor] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            alive.append(inputs[0])  # so that no other tensor gets its id
            seen[name].append((id(inputs[0]), inputs[0]._version))

        return look

    handles = [model.get_submodule(layer.name).register_forward_pre_hook(watch(layer.name)) for layer in plain]
    try:
        # Plain meta tensors would not do: transformers looks at the numbers of a mask, unless it meets fake ones.
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            some, features = next(model.parameters()), features_of(model)
            if features is None:
                model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=some.device))
            else:
                model(some.new_zeros(2, *features.shape, dtype=torch.int64 if features.whole else None))
    except (RuntimeError, NotImplementedError, ValueError):  # what torch raises of an operation without a fake kernel
        return {layer.name: layer.name for layer in layers}
    finally:
        for handle in handles:
            handle.remove()
    leaders: dict[tuple[object, ...], str] = {}
    found = {}
    for layer in layers:
        expert, _, leaf = layer.name.rpartition(".")
        read = [expert, leaf == DOWN] if layer.routed else seen[layer.name]
        found[layer.name] = leaders.setdefault((layer.bias, layer.patches, *read), layer.name)
    return found
