"""A module in memory is tried on a few examples: what is captured of each must be its gradient by autograd, alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from raylux.batches import TokenRow, collate
from raylux.capture import Capture
from raylux.classes import class_labels
from raylux.errors import NumericsError, UserError
from raylux.influence.dots import sequence_gradients
from raylux.layers import TrackedLayer
from raylux.modules import Features, logits_of, marked

# Of a gradient, by precision.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-7}
_TRIED = 3


def features_read(module: nn.Module, examples: np.ndarray) -> Features:
    """What a module reads and how many classes it tells apart, by running it on the first examples.

    Args:
        module: any.
        examples: features [n, *shape].

    Raises:
        UserError: it does not run on them, or gives no logits.
    """
    some = next(iter(module.parameters()), None)
    if some is None or some.dtype not in _TOLERANCE:
        raise UserError(
            "attribute: the module has no parameters" if some is None else
            f"attribute: the module's parameters are {some.dtype}; convert it to float32 or float64 first"
        )  # fmt: skip
    shape, whole = tuple(examples.shape[1:]), examples.dtype.kind != "f"
    own = marked(module, Features(shape, (), whole)).cpu()
    x = torch.from_numpy(examples[:_TRIED])
    try:
        with torch.no_grad():
            logits = logits_of(own(x if whole else x.to(some.dtype)))
    # What a user's module may raise of features that it was not made for, or without a forward method.
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"attribute: the module does not run on features of shape {list(shape)} ({line})") from None
    if len(logits) != len(x):
        raise UserError(f"attribute: the module gives {len(logits)} rows of logits for {len(x)} examples")
    return Features(shape, tuple(str(number) for number in range(logits.shape[1])), whole)


def check_module(model: nn.Module, layers: Sequence[TrackedLayer], examples: np.ndarray) -> None:
    """Raise a UserError where what is captured of an example in a batch is not its gradient.

    So it is where an example's logits depend on others (normalisation over the batch), where a layer's rows are not
    those of one example after another, or where a weight is used beside its layer.

    Args:
        model: marked.
        layers: tracked.
        examples: features [n, *shape].
    """
    rows = [TokenRow(x[None], class_labels(1, 0)) for x in examples[:_TRIED]]
    tolerance = _TOLERANCE[next(model.parameters()).dtype]
    capture = Capture(model, layers)
    # Each with the class that it is least likely to have, so that there is a gradient to be looked at.
    rows = [TokenRow(row.tokens, class_labels(1, _least(model, row))) for row in rows]
    try:
        captured = capture.run(collate(rows, range(len(rows)), 1))
    except NumericsError as error:
        raise UserError(f"attribute: {error}") from None
    for place, row in enumerate(rows):
        alone = _gradients(model, layers, row)
        size = max(float(x.abs().max()) for x in alone.values())
        for layer in layers:
            found = sequence_gradients(captured.inputs[layer.name], captured.grads[layer.name])[place]
            off = float((found - alone[layer.name]).abs().max())
            if off > tolerance * size:
                raise UserError(
                    f"attribute: layer '{layer.name}' cannot be attributed: in a batch its gradient is not that of the "
                    "example alone; examples must not depend on one another (batch statistics), come first in every "
                    "layer's input, and a layer's weight must be used by its layer alone"
                )


def _logits(model: nn.Module, row: TokenRow) -> Tensor:
    x = torch.from_numpy(row.tokens)
    return logits_of(model(x.to(next(model.parameters()).dtype) if x.is_floating_point() else x))[0]


def _least(model: nn.Module, row: TokenRow) -> int:
    with torch.no_grad():
        return int(_logits(model, row).argmin())


def _gradients(model: nn.Module, layers: Sequence[TrackedLayer], row: TokenRow) -> dict[str, Tensor]:
    """Layer -> gradient [P, M] of the loss of one example by itself, by autograd."""
    modules = [model.get_submodule(layer.name) for layer in layers]
    pairs = [(module.weight, module.bias) for module in modules]
    weights = [p for pair in pairs for p in pair if isinstance(p, Tensor)]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        loss = nn.functional.cross_entropy(_logits(model, row), torch.tensor(int(row.labels[0])))
        found = iter(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    result = {}
    for layer in layers:
        weight = next(found).flatten(1)
        result[layer.name] = torch.cat([weight, next(found)[:, None]], 1) if layer.bias else weight
    return result
