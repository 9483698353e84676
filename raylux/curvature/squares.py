"""How long the gradient of a sequence is, in three metrics: what its scores can be divided by.

For the gradient v of a sequence: ‖v‖²; its self-influence vᵀ (G + λ)⁻¹ v; and ‖(G + λ)⁻¹ v‖², the square of the step
that the sequence moves the weights by. The roots of the last two are the denominators of ℓ- and θ-RelatIF (Barshan et
al. 2020, equations 11 and 9). In the eigenbasis, with W = Q_Sᵀ V Q_A, they are Σ W², Σ W² / (Λ + λ) and
Σ (W / (Λ + λ))², summed over layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from raylux.curvature.joint import Joint, joined
from raylux.curvature.moments import in_basis
from raylux.curvature.projected import Projected
from raylux.curvature.spectral import Spectral
from raylux.influence.words import are_words, word_squares
from raylux.profiling import of
from raylux.routed import Rows, sequence_parts

COUNT = 3
"""‖v‖², vᵀ(G + λ)⁻¹v, ‖(G + λ)⁻¹v‖²."""

Weighed = tuple[Spectral, Tensor | None]
"""A layer's curvature, and 1 / (Λ + λ) [P, M] of it; None: the identity."""


def add_squares(
    total: Tensor,
    inputs: Mapping[str, Rows],
    grads: Mapping[str, Rows],
    groups: Mapping[str, str],
    curvatures: Mapping[str, Weighed],
) -> None:
    """Add the three squares of each sequence's gradient in some layers, one layer after the other.

    Args:
        total: [3, N] float64, added to in place.
        inputs: input group -> a [N, T, M]; in the precision of the bases.
        grads: layer -> g [N, T, P].
        groups: layer -> input group.
        curvatures: of the layers that count.
    """
    for name, (curvature, inverse) in curvatures.items():
        for places, a, g in sequence_parts(inputs[groups[name]], grads[name]):
            of_words = are_words(a)
            found = word_squares(a, g).double() if of_words else _squares(curvature, inverse, a, g)
            total[:, places.start : places.stop] += found.to(total.device)


def add_joint_squares(
    total: Tensor, inputs: Mapping[str, Rows], grads: Mapping[str, Rows], groups: Mapping[str, str], matrix: Joint
) -> None:
    """``add_squares`` by one matrix over all layers, a sequence at a time."""
    formed = {
        name: [gradient.clone() for _, gradient in each_gradient(inputs[groups[name]], grads[name])]
        for name in matrix.shapes
    }
    for place in range(total.shape[1]):
        v = joined({name: gradients[place] for name, gradients in formed.items()}, matrix.shapes)
        total[:, place] += matrix.squares(v)


def add_projected_squares(
    total: Tensor,
    inputs: Mapping[str, Rows],
    grads: Mapping[str, Rows],
    groups: Mapping[str, str],
    metrics: Mapping[str, Projected],
) -> None:
    """``add_squares`` in the metrics of some layers, a sequence at a time."""
    for name, place, v in _each_of(metrics, inputs, grads, groups):
        step, flat = metrics[name].solve(v).flatten(), v.flatten()
        found = torch.stack([torch.dot(flat, flat).double(), metrics[name].square(v), torch.dot(step, step).double()])
        total[:, place] += found.to(total.device)


def add_projected_lengths(
    total: Tensor,
    inputs: Mapping[str, Rows],
    grads: Mapping[str, Rows],
    groups: Mapping[str, str],
    metrics: Mapping[str, Projected],
) -> None:
    """``total`` [N] float64 += the square that scores are divided by, of each sequence's gradient in some layers."""
    for name, place, v in _each_of(metrics, inputs, grads, groups):
        total[place] += metrics[name].square(v).to(total.device)


def _each_of(
    layers: Iterable[str], inputs: Mapping[str, Rows], grads: Mapping[str, Rows], groups: Mapping[str, str]
) -> Iterator[tuple[str, int, Tensor]]:
    """Layer, place and gradient, as ``each_gradient``."""
    for name in layers:
        for place, v in each_gradient(inputs[groups[name]], grads[name]):
            yield name, place, v


def each_gradient(a: Rows, g: Rows) -> Iterator[tuple[int, Tensor]]:
    """Place and gradient [P, M] of each sequence with a token there; valid until the next."""
    for places, own_a, own_g in sequence_parts(a, g):
        place = places.start
        for some in in_basis(own_a, own_g, None, None):
            for gradient in some:
                yield place, gradient
                place += 1


def _squares(curvature: Spectral, inverse: Tensor | None, a: Tensor, g: Tensor) -> Tensor:
    """[3, N] float64 from a [N, T, M] and g [N, T, P]."""
    found = []
    for turned in in_basis(a, g, curvature.q_a, curvature.q_s):
        with of("square"):
            flat = turned.flatten(1)
            divided = flat if inverse is None else flat * inverse.flatten()
            pairs = ((flat, flat), (flat, divided), (divided, divided))
            found.append(torch.stack([torch.linalg.vecdot(x, y) for x, y in pairs]).double())
    return torch.cat(found, 1)
