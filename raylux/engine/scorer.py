"""Queries held by a worker, and captured sequences gathered until a product has enough rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylux.blocks import Rotation
from raylux.cost.sizes import products_together, queries_rest, used_once
from raylux.curvature import Basis, rotate
from raylux.engine.kept import Resting
from raylux.engine.plan import Plan
from raylux.engine.records import (
    Contraction,
    FactorFiles,
    QueryFiles,
    read_layer_queries,
    read_rotation,
    read_word_queries,
)
from raylux.influence.dots import Held, LayerQueries, in_memory, squared_norms
from raylux.influence.words import WordQueries
from raylux.layers import TrackedLayer, matrices
from raylux.memory import give_back
from raylux.routed import Routed, Rows, sequence_parts
from raylux.scratch import Scratch
from raylux.store import RunFolder


@dataclass(frozen=True)
class LoadedQueries:
    """Preconditioned queries that a worker is to hold.

    Attributes:
        files: where they are.
        ids: those wanted, in the order of the scores.
        contraction: how they are put against sequences.
        basis: the eigenbases in which they are; empty: the standard basis.
    """

    files: tuple[QueryFiles, ...]
    ids: tuple[str, ...]
    contraction: Contraction
    basis: FactorFiles


def _nowhere(group: str, basis: FactorFiles) -> None:
    """Nothing is kept."""


@dataclass
class PackPart:
    """A batch among those of a pack.

    Attributes:
        places: of its sequences in the caller's list; rows beyond them are filler.
        rows: N, filler included.
        tokens: padded tokens of a sequence.
        inputs: input group -> a [N, T, M]; an expert's ``Routed``. What is kept is read at each look.
        grads: layer -> g [N, T, P].
        turned: (input group, eigenbases) -> a as it is in these, where that is kept.
    """

    places: tuple[int, ...]
    rows: int
    tokens: int
    inputs: Mapping[str, Rows]
    grads: Mapping[str, Rows]
    turned: Callable[[str, FactorFiles], Rows | None] = _nowhere

    def __len__(self) -> int:
        return self.rows


@dataclass
class Pack:
    """Batches that are scored together, in products of ``rows`` rows: queries are read once for all of them."""

    parts: list[PackPart]
    rows: int

    @property
    def counted(self) -> list[int]:
        """Places of the sequences among the rows, filler left out."""
        starts = [sum(len(part) for part in self.parts[:index]) for index in range(len(self.parts))]
        return [start + at for start, part in zip(starts, self.parts, strict=True) for at in range(len(part.places))]

    def norms(self, groups: Mapping[str, str]) -> Tensor:
        """‖G_n‖ of each row."""
        return torch.cat([squared_norms(part.inputs, part.grads, groups) for part in self.parts]).sqrt()


def packs(parts: Iterable[PackPart], rows: int, products: int = 1) -> Iterator[Pack]:
    """Gather batches until ``products`` products of ``rows`` rows are full.

    A batch of more rows than a product stands alone, in one.
    """
    held: list[PackPart] = []
    for part in parts:
        if held and (len(part) > rows or sum(map(len, held)) + len(part) > rows * products):
            yield Pack(held, rows)
            held = []
        if len(part) > rows:
            yield Pack([part], len(part))
        else:
            held.append(part)
    if held:
        yield Pack(held, rows)


class Bases:
    """The eigenbases of all layers, in the precision of the products, each where ``devices`` has its layer."""

    def __init__(
        self, folder: RunFolder, layers: Sequence[TrackedLayer], groups: Mapping[str, str], devices: Mapping[str, str]
    ) -> None:
        self._folder, self._layers, self._groups, self._devices = folder, layers, groups, devices
        self._of: tuple[FactorFiles, torch.dtype, frozenset[str] | None] | None = None
        self._held: dict[str, Basis] = {}

    def get(self, files: FactorFiles, dtype: torch.dtype, wanted: frozenset[str] | None = None) -> dict[str, Basis]:
        """(Q_A, Q_S) of every layer, or of those wanted, read unless they are held; Nones where ``files`` is empty."""
        if self._of != (files, dtype, wanted):
            self.drop()
            give_back()
            leaders: dict[str, Rotation | None] = {}
            for layer in self._layers:
                if wanted is not None and layer.name not in wanted:
                    continue
                group = self._groups[layer.name]
                q_a, q_s = read_rotation(self._folder, files, layer.name, group, dtype, self._devices[layer.name])
                # Layers that read the same tensor share one basis of it.
                self._held[layer.name] = leaders.setdefault(group, q_a), q_s
            self._of = files, dtype, wanted
        return self._held

    def drop(self) -> None:
        self._held, self._of = {}, None


class Scorer:
    """Queries ready to be put against packs.

    Attributes:
        loaded: which.
        together: of how many products sequences that are kept are taken together, where queries rest.
        rests: dense ones rest on the disk; on a CPU from their second use on where one layer's are few enough, since
            many a run uses them once.
    """

    def __init__(
        self,
        folder: RunFolder,
        layers: Sequence[TrackedLayer],
        groups: Mapping[str, str],
        plan: Plan,
        loaded: LoadedQueries,
        bases: Bases,
        devices: Mapping[str, str],
    ) -> None:
        give_back()
        self.loaded, self._layers, self._groups = loaded, layers, groups
        self._folder, self._plan, self._devices = folder, plan, devices
        dtype = loaded.contraction.torch_dtype
        self._itemsize = torch.empty(0, dtype=dtype).element_size()
        self.rests = queries_rest(matrices(layers), len(loaded.ids), self._itemsize)
        self.together = products_together(matrices(layers), plan.longest, plan.rows, self._itemsize)
        self._resting, self._asked = Resting() if self.rests else None, set[str]()
        self._queries: dict[str, LayerQueries | WordQueries] = {
            layer.name: WordQueries(
                read_word_queries(folder, loaded.files, layer, loaded.ids, dtype, devices[layer.name])
            )
            for layer in layers
            if layer.words
        }
        if not self.rests:
            self._queries |= {layer.name: self._read(layer) for layer in matrices(layers)}
        self._bases = bases.get(loaded.basis, dtype)

    def _read(
        self,
        layer: TrackedLayer,
        hold: Callable[[Tensor], Held] = in_memory,
        scratch: Scratch | None = None,
        once: bool = False,
    ) -> LayerQueries:
        loaded, device = self.loaded, self._devices[layer.name]
        dtype, tokens = loaded.contraction.torch_dtype, self._plan.typical_tokens * layer.share
        queries = read_layer_queries(self._folder, loaded.files, layer.name, loaded.ids, dtype, device, scratch)
        return LayerQueries.build(layer.shape, queries, tokens, self._plan.tile, hold, scratch, once)

    def _of(self, layer: TrackedLayer, scratch: Scratch) -> LayerQueries | WordQueries:
        """The queries in a layer, valid until those of the next are asked for.

        Those that rest are put to rest when they are asked for again: a run of few sequences asks once.
        """
        name, cpu = layer.name, self._devices[layer.name] == "cpu"
        found = self._queries.get(name)
        few = used_once(layer, len(self.loaded.ids), self._itemsize)
        if found is None and cpu and few and name not in self._asked:
            self._asked.add(name)
            return self._read(layer, scratch=scratch, once=True)
        if found is None:
            assert self._resting is not None, "others are read at once"
            found = self._queries[name] = self._read(layer, self._resting.hold, scratch if cpu else None)
        return found

    def layer_scores(self, pack: Pack) -> Iterator[Tensor]:
        """[rows, Q] of each layer, in order."""
        scratch = Scratch()
        held: tuple[str, list[Rows]] | None = None
        for layer in self._layers:
            group, q_s = self._groups[layer.name], self._bases[layer.name][1]
            if held is None or held[0] != group:
                held = None  # not beside the next
                held = group, [self._turned(part, layer.name) for part in pack.parts]
            grads = [rotate(part.grads[layer.name], q_s) for part in pack.parts]
            yield self._of(layer, scratch).scores(list(zip(held[1], grads, strict=True)), pack.rows, scratch)

    def token_scores(self, place: int, part: PackPart) -> Tensor:
        """[N, T]: each token's share of the score of the query at ``place``, over all layers."""
        device = part.grads[self._layers[0].name].device
        whole = torch.zeros(len(part), part.tokens, dtype=torch.float64, device=device)
        scratch = Scratch()
        for layer in self._layers:
            a, g = self._turned(part, layer.name), rotate(part.grads[layer.name], self._bases[layer.name][1])
            if isinstance(g, Routed):
                self._add_routed(whole, self._of(layer, scratch), place, a, g)
                continue
            assert isinstance(a, Tensor)
            shares = self._of(layer, scratch).token_scores(place, a, g).to(whole.device)
            if shares.shape[1] % part.tokens:  # above a classifier's pooling: the share stands where its label does
                whole[:, 0] += shares.sum(1)
            else:
                # A module called c times has c·T rows; a token's share is the sum over its calls.
                whole += shares.reshape(len(part), -1, part.tokens).sum(1)
        return whole

    def _turned(self, part: PackPart, layer: str) -> Rows:
        """a of a layer as its queries are."""
        group, q_a = self._groups[layer], self._bases[layer][0]
        found = None if q_a is None else part.turned(group, self.loaded.basis)
        return rotate(part.inputs[group], q_a) if found is None else found

    def _add_routed(self, whole: Tensor, queries: LayerQueries | WordQueries, place: int, a: Rows, g: Routed) -> None:
        """Add the shares of an expert's tokens, where they stand in their sequences."""
        assert g.places is not None, "kept without its tokens' places"
        places = g.places.split(g.sizes)
        for own, own_a, own_g in sequence_parts(a, g):
            shares = queries.token_scores(place, own_a, own_g)[0]
            real = places[own.start] >= 0
            whole[own.start, places[own.start][real].to(whole.device)] += shares[real].to(whole.device)
