"""Columns of the exact Hessian of the training loss by the tracked weights, by a second backward pass for each.

H = (1/N) Σ_i ∇²L_i over the weights of all tracked layers together, L_i the summed loss of sequence i on its own
labels: the matrix of Koh & Liang 2017. It is G and the curvature of the logits themselves by the weights, weighted by
p − onehot(label). Where the logits are linear in the tracked weights, of a head, that is none and H is G; below, the
loss may curve downwards in some directions, and H has no use as a metric without damping.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from raylux.batches import IGNORED, Batch
from raylux.capture import Capture
from raylux.gpu import is_unrepeatable, repeatable
from raylux.parameters import called_with, flat, parameters_of, unflat
from raylux.profiling import of


def add_columns(capture: Capture, batch: Batch, total: Tensor) -> None:
    """``total`` [D, D] += Σ_i ∇²L_i of a batch, a row for each weight.

    Args:
        capture: of the model.
        batch: on the model's device, without filler rows.
        total: added to in place; weights in the order of the capture's layers.
    """
    try:
        with repeatable(batch.mask.device.type):
            _add(capture, batch, total)
    except RuntimeError as error:
        # What has no repeatable kernel says so in the first of the passes, before anything was added.
        if not is_unrepeatable(error):
            raise
        _add(capture, batch, total)


def _add(capture: Capture, batch: Batch, total: Tensor) -> None:
    layers = capture.layers
    weights = {name: x.requires_grad_(True) for name, x in parameters_of(capture.model, layers).items()}
    # Attention by plain operations: the fused kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        with of("forward"):
            logits = capture.task.logits(called_with(capture.model, weights), batch)
            targets = capture.task.targets(batch)
            loss = functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORED, reduction="sum"
            )
        with of("backward"):
            found = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
            slopes = dict(zip(weights, found, strict=True))
            unit = torch.zeros_like(total[0])
            for place, row in enumerate(total):
                unit.zero_()[place] = 1
                directions = unflat(layers, unit, weights)
                second = torch.autograd.grad(
                    [slopes[name] for name in weights],
                    list(weights.values()),
                    [directions[name].to(weights[name].dtype) for name in weights],
                    retain_graph=True,
                    materialize_grads=True,
                )
                row.add_(flat(layers, dict(zip(weights, second, strict=True))))
