"""Tracked parameters in the model's own layout, and as the [P, M] that everything else has of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raylux.layers import TrackedLayer

Weights = Mapping[str, Tensor]
"""Tracked parameters by their names in the model, in the model's own layout."""


def parameters_of(model: nn.Module, layers: Sequence[TrackedLayer]) -> dict[str, Tensor]:
    """Those of the layers as they stand, apart from any graph."""
    return {
        _name(layer, leaf): model.get_submodule(layer.name).get_parameter(leaf).detach()
        for layer in layers
        for leaf in (("weight", "bias") if layer.bias else ("weight",))
    }


def matrix_of(layer: TrackedLayer, weights: Weights) -> Tensor:
    """[P, M] of a layer's weight, the bias in the last column; a part of the graph of ``weights``."""
    weight = weights[_name(layer, "weight")]
    matrix = weight.T if layer.conv1d else weight.flatten(1)
    return torch.cat([matrix, weights[_name(layer, "bias")].unsqueeze(1)], 1) if layer.bias else matrix


def flat(layers: Sequence[TrackedLayer], weights: Weights) -> Tensor:
    """[D] of all layers, one after the other as [P, M] row by row."""
    return torch.cat([matrix_of(layer, weights).reshape(-1) for layer in layers])


def unflat(layers: Sequence[TrackedLayer], values: Tensor, like: Weights) -> dict[str, Tensor]:
    """The parameters of which ``flat`` is ``values`` [D], in the layout of ``like``."""
    found = {}
    for layer, part in zip(layers, values.split([layer.parameters for layer in layers]), strict=True):
        matrix = part.view(layer.shape)
        if layer.bias:
            matrix, found[_name(layer, "bias")] = matrix[:, :-1], matrix[:, -1]
        name = _name(layer, "weight")
        found[name] = matrix.T if layer.conv1d else matrix.reshape(like[name].shape)
    return found


def called_with(model: nn.Module, weights: Weights) -> Callable[..., Any]:
    """The model with other weights in place of its own; of a layer that shares its weight, in this layer alone."""
    return partial(_call, model, dict(weights))


def _name(layer: TrackedLayer, leaf: str) -> str:
    """Of a parameter in its model; a module that is itself the layer has no path."""
    return f"{layer.name}.{leaf}" if layer.name else leaf


def _call(model: nn.Module, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return torch.func.functional_call(model, weights, args, kwargs, tie_weights=False)
