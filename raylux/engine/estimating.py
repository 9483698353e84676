"""A worker's part of two-stage scoring: estimates of all pairs, exact scores of those that may be among the best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raylux import gpu
from raylux.blocks import Rotation
from raylux.cost.two_stage import pace
from raylux.curvature import rotate
from raylux.curvature.spectral import Spectral
from raylux.engine.bars import FINE, FIRST, Bars
from raylux.engine.kept import Resting
from raylux.engine.parts import WorkerPart
from raylux.engine.records import (
    Fitted,
    read_curvature,
    read_layer_queries,
    read_rotation,
)
from raylux.engine.scorer import LoadedQueries, Pack
from raylux.errors import NumericsError
from raylux.influence.dots import wide_dtype
from raylux.influence.leading import Block, LayerEstimates, Query, principal
from raylux.influence.pairs import PairQueries
from raylux.influence.surveys import SEEN, Cut, Survey, choose
from raylux.layers import TrackedLayer
from raylux.memory import give_back
from raylux.store import RunFolder


@dataclass(frozen=True)
class Estimated:
    """How a unit's pairs are told apart.

    Attributes:
        fitted: what the fit left; its bases and Λ say which directions estimates see.
        kind: of curvature.
        sequences: T, tokens of one on average, and the share of them that are among a query's best.
        bars: of the loaded queries, which a pair must reach to be wanted; None: all pairs are.
    """

    fitted: Fitted
    kind: str
    sequences: tuple[float, float]
    bars: Bars | None


@dataclass(frozen=True)
class Found:
    """Estimates [rows, Q] of some sequences, float64.

    Attributes:
        values: by all that is seen where that was looked at, otherwise by what comes first.
        sizes: [rows] of the sequences, in what scores of a query vary by as Λ tells: the root mean square over queries
            of what comes first, and of what that leaves out. What an estimate errs by is in proportion to it.
        first: all of them by what comes first; None: that is all there is.
        refined: where all was looked at; None: everywhere.
    """

    values: Tensor
    sizes: Tensor
    first: Tensor | None = None
    refined: Tensor | None = None

    def arrays(self) -> dict[str, Tensor]:
        """What is written of them."""
        found = {"estimate": self.values, "first": self.first, "refined": self.refined}
        return {name: values for name, values in found.items() if values is not None}


class Sieve:
    """Queries as both stages want them.

    Attributes:
        loaded: which.
        sequences: that estimates are meant for (``Estimated``).
        seen: of each layer's gradients, by estimates.
    """

    def __init__(
        self,
        folder: RunFolder,
        layers: Sequence[TrackedLayer],
        groups: Mapping[str, str],
        loaded: LoadedQueries,
        how: Estimated,
        devices: Mapping[str, str],
    ) -> None:
        give_back()
        self.loaded, self.sequences = loaded, how.sequences
        self._layers, self._groups, self._resting = layers, groups, Resting()
        self._folder, self._devices, self._dtype = folder, devices, loaded.contraction.torch_dtype
        self._wide = wide_dtype(self._dtype)
        self._inside = bool(loaded.basis.eigen)
        self._bases: dict[str, tuple[Rotation | None, Rotation | None]] = {}
        self._blocks: dict[str, LayerEstimates] = {}
        self._pairs: dict[str, PairQueries] = {}
        cuts = self._cuts(how)
        self.seen = {name: cut.seen for name, cut in cuts.items()}
        self._by_steps = any(seen.after for seen in self.seen.values())
        for layer in layers:
            name, device, group = layer.name, devices[layer.name], groups[layer.name]
            queries = self._read(layer, loaded.ids, self._dtype)
            self._pairs[name] = PairQueries.build(layer.shape, queries, self._resting.hold)
            block = Block.of(cuts[name], self._curvature(layer, how))
            self._blocks[name] = LayerEstimates.build(block, queries, self._inside, self._resting.hold)
            self._bases[name] = read_rotation(folder, loaded.basis, name, group, self._dtype, device)
        self._variances = _sum(held.variances for held in self._blocks.values()).numpy()

    @property
    def dense_bytes(self) -> int:
        """Of the queries that are read for each company of sequences."""
        itemsize = torch.empty(0, dtype=self._dtype).element_size()
        return itemsize * sum(len(self._pairs[layer.name].dense) * layer.parameters for layer in self._layers)

    def _cuts(self, how: Estimated) -> dict[str, Cut]:
        surveys = {}
        for layer in self._layers:
            surveys[layer.name] = Survey.of(_dense(self._looked_at(layer)), self._curvature(layer, how), self._inside)
        tokens, wanted = how.sequences
        # What single pairs cost is known of CPUs.
        by_steps = all(device == "cpu" for device in self._devices.values())
        return choose(surveys, tokens, len(self.loaded.ids), wanted, pace(self.loaded.contraction.dtype), by_steps)

    def _some(self) -> list[str]:
        """The queries that are looked at beforehand, of as few files as have them."""
        own = set(self.loaded.ids)
        files = [held for file in self.loaded.files if (held := [query for query in file.queries if query in own])]
        count = -(-SEEN * len(files) // len(own))
        step = max(1, len(files) // max(count, 1))
        return [query for held in files[::step] for query in held]

    def _looked_at(self, layer: TrackedLayer) -> list[Query]:
        return self._read(layer, self._some(), self._wide)

    def _read(self, layer: TrackedLayer, ids: Sequence[str], dtype: torch.dtype) -> list[Query]:
        device = self._devices[layer.name]
        return read_layer_queries(self._folder, self.loaded.files, layer.name, ids, dtype, device)

    def _curvature(self, layer: TrackedLayer, how: Estimated) -> Spectral:
        name, device = layer.name, self._devices[layer.name]
        found = read_curvature(self._folder, how.fitted, how.kind, name, self._groups[name], self._wide, device)
        if found.values is None:
            some = self._looked_at(layer)
            return principal(lambda: _dense(some))
        return found

    def estimates(self, pack: Pack, asked: Tensor, how: Estimated) -> Found:
        """Of the pairs that are ``asked`` [rows, Q], as much as it takes to leave them out; or all there is to see."""
        tokens = self._tokens(pack, turned=False)
        formed = [(self._blocks[name], self._blocks[name].gradients(batches)) for name, batches in tokens]
        first = _sum(layer.estimates(gradients, pack.rows) for layer, gradients in formed)
        sizes = self._sizes(first)
        if not self._by_steps:
            return Found(first, sizes)
        if how.bars is None:
            rest = _sum(layer.refinements(own, None, pack.rows) for layer, own in formed)
            return Found(first + rest, sizes, first)
        left = asked & _reached(how.bars, first, sizes, FIRST)
        if not bool(left.any()):
            return Found(first, sizes, first, left)
        some = left.any(1)
        rest = _sum(layer.refinements(own[some], left[some], pack.rows) for layer, own in formed)
        values = first.clone()
        values[some] += rest
        return Found(values, sizes, first, left)

    def _sizes(self, first: Tensor) -> Tensor:
        variances, missed = self._variances.T
        weights = np.divide(1.0, variances, out=np.zeros_like(variances), where=variances > 0) / len(variances)
        # NumPy adds a row up in the same order, however many there are.
        return torch.from_numpy(np.sqrt((first.numpy() ** 2 * weights).sum(1) + float((missed * weights).sum())))

    def wanted(self, found: Found, asked: Tensor, how: Estimated) -> Tensor | None:
        """The pairs [rows, Q] of those ``asked`` that may be among their query's best; None: all."""
        if how.bars is None:
            return None
        return (asked if found.refined is None else found.refined) & _reached(how.bars, found.values, found.sizes, FINE)

    def scores(self, pack: Pack, chosen: Tensor | None) -> Tensor:
        """Exact scores [rows, Q] of the pairs that are ``chosen`` [rows, Q], or of all; float64."""
        total = torch.zeros((), dtype=torch.float64)
        if chosen is None:
            for layer, batches in self._tokens(pack):
                total = total + self._pairs[layer].scores(batches, None, pack.rows).cpu().double()
            return total
        found = torch.zeros(chosen.shape, dtype=torch.float64)
        wanted = chosen.any(1)
        if bool(wanted.any()):  # of few queries most companies have none that is
            for layer, batches in self._tokens(pack, wanted):
                here = chosen[wanted].to(batches[0][0].device)
                total = total + self._pairs[layer].scores(batches, here, pack.rows).cpu().double()
            found[wanted] = total
        return found

    def _tokens(
        self, pack: Pack, wanted: Tensor | None = None, turned: bool = True
    ) -> Iterator[tuple[str, list[tuple[Tensor, Tensor]]]]:
        """a and g of each layer, of the rows that are ``wanted``, by default of all.

        ``turned``: in the basis of its queries; otherwise in the standard one.
        """
        sizes = [len(part) for part in pack.parts]
        rows = [slice(None)] * len(sizes) if wanted is None else wanted.split(sizes)
        for layer in self._layers:
            q_a, q_s = self._bases[layer.name] if turned else (None, None)
            batches = []
            for part, own in zip(pack.parts, rows, strict=True):
                if isinstance(own, Tensor) and not bool(own.any()):
                    continue
                a, g = part.inputs[self._groups[layer.name]], part.grads[layer.name]
                assert isinstance(a, Tensor) and isinstance(g, Tensor), "experts are refused"
                batches.append((_rows(a, own, q_a), _rows(g, own, q_s)))
            yield layer.name, batches


def _sum(of_layers: Iterable[Tensor]) -> Tensor:
    """In float64, on the host."""
    return sum((own.cpu().double() for own in of_layers), torch.zeros((), dtype=torch.float64))


def _reached(bars: Bars, values: Tensor, sizes: Tensor, step: int) -> Tensor:
    """[rows, Q] of values [rows, Q]."""
    return torch.from_numpy(bars.reached(values.T.numpy(), sizes.numpy(), step).T)


def _rows(x: Tensor, own: Tensor | slice, basis: Rotation | None) -> Tensor:
    found = rotate(x if isinstance(own, slice) or bool(own.all()) else x[own.to(x.device)], basis)
    assert isinstance(found, Tensor)
    return found


def _dense(queries: Sequence[Query]) -> Iterator[Tensor]:
    return (x if isinstance(x, Tensor) else x[0] @ x[1].T for x in queries)


class EstimatedScores(WorkerPart):
    """Scores of units in two stages."""

    _sieve: Sieve | None = None

    def estimated_unit(
        self,
        name: str,
        rows: np.ndarray,
        ids: Sequence[str],
        loaded: LoadedQueries,
        how: Estimated,
        chosen: np.ndarray | None = None,
    ) -> tuple[str, dict[str, tuple[int, str]]]:
        """Write ``total`` [Q, n], NaN where a pair is not exactly scored, ``estimate`` [Q, n], ``size`` [n].

        Where estimates come in two steps, the pilot has ``first`` [Q, n] as well, and other units have ``refined``,
        bits of the pairs whose estimate is by all that is seen, and ``opening``, what came first of the pairs that are
        scored, one after another. ``limits`` and ``rooms`` [Q, 2] are the bars that these have reached.

        Args:
            name: the unit's, for the object's key.
            rows: [n] corpus rows.
            ids: the queries to keep, all of them loaded.
            loaded: the queries to run against; the same for many units.
            how: pairs are told apart.
            chosen: [Q, n] bool, pairs that were told apart before: they are scored, and nothing is estimated.

        Returns:
            The key and the objects of what was written, as ``RunFolder.write``.

        Raises:
            NumericsError: NaN or infinity among scores or estimates.
        """
        sieve = self._sieve_of(loaded, how)
        columns = torch.tensor([loaded.ids.index(query) for query in ids])
        kind = np.float64 if self.compute == torch.float64 else np.float32
        arrays: dict[str, np.ndarray] = {"total": np.full((len(ids), len(rows)), np.nan, kind)}
        # Dense queries are read for each such company.
        together = self._captured_together(loaded.contraction.torch_dtype, self.device != "cpu", sieve.dense_bytes)
        for pack in self._packs(rows, loaded.contraction, products=together, fresh=together):
            places = [place for part in pack.parts for place in part.places]
            counted = torch.tensor(pack.counted)
            asked = torch.zeros(sum(map(len, pack.parts)), len(loaded.ids), dtype=torch.bool)
            asked[counted[:, None], columns] = True if chosen is None else torch.from_numpy(chosen[:, places].T.copy())
            wanted: Tensor | None = asked
            if chosen is None:
                found = sieve.estimates(pack, asked, how)
                arrays.setdefault("size", np.full(len(rows), np.nan, kind))[places] = found.sizes[counted].numpy()
                for what, values in found.arrays().items():
                    own = _kept(values, counted, columns)
                    arrays.setdefault(what, _nothing((len(ids), len(rows)), own))[:, places] = own
                wanted = sieve.wanted(found, asked, how)
            exact = sieve.scores(pack, wanted)
            if wanted is not None:
                exact = torch.where(wanted, exact, torch.nan)
                bad = wanted & ~exact.isfinite()
            else:
                bad = ~exact.isfinite()
            if bool(bad[counted].any()):
                raise NumericsError(f"score unit {name}: NaN or infinity in the scores")
            arrays["total"][:, places] = _kept(exact, counted, columns)
        if "refined" in arrays:
            arrays["opening"] = arrays.pop("first")[~np.isnan(arrays["total"])]
        if not all(np.isfinite(array).all() for what, array in arrays.items() if what != "total"):
            raise NumericsError(f"score unit {name}: NaN or infinity in the estimated scores")
        if chosen is None and how.bars is not None:
            arrays |= {"limits": how.bars.limits[columns], "rooms": how.bars.rooms[columns]}
        seen = {layer: (own.rows, own.columns, own.first) for layer, own in sieve.seen.items()}
        return self.folder.write(
            f"scores/{name}", {what: _stored(x, kind) for what, x in arrays.items()}, {"seen": seen}
        )

    def _sieve_of(self, loaded: LoadedQueries, how: Estimated) -> Sieve:
        if self._sieve is None or self._sieve.loaded != loaded or self._sieve.sequences != how.sequences:
            self._release()
            spec = self.spec
            self._sieve = Sieve(self.folder, spec.layers, spec.groups, loaded, how, self.devices)
        return self._sieve


def _nothing(shape: tuple[int, int], like: np.ndarray) -> np.ndarray:
    return np.full(shape, False if like.dtype == bool else np.nan, like.dtype)


def _stored(x: np.ndarray, kind: type) -> np.ndarray:
    """Bits of what is true or false, numbers of one kind."""
    return np.packbits(x, 1) if x.dtype == bool else x.astype(kind)


def _kept(x: Tensor, counted: Tensor, columns: Tensor) -> np.ndarray:
    """[Q, n] of [rows, Q]: the sequences that count and the queries that are kept."""
    return gpu.to_host(x[counted][:, columns].T).numpy()
