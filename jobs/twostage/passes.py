"""The two passes of the study over a layer: exact scores of all pairs, and sketches of both sides.

Both are kept on the scratch disk: ``exact.LAYER.npy`` [N, Q] and ``sketch.LAYER.npz`` with gradients [N, k] and
queries [Q, k]. Numbers are float32; g is ``SCALE`` times too large throughout, which cancels in nothing but size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.twostage.captured import Tokens
from jobs.twostage.sketch import Balance, CountSketch, balance
from raylux.curvature import Covariances, Spectral, add_second_moment, eigenbasis, rotate
from raylux.layers import TrackedLayer

_BLOCK = 64
# Mean squares that only set weights are taken on every so many-th sequence.
_SPARSE = 16


@dataclass
class LayerStudy:
    """One layer, its curvature, and the study's sequences.

    Attributes:
        folder: the scratch folder.
        layer: see ``TrackedLayer``.
        queries: Q.
    """

    folder: Path
    layer: TrackedLayer
    queries: int

    def __post_init__(self) -> None:
        self.candidates = Tokens.open(self.folder, "cand", self.layer)
        self.asked = Tokens.open(self.folder, "query", self.layer, self.queries)
        self.curvature = self._curvature()

    def _curvature(self) -> Spectral:
        """EK-FAC of the layer, from the fitted part; kept once made."""
        path = self.folder / f"curvature.{self.layer.name}.npz"
        if not path.exists():
            np.savez(path, **{name: x.numpy() for name, x in self._fit().items()})
        with np.load(path) as file:
            lam, q_a, q_s = (torch.from_numpy(file[name]) for name in ("lam", "q_a", "q_s"))
        return Spectral(lam, q_a, q_s)

    def _fit(self) -> dict[str, Tensor]:
        fitted, sums = Tokens.open(self.folder, "fit", self.layer), Covariances()
        for _, a, g in fitted.blocks(_BLOCK):
            a = a * (a[..., : self.layer.inputs - self.layer.bias] != 0).any(2, keepdim=True)  # no ones on padding
            sums.add({"x": a}, {"x": g}, torch.ones(g.shape[:2], dtype=torch.bool))
        q_a = eigenbasis(sums.inputs["x"], self.layer.name)[1].float()
        q_s = eigenbasis(sums.grads["x"], self.layer.name)[1].float()
        lam = torch.zeros(self.layer.shape)
        for _, a, g in fitted.blocks(_BLOCK):
            add_second_moment(lam, a, g, q_a, q_s)
        return {"lam": lam / len(fitted), "q_a": q_a, "q_s": q_s}

    def preconditioned(self) -> Iterator[tuple[slice, Tensor]]:
        """(places, s_test [n, P, M] in the eigenbasis) of the queries."""
        damping = self.curvature.damping("auto")
        for places, a, g in self.asked.blocks(_BLOCK):
            gradients = torch.bmm(rotate(g, self.curvature.q_s).mT, rotate(a, self.curvature.q_a))
            yield places, self.curvature.divide(gradients, damping)

    def exact(self) -> np.ndarray:
        """[N, Q] scores of the layer."""
        path = self.folder / f"exact.{self.layer.name}.npy"
        if path.exists() and (kept := np.load(path)).shape[1] >= self.queries:
            return kept[:, : self.queries]
        v = torch.cat([self.curvature.back(x).flatten(1) for _, x in self.preconditioned()])
        found = torch.empty(len(self.candidates), len(v))
        for places, a, g in self.candidates.blocks(2 * _BLOCK):
            found[places] = torch.bmm(g.mT, a).flatten(1) @ v.T
        np.save(path, found.numpy())
        return found.numpy()

    def sketch(self, size: int, sides: tuple[int, int], scale: np.ndarray) -> None:
        """Keep sketches of both sides.

        Args:
            size: k.
            sides: (k_S, k_A), directions that are balanced.
            scale: [Q], the spread of each query's scores: queries count by what they are relative to it.
        """
        path = self.folder / f"sketch.{self.layer.name}.npz"
        if path.exists():
            return
        spread = torch.from_numpy(scale).float()
        total = torch.zeros(self.layer.shape)
        for places, v in self.preconditioned():
            total += (v / spread[places, None, None]).square().sum(0)
        weights = balance(total / len(self.asked), _values(self.curvature), sides)
        total.zero_()
        v = torch.cat([self.curvature.back(weights.queries(x)) for _, x in self.preconditioned()])
        for start in range(0, len(v), _BLOCK):
            places = slice(start, start + _BLOCK)
            total += (v[places] / spread[places, None, None]).square().sum(0)
        seen, counted = torch.zeros(self.layer.shape), 0
        for _, gradients in self._formed(weights, _BLOCK // 4, _SPARSE):
            seen, counted = seen + gradients.square().sum(0), counted + len(gradients)
        drawn = CountSketch.draw(total / len(v), seen / counted, size, seed=1)
        queries = torch.cat([drawn.queries(v[at : at + _BLOCK]) for at in range(0, len(v), _BLOCK)])
        held = torch.empty(len(self.candidates), drawn.size)
        for places, gradients in self._formed(weights, _BLOCK):
            held[places] = drawn.gradients(gradients)
        np.savez(path, gradients=held.numpy(), queries=queries.numpy())

    def _formed(self, weights: Balance, size: int, step: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """(places, balanced gradients [n, P, M]) of the candidates, in blocks of ``size``, every ``step``-th."""
        q_a, q_s = self.curvature.q_a, self.curvature.q_s
        assert q_a is not None and q_s is not None
        for places, a, g in self.candidates.blocks(size, step):
            a, g = weights.tokens(a, g, q_a, q_s)
            yield places, torch.bmm(g.mT, a)


def _values(curvature: Spectral) -> Tensor:
    assert curvature.values is not None
    return curvature.values


def sides_of(layer: TrackedLayer, wide: int, narrow: int) -> tuple[int, int]:
    """(k_S, k_A): more directions on a side that widens, whose gradients fill more of them."""
    outputs, inputs = layer.shape
    return (min(wide if outputs > inputs else narrow, outputs), min(narrow, inputs))
