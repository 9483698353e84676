"""A factor shard's part of an iterative solve: its layers' share of a block of queries, between two commits.

What is held here is the state that the driver committed last, or a step beyond it: a shard that died is given that
state again, and the step is taken again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from raylux import gpu, profiling
from raylux.curvature import KINDS, Spectral
from raylux.curvature.solvers import SOLVERS, LayerSolve
from raylux.engine import numerics
from raylux.engine.parts import ShardPart
from raylux.engine.records import STATE, Fitted, each_query, read_joint, read_state, tensor
from raylux.errors import NumericsError

Objects = dict[str, tuple[int, str]]
Saved = tuple[dict[str, str], Objects, numerics.Numerics]
"""Layer -> key of its state, the objects written, and what their bits depend on."""


class IterativeSolves(ShardPart):
    """Solves that take products with the Gauss-Newton matrix."""

    _solves: dict[str, LayerSolve]
    _block: dict[str, list[Tensor]]
    _factors: dict[str, list[tuple[Tensor, Tensor]]]

    @abstractmethod
    def _curvature(self, name: str, fitted: Fitted) -> tuple[Spectral, float]:
        """A layer's curvature, and its λ."""

    def begin_solve(
        self, solver: str, fitted: Fitted, *parts: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[int, tuple[float, float]]], float, float]:
        """Put a block of queries at the solver's start.

        Args:
            solver: its name.
            fitted: what the fit left.
            *parts: ``inputs`` [T, M] by group and ``grads`` [T, P] by layer of a query, or lists of several's.

        Returns:
            Per layer: place of a query -> (vᵀv, vᵀ · start); the trace of G by this shard's factors; its largest λ.
        """
        self._solves = {}
        queries = each_query(parts)
        sums, trace, most = [], 0.0, 0.0
        for name in self.layers:
            curvature, damping = self._curvature(name, fitted)
            gradients = [g.T @ a for a, g in (self._tokens(query, name) for query in queries)]
            with profiling.of("solve"):
                try:
                    self._solves[name] = LayerSolve.begin(SOLVERS[solver], curvature, damping, gradients)
                except NumericsError as error:
                    raise NumericsError(f"layer '{name}': {error}") from None
                sums.append(dict(enumerate(self._solves[name].inner())))
            assert curvature.values is not None, "a kind without curvature has no solver"
            trace += float(curvature.values.double().sum())
            most = max(most, damping)
        return sums, trace, most

    def load_solve(self, solver: str, fitted: Fitted, keys: Mapping[str, str]) -> None:
        """Take up the state under ``keys``, layer -> key; otherwise as ``begin_solve``."""
        self._solves = {}
        for name in self.layers:
            curvature, damping = self._curvature(name, fitted)
            group = self.folder.group(keys[name])
            state = {
                each: list(tensor(group.read(STATE, place), self.compute, self.spec.device))
                for place, each in enumerate(group.attrs["names"])
            }
            self._solves[name] = LayerSolve(SOLVERS[solver], curvature, damping, state)

    def take_products(self) -> dict[str, tuple[str, Objects, dict[str, Any]]]:
        """Take the sums of a pass as G times each direction: ``energies`` of each layer, as a pass has them written.

        Nothing, where the shard has begun anew meanwhile and holds no solve.
        """
        images: dict[str, dict[int, Tensor]] = {name: {} for name in self._solves}
        for each, total in self._sums.items():
            place, _, name = each.partition(":")
            if name in images:
                mean = total / self._counts[""]
                images[name][int(place)] = tensor(mean, self.compute, self.spec.device)
        with profiling.of("solve"):
            energies = {name: self._solves[name].take(parts) for name, parts in images.items()}
        return {name: ("", {}, {"sequences": self._counts[""], "energies": found}) for name, found in energies.items()}

    def advance(self, steps: Mapping[int, float]) -> list[dict[int, tuple[float, float]]]:
        """Go a step with each active query: per layer (rᵀr, rᵀP⁻¹r) by place."""
        with profiling.of("solve"):
            return [solve.advance(steps) for solve in self._solves.values()]

    def turn(self, kept: Mapping[int, float], block: str) -> Saved:
        """Choose the next directions and write the state of every layer."""
        with profiling.of("solve"):
            for solve in self._solves.values():
                solve.turn(kept)
        return self.save_solve(block)

    def save_solve(self, block: str) -> Saved:
        """Write the state of every layer under a fresh key."""
        keys: dict[str, str] = {}
        objects: Objects = {}
        for name, solve in self._solves.items():
            names = sorted(solve.state)
            # One array: what small models pay for is the number of files.
            array = np.stack([np.stack([gpu.to_host(x).numpy() for x in solve.state[each]]) for each in names])
            keys[name], more = self.folder.write(f"solves/{name}/{block}", {STATE: array}, {"names": names})
            objects |= more
        return keys, objects, numerics.here(self.spec.device)

    def solutions(self, key: str) -> list[Tensor]:
        """x [P, M] of each query of a block in one layer, from the state under ``key``."""
        return list(tensor(read_state(self.folder, key, "x"), self.compute, self.spec.device))

    def hold_solutions(self, keys: Mapping[str, str]) -> None:
        """Hold x of each layer as the block that is scored on probes, from the states under layer -> key."""
        self._factors = {}
        self._block = {name: self.solutions(keys[name]) for name in self.layers}

    def freedom(self, fitted: Fitted) -> dict[str, float]:
        """Layer -> Σ Λ/(Λ + λ), its effective degrees of freedom."""
        found = {}
        if KINDS[self.spec.kind].joint:
            spec = self.spec
            matrix = read_joint(self.folder, fitted, spec.kind, spec.shapes, spec.damping, spec.device)
            return {name: value for name, value in matrix.freedom().items() if name in self.layers}
        for name in self.layers:
            curvature, damping = self._curvature(name, fitted)
            assert curvature.values is not None, "a kind without curvature has no degrees of freedom"
            values = curvature.values.double()
            found[name] = float((values / (values + damping)).sum())
        return found

    def end_solve(self) -> None:
        """Let go of the state."""
        self._solves = {}
