"""A worker's part of two-stage scoring: estimates of all pairs, exact scores of those that may be among the best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raylux import gpu
from raylux.blocks import Rotation
from raylux.cost.two_stage import DIRECTIONS
from raylux.curvature import rotate
from raylux.engine.kept import Resting
from raylux.engine.parts import WorkerPart
from raylux.engine.records import (
    Fitted,
    read_basis,
    read_layer_queries,
    read_rotation,
    tensor,
)
from raylux.engine.scorer import LoadedQueries, Pack
from raylux.errors import NumericsError
from raylux.influence.pairs import PairQueries
from raylux.influence.sketches import LayerSketch, fold
from raylux.layers import TrackedLayer
from raylux.memory import give_back
from raylux.store import RunFolder


@dataclass(frozen=True)
class Estimated:
    """How a unit's pairs are told apart.

    Attributes:
        fitted: what the fit left; its bases and Λ say which directions are balanced.
        thresholds: of each loaded query, below which its pairs are not wanted; None: all pairs are.
        margin: standard errors of an estimate that a pair may lie below its threshold.
        size: numbers of a folded gradient, about.
    """

    fitted: Fitted
    thresholds: tuple[float, ...] | None
    margin: float
    size: int


class Sieve:
    """Queries as both stages want them.

    Attributes:
        loaded: which.
        size: of folded gradients.
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
        self.loaded, self.size = loaded, how.size
        self._layers, self._groups, self._resting = layers, groups, Resting()
        dtype = loaded.contraction.torch_dtype
        self._bases: dict[str, tuple[Rotation | None, Rotation | None]] = {}
        self._sketches: dict[str, LayerSketch] = {}
        self._pairs: dict[str, PairQueries] = {}
        for layer in layers:
            name, device, group = layer.name, devices[layer.name], groups[layer.name]
            queries = read_layer_queries(folder, loaded.files, name, loaded.ids, dtype, device)
            self._pairs[name] = PairQueries.build(layer.shape, queries, self._resting.hold)
            dense = [x if isinstance(x, Tensor) else x[0] @ x[1].T for x in queries]
            leading, values = _leading(folder, how.fitted, layer, group, dtype, device, bool(loaded.basis.eigen))
            drawn = fold(name, dense, leading, values, how.size)
            self._sketches[name] = LayerSketch.build(drawn, dense, self._resting.hold)
            self._bases[name] = read_rotation(folder, loaded.basis, name, group, dtype, device)

    def estimates(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Estimated scores [rows, Q] over all layers, and their standard errors, float64."""
        total = variance = torch.zeros((), dtype=torch.float64)
        for layer, batches in self._tokens(pack):
            part, error = self._sketches[layer].estimates(batches, pack.rows)
            total, variance = total + part.cpu().double(), variance + error.cpu().double()
        return total, variance.clamp_min(0.0).sqrt()

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

    def _tokens(self, pack: Pack, wanted: Tensor | None = None) -> Iterator[tuple[str, list[tuple[Tensor, Tensor]]]]:
        """a and g of each layer, in the basis of its queries; of the rows that are ``wanted``, by default of all."""
        sizes = [len(part) for part in pack.parts]
        rows = [slice(None)] * len(sizes) if wanted is None else wanted.split(sizes)
        for layer in self._layers:
            q_a, q_s = self._bases[layer.name]
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


def _leading(
    folder: RunFolder,
    fitted: Fitted,
    layer: TrackedLayer,
    group: str,
    dtype: torch.dtype,
    device: str,
    inside: bool,
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """The directions that are balanced, of S and of A, and Λ; ``inside``: queries lie in the eigenbases already."""
    if not fitted.files.eigen or not fitted.moments:
        return None, None
    bases = read_basis(folder, fitted.files, layer.name, group, dtype, device)
    values = tensor(folder.group(fitted.moments[layer.name]).read("matrix"), dtype, device)
    found = []
    for basis, width in zip(reversed(bases), layer.shape, strict=True):
        if not isinstance(basis, Tensor):
            return None, None
        count = min(DIRECTIONS, width)
        last = torch.zeros(width, count, dtype=dtype, device=device)
        last[width - count :] = torch.eye(count, dtype=dtype, device=device)
        found.append(last if inside else basis[:, width - count :].clone())
    return (found[0], found[1]), values


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
        """Write ``total`` [Q, n], NaN where a pair is not exactly scored, ``estimate`` and its ``error`` [Q, n].

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
        arrays = {
            what: np.full((len(ids), len(rows)), np.nan, np.float64 if self.compute == torch.float64 else np.float32)
            for what in ("total", "estimate", "error")
        }
        fresh = self._captured_together(loaded.contraction.torch_dtype)  # all queries are read for each such company
        for pack in self._packs(rows, loaded.contraction, fresh=fresh):
            places = [place for part in pack.parts for place in part.places]
            counted = torch.tensor(pack.counted)
            if chosen is None:
                estimate, error = sieve.estimates(pack)
                arrays["estimate"][:, places] = _kept(estimate, counted, columns)
                arrays["error"][:, places] = _kept(error, counted, columns)
                wanted = self._wanted(estimate, error, how, counted, columns)
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
        return self.folder.write(f"scores/{name}", arrays)

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
        if self._sieve is None or self._sieve.loaded != loaded or self._sieve.size != how.size:
            self._release()
            spec = self.spec
            self._sieve = Sieve(self.folder, spec.layers, spec.groups, loaded, how, self.devices)
        return self._sieve


def _kept(x: Tensor, counted: Tensor, columns: Tensor) -> np.ndarray:
    """[Q, n] of [rows, Q]: the sequences that count and the queries that are kept."""
    return gpu.to_host(x[counted][:, columns].T).numpy()
