"""A factor shard's part of a block of queries: s_test in its layers, written under the block's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylux import profiling
from raylux.curvature import Spectral
from raylux.engine import numerics
from raylux.engine.behind import Behind
from raylux.engine.carrying import Later, mean_carried
from raylux.engine.iterating import IterativeSolves
from raylux.engine.projecting import ProjectedFactors
from raylux.engine.records import Fitted, each_query, query_arrays, read_curvature, tensor, word_query_arrays
from raylux.engine.solve import Form, Solved, Tokens, solve_layer, solve_words
from raylux.errors import NumericsError
from raylux.influence.dots import sequence_gradients
from raylux.influence.lowrank import component_scores, factorise
from raylux.influence.words import WordGradient
from raylux.scratch import Scratch

Objects = dict[str, tuple[int, str]]
Measured = dict[int, tuple[float, np.ndarray | None]]
"""Place of a query in its block -> its dense score on a probe, and what each component gives to it [R]."""


@dataclass
class _Memory:
    """Buffers that blocks of queries take in turn: pages that were never written to cost a virtual machine much.

    Attributes:
        way: for what a layer computes on its way.
        found: for s_test, of one layer while that of the one before is written.
    """

    way: Scratch = field(default_factory=Scratch)
    found: tuple[Scratch, Scratch] = field(default_factory=lambda: (Scratch(), Scratch()))


class QuerySolves(IterativeSolves, ProjectedFactors):
    """What a shard does with queries."""

    _written: dict[str, Future[tuple[str, Objects]]]
    _words: dict[str, list[WordGradient]]
    _behind: Behind
    _memory: _Memory | None

    def solve(
        self,
        fitted: Fitted,
        rank_limit: Mapping[str, int],
        form: Form,
        block: str,
        solutions: Mapping[str, str] | None,
        checked: bool,
        later: Sequence[Later],
        *parts: Sequence[Mapping[str, Any]],
    ) -> tuple[dict[str, float], dict[str, list[float]], np.ndarray]:
        """s_test of a block of queries in every layer of this shard, kept until ``write_block``.

        Args:
            fitted: what the fit left.
            rank_limit: layer -> largest rank to try; 0: dense only.
            form: how they are solved; layers that may be compressed keep full precision.
            block: its name; layers that cannot be compressed are written under it at once, each beside the next
                one's computing, so that s_test of two layers is held at a time.
            solutions: layer -> key of the state that an iterative solve ended with; None: the kind's own inverse.
            checked: take some scores both ways.
            later: the runs that the block's queries are carried from, for which their own gradients give way.
            *parts: lists of queries' ``inputs`` [T, M] by group and ``grads`` [T, P] by layer.

        Returns:
            layer -> the damping λ that was used; layer -> ‖∇f‖² of each query in it (of a kind that projects, in its
            metric); and the scores ``Solved.pairs`` summed over the layers of this shard.
        """
        self._block, self._factors, self._written, self._words = {}, {}, {}, {}
        damping, squares = {}, {}
        pairs: list[np.ndarray] = []
        self._memory = memory = self._memory or _Memory()
        queries, turns = each_query(parts), cycle(memory.found)
        self._behind.wait()  # of a block that failed
        for name in self.layers:
            if self.layers[name].words:
                words = solve_words([self._tokens(query, name) for query in queries], form.dtype, checked)
                damping[name], squares[name] = 0.0, words.squares
                pairs.append(words.pairs)
                self._words[name] = words.s_test
                continue
            own = replace(form, dtype=self.compute) if rank_limit[name] else form
            # A kind that projects takes products of them; the others copy them first.
            projects = fitted.projection is not None
            tokens = [self._tokens(query, name, rounded=True, own=projects) for query in queries]
            if projects:
                found, damping[name] = self.solve_projected(name, fitted, tokens, own, checked)
            else:
                given = None if solutions is None else self.solutions(solutions[name])
                # What is written at once leaves its memory to the next layer but one.
                free = next(turns) if not any(rank_limit.values()) else Scratch()
                found, damping[name] = self._solved(name, fitted, tokens, own, given, checked, later, memory.way, free)
            squares[name] = found.squares
            pairs.append(found.pairs)
            if rank_limit[name]:
                self._block[name] = list(found.s_test)
                with profiling.of("compress"):
                    self._factors[name] = [factorise(s_test, rank_limit[name]) for s_test in found.s_test]
            elif any(rank_limit.values()):
                self._block[name] = list(found.s_test)  # its scores on the probes are part of what is measured
            else:
                arrays = query_arrays(found.s_test, [], [True] * len(queries))
                with profiling.of("write"):  # until the layer before is written
                    self._written[name] = self._behind.call(self.folder.write, f"queries/{name}/{block}", arrays)
        return damping, squares, np.sum(pairs, 0)

    def _solved(
        self,
        name: str,
        fitted: Fitted,
        tokens: Sequence[Tokens],
        form: Form,
        given: Sequence[Tensor] | None,
        checked: bool,
        later: Sequence[Later],
        scratch: Scratch,
        found: Scratch,
    ) -> tuple[Solved, float]:
        """A layer by its own curvature, or as it is given or carried; and λ."""
        curvature, damping = self._curvature(name, fitted)
        if later and given is None:  # a joint kind has put what is carried through its matrix
            carried = mean_carried(later, name, self.compute, self.spec.device)
            given = [curvature.solve(v, damping) for v in carried]
        try:
            with profiling.of("solve"):
                return solve_layer(curvature, tokens, damping, form, given, checked, scratch, found), damping
        except NumericsError as error:
            raise NumericsError(f"layer '{name}': {error}") from None

    def measure(self, part: Mapping[str, Any], places: Sequence[int]) -> dict[str, Measured]:
        """Scores of queries of the kept block on one probe sequence, by layer.

        Args:
            part: the probe's ``inputs`` [T, M] by group and ``grads`` [T, P] by layer.
            places: of the queries in the block.
        """
        result: dict[str, Measured] = {}
        for name, words in self._words.items():
            with profiling.of("dot"):
                own = WordGradient.of(*self._tokens(part, name))
                result[name] = {place: (words[place].dot(own), None) for place in places}
        for name, queries in self._block.items():
            a, g = (x.unsqueeze(0) for x in self._tokens(part, name))
            with profiling.of("form"):
                gradient = sequence_gradients(a, g)[0]
            with profiling.of("dot"):
                result[name] = {
                    place: (
                        float((queries[place] * gradient).sum(dtype=torch.float64)),
                        component_scores(*self._factors[name][place], a, g)[0].cpu().numpy()
                        if name in self._factors
                        else None,
                    )
                    for place in places
                }
        return result

    def write_block(
        self, block: str, ranks: Sequence[Mapping[str, int]], last: bool = True
    ) -> tuple[dict[str, str], Objects, numerics.Numerics]:
        """Write the kept block.

        Args:
            block: its name.
            ranks: per query the rank of each layer, dense where −1 or not named.
            last: no block follows, for which buffers would be kept.

        Returns:
            layer -> key, the objects written, and what their bits depend on.
        """
        keys: dict[str, str] = {}
        objects: Objects = {}
        for name, words in self._words.items():
            keys[name], more = self.folder.write(f"queries/{name}/{block}", word_query_arrays(words))
            objects |= more
        for name, written in self._written.items():
            with profiling.of("write"):
                keys[name], more = written.result()
            objects |= more
        for name, queries in self._block.items():
            chosen = [rank.get(name, -1) for rank in ranks]
            dense = [s_test for s_test, rank in zip(queries, chosen, strict=True) if rank < 0]
            factors = [
                (self._factors[name][place][0][:, :rank], self._factors[name][place][1][:, :rank])
                for place, rank in enumerate(chosen)
                if rank >= 0
            ]
            arrays = query_arrays(dense, factors, [rank < 0 for rank in chosen])
            keys[name], more = self.folder.write(f"queries/{name}/{block}", arrays)
            objects |= more
        self._block, self._factors, self._written, self._words = {}, {}, {}, {}
        if last:
            self._memory = None
        return keys, objects, numerics.here(self.spec.device)

    def _curvature(self, name: str, fitted: Fitted) -> tuple[Spectral, float]:
        spec = self.spec
        curvature = read_curvature(
            self.folder, fitted, spec.kind, name, spec.groups[name], self.compute, spec.device
        )  # fmt: skip
        return curvature, curvature.damping(spec.damping, fitted.least.get(name, 0.0))

    def _tokens(
        self, part: Mapping[str, Any], name: str, rounded: bool = False, own: bool = True
    ) -> tuple[Tensor, Tensor]:
        """a [T, M] and g [T, P]; of the word embedding token ids [T, 1].

        ``rounded``: what came in bf16 stays so. ``own``: as in ``records.tensor``.
        """
        inputs, grads = part["inputs"][self.spec.groups[name]], part["grads"][name]
        if rounded and inputs.dtype == grads.dtype == np.int16:
            a, g = (tensor(x, torch.bfloat16, self.spec.device, own) for x in (inputs, grads))
            return a, g
        g = tensor(grads, self.compute, self.spec.device, own)
        if inputs.dtype == np.int64:  # in bf16 inputs come as int16
            return torch.from_numpy(inputs.copy()).to(self.spec.device), g
        return tensor(inputs, self.compute, self.spec.device, own), g
