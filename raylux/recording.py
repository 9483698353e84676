"""What hooks of a forward pass write down of its tracked layers, and gradients at the places they noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


@dataclass
class Forward:
    """One forward pass whose graph is kept. Legend: n tokens, flat; V entries of the vocabulary.

    Attributes:
        logits: [n, V].
        counted: [n] bool, whether a loss is taken there.
        inputs: layer -> the input of each call, [..., M] without the bias's coordinate.
        outputs: layer -> the output of each call, [..., P], a part of the graph.
    """

    logits: Tensor
    counted: Tensor
    inputs: dict[str, list[Tensor]]
    outputs: dict[str, list[Tensor]]


class Outputs:
    """Inputs and outputs by layer in call order; what goes on from a layer is a copy, safe from changes in place."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output.requires_grad_(True)
            self.inputs.setdefault(name, []).append(inputs[0].detach())
            self.outputs.setdefault(name, []).append(output)
            return output.clone()

        return record


class Record:
    """Inputs by layer in call order, and where in the graph each call's output comes from.

    Attributes:
        open: whether the forward pass is under way; what runs again in the backward pass is not recorded twice.
    """

    _head: tuple[Tensor, Tensor, int] | None = None

    def __init__(self) -> None:
        self.open = True
        self.inputs: dict[str, list[Tensor]] = {}
        self.edges: dict[str, list[GradientEdge]] = {}

    def hook(
        self, name: str, keep_input: bool, keep_edge: bool
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            begins = not output.requires_grad
            if begins:
                output.requires_grad_(True)
            if keep_input and self.open:
                self.inputs.setdefault(name, []).append(inputs[0].detach())
            if keep_edge and self.open:
                # An edge, as the output may be changed in place further on, and need not be kept for its own sake.
                self.edges.setdefault(name, []).append(get_gradient_edge(output))
            # Where the graph begins, what goes on is no leaf: torch's own trackers of modules cannot do with one.
            return output.view_as(output) if begins else output

        return record

    def head(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """A hook of the model's head."""
        if self.open:
            self._head = (inputs[0], output, output._version)

    def before(self, logits: Tensor) -> Tensor | None:
        """What the head read, where the logits are what it gave or a copy on another device; asked for once.

        Neither may have been changed in place since.
        """
        seen, self._head = self._head, None
        if seen is None:
            return None
        read, given, version = seen
        if given._version != version or not (given is logits or _moved(given, logits)):
            return None
        return read

    def gradients(self, end: Tensor, gradient: Tensor, retain: bool) -> dict[str, list[Tensor | None]]:
        """Layer -> the gradient of each call's output; None where the end does not depend on it.

        The backward pass goes no further than these outputs.

        Args:
            end: the logits that the forward pass ended in, or what their head read.
            gradient: of the loss by the end, of as many entries.
            retain: keep the graph for another backward pass.
        """
        edges = [edge for calls in self.edges.values() for edge in calls]
        if not (edges and end.requires_grad):
            return {}
        found = iter(torch.autograd.grad(end, edges, gradient.view_as(end), retain_graph=retain, allow_unused=True))
        return {name: [next(found) for _ in calls] for name, calls in self.edges.items()}


def _moved(x: Tensor, found: Tensor) -> bool:
    """Whether one tensor is another on its way to a different device: no other single operation ends on one."""
    step = found.grad_fn
    if step is None or x.grad_fn is None or x.device == found.device or x.dtype != found.dtype or found._version:
        return False
    return [node for node, _ in step.next_functions] == [x.grad_fn]
