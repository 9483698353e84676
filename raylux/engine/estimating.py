"""A worker's part of two-stage scoring: estimates of all pairs, exact scores of those that may be among the best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raylux import gpu
from raylux.blocks import Rotation
from raylux.curvature import rotate
from raylux.curvature.spectral import Spectral
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
from raylux.influence.leading import SEEN, Block, Cut, LayerEstimates, Query, Survey, choose, principal
from raylux.influence.pairs import PairQueries
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
        thresholds: of each loaded query, below which its pairs are not wanted; None: all pairs are.
        margin: standard errors of an estimate that a pair may lie below its threshold.
    """

    fitted: Fitted
    kind: str
    sequences: tuple[float, float]
    thresholds: tuple[float, ...] | None
    margin: float


class Sieve:
    """Queries as both stages want them.

    Attributes:
        loaded: which.
        sequences: that estimates are meant for (``Estimated``).
        seen: (r, c) of each layer, rows and columns of its gradients that estimates see.
        errors: [Q] standard errors of a query's estimates, over all layers.
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
        self._inside = bool(loaded.basis.eigen)
        self._bases: dict[str, tuple[Rotation | None, Rotation | None]] = {}
        self._blocks: dict[str, LayerEstimates] = {}
        self._pairs: dict[str, PairQueries] = {}
        cuts = self._cuts(how)
        self.seen = {name: cut.shape for name, cut in cuts.items()}
        for layer in layers:
            name, device, group = layer.name, devices[layer.name], groups[layer.name]
            queries = self._read(layer, loaded.ids)
            self._pairs[name] = PairQueries.build(layer.shape, queries, self._resting.hold)
            block = Block.of(cuts[name], self._curvature(layer, how))
            self._blocks[name] = LayerEstimates.build(block, queries, self._inside, self._resting.hold)
            self._bases[name] = read_rotation(folder, loaded.basis, name, group, self._dtype, device)
        variances = [held.missed.cpu().double() for held in self._blocks.values()]
        self.errors = torch.stack(variances).sum(0).sqrt()

    def _cuts(self, how: Estimated) -> dict[str, Cut]:
        surveys = {}
        for layer in self._layers:
            surveys[layer.name] = Survey.of(_dense(self._looked_at(layer)), self._curvature(layer, how), self._inside)
        tokens, wanted = how.sequences
        return choose(surveys, tokens, len(self.loaded.ids), wanted)

    def _some(self) -> list[str]:
        """The queries that are looked at beforehand, of as few files as have them."""
        own = set(self.loaded.ids)
        files = [held for file in self.loaded.files if (held := [query for query in file.queries if query in own])]
        count = -(-SEEN * len(files) // len(own))
        step = max(1, len(files) // max(count, 1))
        return [query for held in files[::step] for query in held]

    def _looked_at(self, layer: TrackedLayer) -> list[Query]:
        return self._read(layer, self._some())

    def _read(self, layer: TrackedLayer, ids: Sequence[str]) -> list[Query]:
        device = self._devices[layer.name]
        return read_layer_queries(self._folder, self.loaded.files, layer.name, ids, self._dtype, device)

    def _curvature(self, layer: TrackedLayer, how: Estimated) -> Spectral:
        name, device = layer.name, self._devices[layer.name]
        found = read_curvature(self._folder, how.fitted, how.kind, name, self._groups[name], self._dtype, device)
        if found.values is None:
            some = self._looked_at(layer)
            return principal(lambda: _dense(some))
        return found

    def estimates(self, pack: Pack) -> Tensor:
        """Estimated scores [rows, Q] over all layers, float64."""
        total = torch.zeros((), dtype=torch.float64)
        for layer, batches in self._tokens(pack, turned=False):
            total = total + self._blocks[layer].estimates(batches, pack.rows).cpu().double()
        return total

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
        """Write ``total`` [Q, n], NaN where a pair is not exactly scored, ``estimate`` [Q, n], ``error`` [Q, 1].

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
        arrays = {what: np.full((len(ids), len(rows)), np.nan, kind) for what in ("total", "estimate")}
        arrays["error"] = sieve.errors[columns, None].numpy().astype(kind)
        # Queries are read for each such company.
        fresh = self._captured_together(loaded.contraction.torch_dtype, lent=self.device != "cpu")
        for pack in self._packs(rows, loaded.contraction, fresh=fresh):
            places = [place for part in pack.parts for place in part.places]
            counted = torch.tensor(pack.counted)
            if chosen is None:
                estimate = sieve.estimates(pack)
                arrays["estimate"][:, places] = _kept(estimate, counted, columns)
                wanted = self._wanted(estimate, sieve.errors, how, counted, columns)
            else:
                wanted = torch.zeros(sum(map(len, pack.parts)), len(loaded.ids), dtype=torch.bool)
                wanted[counted[:, None], columns] = torch.from_numpy(chosen[:, places].T.copy())
            exact = sieve.scores(pack, wanted)
            if wanted is not None:
                exact = torch.where(wanted, exact, torch.nan)
                bad = wanted & ~exact.isfinite()
            else:
                bad = ~exact.isfinite()
            if bool(bad[counted].any()):
                raise NumericsError(f"score unit {name}: NaN or infinity in the scores")
            arrays["total"][:, places] = _kept(exact, counted, columns)
        if chosen is not None:
            arrays = {"total": arrays["total"]}
        elif not (np.isfinite(arrays["estimate"]).all() and np.isfinite(arrays["error"]).all()):
            raise NumericsError(f"score unit {name}: NaN or infinity in the estimated scores")
        return self.folder.write(f"scores/{name}", arrays, {"seen": sieve.seen})

    @staticmethod
    def _wanted(estimate: Tensor, error: Tensor, how: Estimated, counted: Tensor, columns: Tensor) -> Tensor | None:
        """The pairs [rows, Q] that may reach their query's threshold; None: all."""
        if how.thresholds is None:
            return None
        reach = estimate + how.margin * error >= torch.tensor(how.thresholds, dtype=torch.float64)
        found = torch.zeros_like(reach)
        found[counted[:, None], columns] = reach[counted[:, None], columns]
        return found

    def _sieve_of(self, loaded: LoadedQueries, how: Estimated) -> Sieve:
        if self._sieve is None or self._sieve.loaded != loaded or self._sieve.sequences != how.sequences:
            self._release()
            spec = self.spec
            self._sieve = Sieve(self.folder, spec.layers, spec.groups, loaded, how, self.devices)
        return self._sieve


def _kept(x: Tensor, counted: Tensor, columns: Tensor) -> np.ndarray:
    """[Q, n] of [rows, Q]: the sequences that count and the queries that are kept."""
    return gpu.to_host(x[counted][:, columns].T).numpy()
