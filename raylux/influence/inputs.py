"""I_pert: how an influence score moves with the inputs of the training sequence (Koh & Liang 2017, section 2.2).

A score is ⟨s, ∇_θ L(z)⟩ over the tracked weights, with L = −log p and s = −(G + λ)⁻¹∇f, as s_test is kept. Its
gradient by the inputs x of z is ∇_x ⟨s, ∇_θ L(z)⟩: a vector in the space of features, or of word embeddings, a row for
each token; not the score of z once more. Two backward passes give it, the second one through the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from raylux.batches import IGNORED, TokenRow, collate
from raylux.errors import NumericsError, UserError
from raylux.layers import TrackedLayer
from raylux.modules import features_of
from raylux.parameters import called_with, matrix_of, parameters_of
from raylux.tasks import task_of


@dataclass(frozen=True)
class InputGradient:
    """Of one sequence with one query.

    Attributes:
        score: ⟨s, ∇L⟩.
        gradient: of it by the inputs: [T, D] by word embeddings, [*shape] by features.
        inputs: what stands there, of the same shape.
    """

    score: float
    gradient: Tensor
    inputs: Tensor


def input_gradient(
    model: nn.Module, layers: Sequence[TrackedLayer], row: TokenRow, solved: Mapping[str, Tensor]
) -> InputGradient:
    """The gradient of a score by a sequence's inputs.

    Args:
        model: a causal LM, a classifier or a marked module, in eval mode; it is left as it is.
        layers: tracked, all of them matrices and none an expert's.
        row: the sequence, on its own labels.
        solved: layer -> s [P, M], s_test as it is kept.

    Raises:
        UserError: the model has no word embedding that is looked up once, nor features that are real numbers.
        NumericsError: it is not finite.
    """
    device = next(model.parameters()).device
    batch = collate([row], [0], len(row.tokens)).to(device)
    leaf, task = _Leaf(), task_of(model)
    features = features_of(model)
    handle = None
    if features is not None and not features.whole:
        batch = replace(batch, input_ids=leaf.begin(batch.input_ids.to(next(model.parameters()).dtype)))
    else:
        handle = _embedding(model).register_forward_hook(lambda _, inputs, output: leaf.begin(output))
    weights = {name: x.requires_grad_(True) for name, x in parameters_of(model, layers).items()}
    try:
        # Attention by plain operations: the fused kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            logits = task.logits(called_with(model, weights), batch)
            targets = task.targets(batch).reshape(-1)
            loss = functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), targets, ignore_index=IGNORED, reduction="sum"
            )
            found = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
            slopes = dict(zip(weights, found, strict=True))
            parts = [(solved[layer.name] * matrix_of(layer, slopes)).sum() for layer in layers]
            score = torch.stack(parts).sum()
            (gradient,) = torch.autograd.grad(score, [leaf.x], materialize_grads=True)
    finally:
        if handle is not None:
            handle.remove()
    if not (torch.isfinite(score) and torch.isfinite(gradient).all()):
        raise NumericsError("the gradient of a score by a sequence's inputs is not finite")
    # One sequence, of features one token.
    gradient, inputs = (x[0] if handle is not None else x[0, 0] for x in (gradient, leaf.x))
    return InputGradient(float(score.detach()), gradient.detach(), inputs.detach())


class _Leaf:
    """Where the graph begins."""

    x: Tensor

    def begin(self, x: Tensor) -> Tensor:
        if hasattr(self, "x"):
            raise UserError("the model looks words up more than once in a pass: there is no one input to change")
        self.x = x.detach().requires_grad_(True)
        # A copy goes on: a model may change in place what it looked up.
        return self.x.clone()


def _embedding(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_input_embeddings", None)
    module = getter() if callable(getter) else None
    if not isinstance(module, nn.Embedding):
        raise UserError(
            "the model reads whole numbers and has no word embedding by which its inputs could be changed; give it "
            "features that are real numbers, or a get_input_embeddings()"
        )
    return module
