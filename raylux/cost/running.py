"""What running a model takes, and putting what it leaves into the eigenbases: products, weights read, bytes touched."""

from __future__ import annotations

import math
from collections.abc import Sequence

from raylux.cost.contraction import rotate_tokens_first
from raylux.cost.costs import Work
from raylux.cost.machine import Device
from raylux.cost.passes import Layers
from raylux.cost.workload import Workload
from raylux.layers import TrackedLayer

# Operations that start in a block's forward and backward pass.
_BLOCK_OPERATIONS = 60


def model_work(
    work: Workload, device: Device, tokens: float, batch: float, blocks: Sequence[Layers], drawn: bool = False
) -> list[Work]:
    """Forward and backward of ``tokens`` tokens, once for each pass, down to the pass's lowest layer.

    ``drawn``: labels are drawn from the model's probabilities.
    """
    model = work.model
    starting = device.starting(tokens / batch * model.blocks * _BLOCK_OPERATIONS * len(blocks))
    again = model.again_flops(work.tokens) / model.forward_flops(work.tokens)
    runs = tokens * len(blocks) * (1 + again)
    elementwise = tokens * model.pass_bytes(work.itemsize, drawn) * len(blocks)
    activating = device.activation_seconds(model.activation, tokens * model.activated * len(blocks))
    return [
        _products(
            "forward", work, device, batch, runs * model.forward_flops(work.tokens),
            runs * model.attention_flops(work.tokens), runs,
        ),
        backward_work("backward", work, device, tokens, batch, blocks),
        Work("elementwise", 0.0, elementwise, device.touching(elementwise) + activating + starting),
    ]  # fmt: skip


def backward_work(
    kind: str,
    work: Workload,
    device: Device,
    tokens: float,
    batch: float,
    blocks: Sequence[Layers],
    second: bool = False,
) -> Work:
    """A backward pass of ``tokens`` tokens, once for each pass, down to the pass's lowest layer.

    ``second``: of the same batch, on other labels.
    """
    model, lowest = work.model, [block[0].name for block in blocks]
    spared = model.spared_flops if second else 0.0
    return _products(
        kind, work, device, batch,
        tokens * sum(model.backward_flops(work.tokens, name) - spared for name in lowest),
        tokens * sum(model.attention_backward_flops(work.tokens, name) for name in lowest),
        tokens * len(lowest),
    )  # fmt: skip


def _products(
    kind: str, work: Workload, device: Device, batch: float, flops: float, attention: float, tokens: float
) -> Work:
    """Products of a pass of ``tokens`` tokens, of which ``attention`` FLOPs run in a kernel of their own.

    Every batch reads the weights.
    """
    model, size = work.model, min(batch, work.model.hidden)
    read = tokens / batch * work.itemsize * sum(entries for _, entries in model.linears)
    seconds = device.seconds(flops - attention, work.dtype, size, read)
    return Work(kind, flops, read, seconds + device.attention_seconds(attention, work.dtype, size))


def rotation_flops(layer: TrackedLayer, tokens: float, shared: bool = False) -> tuple[float, bool]:
    """FLOPs per token of the cheaper rotation of a layer, and whether it is that of the tokens (an expert's own).

    Args:
        layer: [P, M].
        tokens: T of a sequence, over which a formed gradient's rotation is spread.
        shared: the layer's inputs are rotated already, with those of its group's leader.
    """
    outputs, inputs = layer.shape
    if rotate_tokens_first(math.ceil(layer.share * tokens), outputs, inputs):
        return 2.0 * layer.share * (outputs**2 + (0 if shared else inputs**2)), True
    return 2.0 * outputs * inputs * (outputs + inputs) / tokens, False


def rotation_work(
    work: Workload, device: Device, tokens: float, batch: float, shared: bool = False
) -> tuple[float, float]:
    """FLOPs of a token that go into putting it, or the gradients, into the eigenbases; seconds of all ``tokens``.

    ``batch``: tokens for which a basis is read once. ``shared``: inputs are rotated once for each input group.
    """
    if not work.basis:
        return 0.0, 0.0
    model, taken, seconds = work.model, 0.0, 0.0
    for layer in model.tracked:
        spared = shared and layer.name not in model.leaders
        flops, first = rotation_flops(layer, work.tokens, spared)
        taken += flops / work.blocks
        outputs = 2.0 * layer.share * layer.outputs**2 if first else flops * layer.outputs / sum(layer.shape)
        for side, own in ((layer.outputs, outputs), (layer.inputs, flops - outputs)):
            size = (side if first else min(layer.shape)) / work.blocks
            read = tokens / batch * work.operand * side**2 / work.blocks if own else 0.0
            seconds += device.seconds(tokens * own / work.blocks, work.contraction, size, read, side % 2 == 1)
    return taken, seconds


def forming_seconds(work: Workload, device: Device, tokens: float) -> float:
    """Of the gradients of ``tokens`` tokens."""
    return sum(
        device.forming_seconds(
            tokens * 2.0 * layer.share * layer.parameters, work.contraction, min(work.tokens, *layer.shape)
        )
        for layer in work.model.tracked
    )
