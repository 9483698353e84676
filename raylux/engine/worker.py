"""The stateless half: a model replica that turns sequences into sums, query gradients and scores.

A plain class: the same code runs in process and as a Ray actor.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylux import fingerprints, models, profiling
from raylux.batches import Batch, TokenRow, collate, fit_batches, score_batches
from raylux.capture import Capture, Captured
from raylux.curvature import Covariances, add_second_moment
from raylux.engine import numerics
from raylux.engine.plan import Plan
from raylux.engine.records import FactorFiles, QueryFiles, read_basis, read_layer_queries
from raylux.errors import NumericsError
from raylux.influence.dots import LayerQueries, squared_norms
from raylux.layers import TrackedLayer
from raylux.sampling import sample_labels
from raylux.store import CorpusReader, RunFolder


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is made from: small, and readable by any process of the cluster."""

    folder: str
    files: models.ModelFiles
    plan: Plan
    layers: tuple[TrackedLayer, ...]
    groups: dict[str, str]
    seed: int
    trust_remote_code: bool = False


@dataclass(frozen=True)
class LoadedQueries:
    """Preconditioned queries that a worker is to hold: where they are, and the ids wanted."""

    files: tuple[QueryFiles, ...]
    ids: tuple[str, ...]


@dataclass(frozen=True)
class QuerySpec:
    """A query as a worker gets it: its parts' tokens and labels, and their weights in the measurement."""

    rows: tuple[TokenRow, ...]
    weights: tuple[float, ...]


Part = dict[str, Any]
"""What goes to one shard: arrays by layer, and counts."""


class GradientWorker:
    """Holds a frozen model and answers for units; it keeps nothing that another worker would miss.

    What a unit needs beside the model (bases, queries) comes with the call and is read from the run folder
    where it is not yet held, so that any worker, however new, can take any unit.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.device = spec.plan.device
        self.folder = RunFolder(spec.folder)
        self.compute = torch.float64 if spec.plan.dtype == "float64" else torch.float32
        self.clock = profiling.Clock(torch.cuda.synchronize if self.device == "cuda" else None)
        self._capture: Capture | None = None
        self._reader: CorpusReader | None = None
        self._bases: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self._bases_of: FactorFiles | None = None
        self._queries: dict[str, LayerQueries] = {}
        self._queries_of: LoadedQueries | None = None

    def prepare(self) -> dict[str, Any]:
        """Load the model. Apart from ``__init__``, so that its errors arrive as what they are.

        Returns:
            Who answers (pid, host), ``weights``: a digest of the model's files as this node has them, and
            ``numerics``: what, beside the inputs, the bits of its results depend on.
        """
        spec = self.spec
        torch.set_num_threads(spec.plan.threads)
        with profiling.of("load"):
            model = models.load_model(spec.files, spec.plan.dtype, self.device, spec.trust_remote_code)
        self._capture = Capture(model, spec.layers, spec.groups)
        return {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "weights": fingerprints.of_weights(spec.files.folder),
            "numerics": numerics.here(self.device),
        }

    def timed(self, method: str, parts: bool, *args: Any) -> Any:
        """Call one of the other methods; its value, or the head of its ``parts``, comes as ``profiling.Timed``."""
        return profiling.timed(self, self.clock, method, parts, args)

    @property
    def reader(self) -> CorpusReader:
        if self._reader is None:
            self._reader = CorpusReader(self.folder)
        return self._reader

    # fit

    def covariance_unit(self, rows: np.ndarray, shards: Sequence[Sequence[str]], sampled: bool) -> tuple[Any, ...]:
        """Sums of a aᵀ and g gᵀ of a fit unit.

        Returns:
            The labels the gradients were taken on (flat, in the order of ``rows``), then a part per shard.
        """
        sums = Covariances()
        sequences = self.reader.rows(rows)
        labels: list[np.ndarray] = [np.zeros(0, np.int32)] * len(sequences)
        for batch in fit_batches(sequences, self.spec.plan.batch_tokens):
            captured = self._run(batch, sampled)
            inputs, grads = self._widened(captured)
            with profiling.of("covariance"):
                sums.add(inputs, grads, batch.mask.to(self.device))
            drawn = captured.labels.cpu().numpy()
            for place, row in enumerate(batch.rows):
                labels[row] = drawn[place, : len(sequences[row].tokens)].astype(np.int32)
        arrays = {name: _array(x) for name, x in sums.inputs.items()}, {n: _array(x) for n, x in sums.grads.items()}
        parts = [
            {
                "inputs": {name: arrays[0][name] for name in names if name in arrays[0]},
                "grads": {name: arrays[1][name] for name in names},
                "rows": {name: sums.rows[name] for name in names},
                "sequences": sums.sequences,
            }
            for names in shards
        ]
        return (np.concatenate(labels), *parts)

    def moment_unit(
        self,
        rows: np.ndarray,
        labels: np.ndarray | None,
        shards: Sequence[Sequence[str]],
        sampled: bool,
        files: FactorFiles,
    ) -> tuple[Any, ...]:
        """Sums of squared per-sequence gradients in the eigenbasis of a fit unit.

        Args:
            rows: corpus rows of the unit.
            labels: flat labels drawn in the covariance pass, or None to draw (or read) them now.
            shards: layer names of each shard.
            sampled: draw labels, where none are given.
            files: the eigenbases; empty: the standard basis.
        """
        self._hold_bases(files)
        sequences = self.reader.rows(rows)
        if labels is not None:
            ends = np.cumsum([len(row.tokens) for row in sequences])
            drawn = np.split(labels, ends[:-1])
            sequences = [TokenRow(row.tokens, new, row.key) for row, new in zip(sequences, drawn, strict=True)]
        totals = {
            layer.name: torch.zeros(layer.shape, dtype=self.compute, device=self.device) for layer in self.spec.layers
        }
        for batch in fit_batches(sequences, self.spec.plan.batch_tokens):
            inputs, grads = self._widened(self._run(batch, sampled and labels is None))
            for name, g in grads.items():
                add_second_moment(totals[name], inputs[self.spec.groups[name]], g, *self._bases[name])
        parts = [
            {"moments": {name: _array(totals[name]) for name in names}, "sequences": len(sequences)} for names in shards
        ]
        return (len(sequences), *parts)

    # queries

    def query_gradient(self, query: QuerySpec, shards: Sequence[Sequence[str]]) -> tuple[Any, ...]:
        """a and g of a query's tokens, g carrying the weights: Σ_t g_t a_tᵀ is −∇f.

        Returns:
            {"measurement": f, "norm": ‖∇f‖ over the tracked layers}, then a part per shard with ``inputs``
            [T, M] by group and ``grads`` [T, P] by layer.
        """
        inputs: dict[str, list[Tensor]] = {}
        grads: dict[str, list[Tensor]] = {}
        value = 0.0
        for row, weight in zip(query.rows, query.weights, strict=True):
            captured = self._run(collate([row], [0], len(row.tokens)), sampled=False)
            part_inputs, part_grads = self._widened(captured)
            for name, a in part_inputs.items():
                inputs.setdefault(name, []).append(a)
            for name, g in part_grads.items():
                grads.setdefault(name, []).append(g * weight)
            value -= weight * float(captured.loss[0])
        joined = {name: torch.cat(parts, 1) for name, parts in inputs.items()}
        weighted = {name: torch.cat(parts, 1) for name, parts in grads.items()}
        with profiling.of("square"):
            norm = float(squared_norms(joined, weighted, self.spec.groups).sqrt())
        head = {"measurement": value, "norm": norm}
        return (head, *self._token_parts(joined, weighted, shards))

    def probe(self, row: int, shards: Sequence[Sequence[str]]) -> tuple[Any, ...]:
        """a and g of one corpus sequence, for measuring what compression loses; parts as ``query_gradient``."""
        (sequence,) = self.reader.rows([row])
        inputs, grads = self._widened(self._run(collate([sequence], [0], len(sequence.tokens)), sampled=False))
        return (None, *self._token_parts(inputs, grads, shards))

    def _token_parts(
        self, inputs: Mapping[str, Tensor], grads: Mapping[str, Tensor], shards: Sequence[Sequence[str]]
    ) -> list[Part]:
        groups = self.spec.groups
        return [
            {
                "inputs": {name: _array(inputs[name][0]) for name in sorted({groups[name] for name in names})},
                "grads": {name: _array(grads[name][0]) for name in names},
            }
            for names in shards
        ]

    # scores

    def score_unit(
        self, name: str, rows: np.ndarray, ids: Sequence[str], layers: bool, norms: bool, loaded: LoadedQueries
    ) -> tuple[str, dict[str, tuple[int, str]]]:
        """Score corpus rows against queries and write the block.

        Args:
            name: the unit's, for the object's key.
            rows: [n] corpus rows.
            ids: the queries to keep, all of them loaded.
            layers: keep per-layer scores too.
            norms: keep the sequences' gradient norms (for cosine).
            loaded: the queries to run against; the same for many units.

        Returns:
            The key and the objects of what was written, as ``RunFolder.write``.
        """
        self._hold_queries(loaded)
        columns = [loaded.ids.index(query) for query in ids]
        dtype = _array(torch.zeros(0, dtype=self.compute)).dtype
        total = np.full((len(ids), len(rows)), np.nan, dtype)
        by_layer = np.full((len(ids), len(self.spec.layers), len(rows)), np.nan, dtype) if layers else None
        norm = np.full(len(rows), np.nan, dtype)
        for batch, inputs, grads in self._batches(rows):
            places, count = list(batch.rows), len(batch.rows)
            whole = torch.zeros(len(batch.mask), len(loaded.ids), dtype=torch.float64, device=self.device)
            for index, layer in enumerate(self.spec.layers):
                part = self._queries[layer.name].scores(inputs[self.spec.groups[layer.name]], grads[layer.name])
                whole += part
                if by_layer is not None:
                    by_layer[:, index, places] = _array(part)[:count, columns].T
            total[:, places] = _array(whole)[:count, columns].T
            if norms:
                with profiling.of("square"):
                    norm[places] = _array(squared_norms(inputs, grads, self.spec.groups).sqrt())[:count]
        if not np.isfinite(total).all():
            bad = rows[~np.isfinite(total).all(0)]
            raise NumericsError(f"score unit {name}: NaN or infinity in the scores of corpus rows {bad[:5].tolist()}")
        arrays = {"total": total}
        if by_layer is not None:
            arrays["layers"] = by_layer
        if norms:
            arrays["norms"] = norm
        return self.folder.write(f"scores/{name}", arrays)

    def token_unit(
        self, name: str, rows: np.ndarray, query: str, loaded: LoadedQueries
    ) -> tuple[str, dict[str, tuple[int, str]]]:
        """Per-token scores of corpus rows for one query, written flat with offsets."""
        self._hold_queries(loaded)
        place = loaded.ids.index(query)
        sequences = self.reader.rows(rows)
        shares: list[np.ndarray] = [np.zeros(0)] * len(rows)
        for batch, inputs, grads in self._batches(rows):
            whole = torch.zeros(batch.mask.shape, dtype=torch.float64, device=self.device)
            for layer in self.spec.layers:
                part = self._queries[layer.name].token_scores(
                    place, inputs[self.spec.groups[layer.name]], grads[layer.name]
                )
                # A module called c times has c·T rows; a token's share is the sum over its calls.
                whole += part.reshape(len(part), -1, batch.mask.shape[1]).sum(1)
            found = _array(whole)
            for at, row in enumerate(batch.rows):
                shares[row] = found[at, : len(sequences[row].tokens)]
        offsets = np.concatenate([[0], np.cumsum([len(share) for share in shares])]).astype(np.int64)
        tokens = np.concatenate([row.tokens for row in sequences]).astype(np.int32)
        return self.folder.write(
            f"scores/tokens/{name}", {"shares": np.concatenate(shares), "offsets": offsets, "tokens": tokens}
        )

    def _batches(self, rows: np.ndarray) -> Any:
        for batch in score_batches(self.reader.rows(rows), self.spec.plan.batch_tokens, self.spec.plan.longest):
            inputs, grads = self._widened(self._run(batch, sampled=False))
            yield batch, inputs, grads

    # common

    def _hold_bases(self, files: FactorFiles) -> None:
        """Q_A and Q_S of every layer, read unless they are held."""
        if self._bases_of == files:
            return
        spec = self.spec
        self._bases = {
            layer.name: read_basis(
                self.folder, files, layer.name, spec.groups[layer.name], self.compute, self.device
            )
            for layer in spec.layers
        }  # fmt: skip
        self._bases_of = files

    def _hold_queries(self, loaded: LoadedQueries) -> None:
        """The s_test of every layer, read unless they are held."""
        if self._queries_of == loaded:
            return
        self._queries, self._queries_of, self._bases, self._bases_of = {}, None, {}, None
        self._queries = {
            layer.name: LayerQueries.build(
                layer.shape,
                read_layer_queries(self.folder, loaded.files, layer, loaded.ids, self.compute, self.device),
                self.spec.plan.typical_tokens,
            )
            for layer in self.spec.layers
        }
        self._queries_of = loaded

    def _run(self, batch: Batch, sampled: bool) -> Captured:
        assert self._capture is not None, "prepare() comes first"
        # Where the mask still is on the CPU, so that nothing is waited for; filler rows stand last and do not count.
        profiling.count(tokens=int(batch.mask[: len(batch.rows)].sum()))
        seed = self.spec.seed
        labeller = (lambda logits, keys, places: sample_labels(logits, keys, places, seed)) if sampled else None
        return self._capture.run(batch.to(self.device), labeller)

    def _widened(self, captured: Captured) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """a and g in the precision of the sums."""
        return (
            {name: a.to(self.compute) for name, a in captured.inputs.items()},
            {name: g.to(self.compute) for name, g in captured.grads.items()},
        )


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
