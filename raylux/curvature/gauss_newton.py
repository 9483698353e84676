"""Products of the exact Gauss-Newton matrix with vectors of tracked weights, by two backward passes each.

G = (1/N) Σ_i Σ_t J_itᵀ H_it J_it over sequences i and the tokens t that have a loss, J_it the Jacobian of token t's
logits by the weights of *all* tracked layers and H = diag(p) − p pᵀ the Hessian of cross-entropy at the logits
(Schraudolph 2002; Grosse et al. 2023, eq. 6). With labels drawn from the model, the mean outer product of
per-sequence gradients is an estimate of it. It has the blocks between layers that EK-FAC leaves out.

Parameters are frozen and a change V of a layer's weight moves its output by a Vᵀ: so J V is the derivative of the
logits along these changes of the layers' outputs, and Jᵀ u the gradients g at the outputs, contracted with a. One
forward pass and one backward pass with a graph of its own make a batch linear; each vector then takes a backward
pass through that graph (J V, since g is linear in u) and one through the first (Jᵀ u).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raylux.batches import Batch, mask_of_rows
from raylux.capture import Capture, Forward
from raylux.errors import NumericsError
from raylux.gpu import is_unrepeatable, repeatable
from raylux.layers import TrackedLayer
from raylux.patches import output_like, output_rows
from raylux.profiling import of

Vector = Mapping[str, Tensor]
"""Tracked weights: layer -> [P, M], the bias in the last column."""


class Linearised:
    """The logits of one batch as a linear function of the tracked weights, near where the model stands.

    Args:
        forward: of the batch.
        layers: tracked.
        mask: [N, T] bool, True on real tokens.

    Raises:
        NumericsError: a layer took no part in the logits.
    """

    def __init__(self, forward: Forward, layers: Sequence[TrackedLayer], mask: Tensor) -> None:
        self._forward, self._layers = forward, layers
        self._calls = [(layer, call) for layer in layers for call in range(len(forward.outputs.get(layer.name, ())))]
        reached = {layer.name for layer, _ in self._calls}
        for layer in layers:
            if layer.name not in reached:
                raise NumericsError(f"layer '{layer.name}' took no part in the loss")
        self._outputs = [forward.outputs[layer.name][call] for layer, call in self._calls]
        self._inputs = [
            self._input(layer, forward.inputs[layer.name][call].to(y.device), mask)
            for (layer, call), y in zip(self._calls, self._outputs, strict=True)
        ]
        self._probabilities = forward.logits.detach().softmax(-1)
        self._cotangent = torch.zeros_like(forward.logits, requires_grad=True)
        with of("backward"):
            self._gradients = torch.autograd.grad(
                forward.logits, self._outputs, self._cotangent, create_graph=True, allow_unused=True
            )

    @staticmethod
    def _input(layer: TrackedLayer, x: Tensor, mask: Tensor) -> Tensor:
        """a of one call, [tokens, M], flat; zero on padding, from where nothing reaches the loss."""
        flat = x.reshape(-1, x.shape[-1])
        if layer.bias:
            flat = torch.cat([flat, torch.ones_like(flat[:, :1])], 1)
        counts = mask_of_rows(mask, len(flat) // len(mask))
        return flat if counts is None else flat * counts.reshape(-1, 1).to(flat.device)

    def product(self, vector: Vector) -> dict[str, Tensor]:
        """Σ_it J_itᵀ H_it J_it V over the batch."""
        return self.pulled(self.curved(self.pushed(vector)))

    def energy(self, vector: Vector) -> float:
        """Σ_it (J_it V)ᵀ H_it J_it V over the batch: the curvature of its loss along V."""
        change = self.pushed(vector)
        return float((change.double() * self.curved(change).double()).sum())

    def pushed(self, vector: Vector) -> Tensor:
        """J V: [n, V]."""
        tangents, gradients = [], []
        for (layer, _), a, g in zip(self._calls, self._inputs, self._gradients, strict=True):
            if g is not None:
                gradients.append(g)
                change = a @ vector[layer.name].to(a.dtype).T
                tangents.append(change.view_as(g) if layer.patches is None else output_like(change, g))
        with of("backward"):
            (moved,) = torch.autograd.grad(gradients, self._cotangent, tangents, retain_graph=True)
        return moved

    def curved(self, change: Tensor) -> Tensor:
        """H times a change of the logits [n, V]; zero where no loss is taken."""
        weighted = self._probabilities * change
        curved = weighted - self._probabilities * weighted.sum(-1, keepdim=True)
        return curved * self._forward.counted.unsqueeze(-1)

    def pulled(self, cotangent: Tensor) -> dict[str, Tensor]:
        """Jᵀ u of u [n, V]."""
        with of("backward"):
            found = torch.autograd.grad(
                self._forward.logits, self._outputs, cotangent, retain_graph=True, allow_unused=True
            )
        result: dict[str, Tensor] = {}
        with of("form"):
            for (layer, _), a, g in zip(self._calls, self._inputs, found, strict=True):
                if g is not None and layer.patches is not None:
                    g = output_rows(g)
                part = a.new_zeros(layer.shape) if g is None else g.reshape(-1, layer.outputs).T @ a
                result[layer.name] = result[layer.name] + part if layer.name in result else part
        return result


def add_products(
    capture: Capture, batch: Batch, vectors: Sequence[Vector], totals: Sequence[Mapping[str, Tensor]]
) -> None:
    """Add Σ J'HJ V of a batch to ``totals``, for each vector by itself: its bits do not depend on the others.

    Args:
        capture: of the model.
        batch: on the model's device, without filler rows.
        vectors: V, each over all tracked layers.
        totals: for each vector, layer -> [P, M], added to in place.
    """
    try:
        with repeatable(batch.mask.device.type):
            _add(capture, batch, vectors, totals)
    except RuntimeError as error:
        # Nothing was added: what has no repeatable kernel says so in the first pass that is taken.
        if not is_unrepeatable(error):
            raise
        _add(capture, batch, vectors, totals)


def energy(capture: Capture, batch: Batch, vector: Vector) -> float:
    """Vᵀ (Σ J'HJ) V of a batch; arguments as of ``add_products``."""
    with capture.forward(batch) as forward:
        return Linearised(forward, capture.layers, batch.mask).energy(vector)


def _add(capture: Capture, batch: Batch, vectors: Sequence[Vector], totals: Sequence[Mapping[str, Tensor]]) -> None:
    with capture.forward(batch) as forward:
        linear = Linearised(forward, capture.layers, batch.mask)
        for vector, total in zip(vectors, totals, strict=True):
            for name, part in linear.product(vector).items():
                total[name].add_(part)
