"""The stateless half: a model replica that turns sequences into sums, query gradients and scores.

A plain class: the same code runs in process and as a Ray actor.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylux import fingerprints, gpu, models, profiling
from raylux.batches import Batch, TokenRow, collate, query_batches, score_batches
from raylux.capture import Capture, Captured, Labeller
from raylux.cost.sizes import captured_together
from raylux.curvature import Statistics
from raylux.engine import numerics
from raylux.engine.captures import GIVEN, CapturedSequences
from raylux.engine.estimating import EstimatedScores
from raylux.engine.fitting import Part
from raylux.engine.measuring import ProximalMeasurements
from raylux.engine.multiplying import GaussNewtonProducts
from raylux.engine.plan import Plan
from raylux.engine.projecting import ProjectedSums
from raylux.engine.records import Contraction, LoadedCurvature, numpy_array
from raylux.engine.scorer import Bases, LoadedQueries, Pack, PackPart, Scorer, packs
from raylux.engine.weighing import Curvatures, SelfInfluences
from raylux.errors import NumericsError
from raylux.fused import fuse_activations
from raylux.influence.dots import sequence_gradients
from raylux.layers import TrackedLayer, matrices
from raylux.memory import give_back_at_once
from raylux.placement import Placement
from raylux.routed import Rows
from raylux.sampling import sample_labels
from raylux.store import CorpusReader, RunFolder


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is made from: small, and readable by any process of the cluster.

    ``keep``: bytes of captured sequences that it may keep on its disk; None: by what is free there. ``statistics``: of
    the kind of curvature. ``checkpointing``: of the model's blocks. ``blocks``: in which A and S are summed.
    ``placement``: of the model's parts, where it is spread over devices.
    """

    folder: str
    files: models.ModelFiles
    plan: Plan
    layers: tuple[TrackedLayer, ...]
    groups: dict[str, str]
    seed: int
    trust_remote_code: bool = False
    keep: int | None = 0
    statistics: Statistics = "tokens"
    checkpointing: bool = False
    blocks: int = 1
    placement: Placement | None = None


@dataclass(frozen=True)
class QuerySpec:
    """A query as a worker gets it: its parts' tokens and labels, and their weights in the measurement."""

    rows: tuple[TokenRow, ...]
    weights: tuple[float, ...]


class GradientWorker(ProjectedSums, GaussNewtonProducts, ProximalMeasurements, SelfInfluences, EstimatedScores):
    """Holds a frozen model and answers for units; it keeps nothing that another worker would miss.

    What a unit needs beside the model (bases, queries) comes with the call and is read from the run folder
    where it is not yet held, so that any worker, however new, can take any unit.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.device = spec.plan.device
        self.folder = RunFolder(spec.folder)
        self.compute = torch.float64 if spec.plan.dtype == "float64" else torch.float32
        self.clock = profiling.Clock(self._synchronize if self.device == "cuda" else None)
        placed = spec.placement
        # Of each layer: where its a and g are, and with them its sums, bases and queries.
        self.devices = {layer.name: placed.runs_on(layer.name) if placed else self.device for layer in spec.layers}
        self._capture: Capture | None = None
        self._reader: CorpusReader | None = None
        self._bases = Bases(self.folder, spec.layers, spec.groups, self.devices)
        self._curvatures = Curvatures(self.folder, spec.layers, spec.groups, self.compute, self.devices, self.device)
        self._held: Scorer | None = None
        self._aimed = None
        self._objective = None
        self._routed = frozenset(layer.name for layer in spec.layers if layer.routed)
        self._kept = CapturedSequences(spec.keep, spec.layers, spec.groups, self.devices)

    def prepare(self) -> dict[str, Any]:
        """Load the model. Apart from ``__init__``, so that its errors arrive as what they are.

        Returns:
            Who answers (pid, host), ``weights``: a digest of the model's files as this node has them, and
            ``numerics``: what, beside the inputs, the bits of its results depend on.
        """
        spec = self.spec
        torch.set_num_threads(spec.plan.threads)
        if spec.placement is not None and spec.placement.reads and self.device == "cpu":
            give_back_at_once()
        with profiling.of("load"):
            files = models.on_this_node(spec.files)
            model = models.load_model(files, spec.plan.dtype, self.device, spec.trust_remote_code, spec.placement)
            fuse_activations(model)
        # A graph that keeps its blocks' inputs alone holds no weights that were read for it.
        checkpointing = spec.checkpointing or bool(spec.placement and spec.placement.reads)
        self._capture = Capture(model, spec.layers, spec.groups, checkpointing)
        return {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "weights": fingerprints.of_weights(files.folder, files.adapter),
            "numerics": numerics.here(self.device),
        }

    def timed(self, method: str, parts: bool, *args: Any) -> Any:
        """Call one of the other methods; its value, or the head of its ``parts``, comes as ``profiling.Timed``."""
        with gpu.pinned(self.device):
            return profiling.timed(self, self.clock, method, parts, args)

    @property
    def reader(self) -> CorpusReader:
        if self._reader is None:
            self._reader = CorpusReader(self.folder)
        return self._reader

    # precision

    def contraction_error(self, rows: np.ndarray, tokens: int) -> float:
        """What bf16 products do to dot products of gradients: RMS(error) / RMS over pairs of different sequences.

        Args:
            rows: corpus rows, two or more.
            tokens: of each, that are looked at (``TokenRow.part``).

        Returns:
            The error; 1 where no gradient is there to be looked at.
        """
        exact, rounded = (torch.zeros(len(rows), len(rows), dtype=torch.float64) for _ in range(2))
        held: list[tuple[dict[str, Rows], dict[str, Rows]]] = []
        for sequence in self.reader.rows(rows):
            part = sequence.part(tokens)
            captured = self._run(collate([part], [0], len(part.tokens)), sampled=False)
            held.append((captured.inputs_in(torch.float32), captured.grads))
        for layer in matrices(self.spec.layers):
            pairs = [(a[self.spec.groups[layer.name]], g[layer.name].to(torch.float32)) for a, g in held]
            for total, dtype in ((exact, torch.float32), (rounded, torch.bfloat16)):
                flat = [sequence_gradients(a.to(dtype), g.to(dtype)).flatten() for a, g in pairs]
                total += (torch.stack(flat).float() @ torch.stack(flat).float().T).double().cpu()
        others = ~torch.eye(len(rows), dtype=torch.bool)
        size = exact[others].norm()
        return float((rounded - exact)[others].norm() / size) if size > 0 else 1.0

    # queries

    def query_gradient(self, query: QuerySpec, shards: Sequence[Sequence[str]]) -> tuple[Any, ...]:
        """a and g of a query's tokens, g carrying the weights: Σ_t g_t a_tᵀ is −∇f.

        Args:
            query: its parts.
            shards: layer names of each shard.

        Returns:
            {"measurement": f}, then a part per shard with ``inputs`` [T, M] by group and ``grads`` [T, P] by layer.
        """
        (head,), *parts = self.query_gradients([query], shards)
        return (head, *(own for (own,) in parts))

    def query_gradients(
        self, queries: Sequence[QuerySpec], shards: Sequence[Sequence[str]], contraction: Contraction | None = None
    ) -> tuple[Any, ...]:
        """``query_gradient`` of several; the bits of each are those that it has by itself.

        Args:
            queries: their parts.
            shards: layer names of each shard.
            contraction: by which a and g are rounded (bf16 comes as int16); None: not at all.

        Returns:
            The head of each, then a list of their parts per shard.
        """
        rows = [row for query in queries for row in query.rows]
        found: dict[int, tuple[float, dict[str, Tensor], dict[str, Tensor]]] = {}
        for batch in query_batches(rows, self.spec.plan.query_tokens, self.spec.plan.longest):
            captured = self._run(batch, sampled=False)
            inputs, grads = self._operands(captured, contraction.torch_dtype if contraction else self.compute)
            for at, place in enumerate(batch.rows):
                own_inputs, own_grads = ({name: x[at] for name, x in side.items()} for side in (inputs, grads))
                found[place] = float(captured.loss[at]), own_inputs, own_grads
        heads, parts, start = [], [], 0
        for query in queries:
            own = [found[place] for place in range(start, start + len(query.rows))]
            start += len(query.rows)
            value = sum(weight * loss for weight, (loss, _, _) in zip(query.weights, own, strict=True))
            joined = {name: torch.cat([a[name] for _, a, _ in own]) for name in own[0][1]}
            pairs = list(zip(query.weights, own, strict=True))
            weighted = {name: torch.cat([g[name] * weight for weight, (_, _, g) in pairs]) for name in own[0][2]}
            heads.append({"measurement": -value})
            parts.append(self._token_parts(joined, weighted, shards))
        return (heads, *(list(of_shard) for of_shard in zip(*parts, strict=True)))

    def probe(self, row: int, shards: Sequence[Sequence[str]]) -> tuple[Any, ...]:
        """a and g of one corpus sequence, for measuring what compression loses; parts as ``query_gradient``."""
        (sequence,) = self.reader.rows([row])
        inputs, grads = self._widened(self._run(collate([sequence], [0], len(sequence.tokens)), sampled=False))
        own_inputs, own_grads = ({name: x[0] for name, x in rows.items()} for rows in (inputs, grads))
        return (None, *self._token_parts(own_inputs, own_grads, shards))

    def _token_parts(
        self, inputs: Mapping[str, Tensor], grads: Mapping[str, Tensor], shards: Sequence[Sequence[str]]
    ) -> list[Part]:
        groups = self.spec.groups
        return [
            {
                "inputs": {name: numpy_array(inputs[name]) for name in sorted({groups[name] for name in names})},
                "grads": {name: numpy_array(grads[name]) for name in names},
            }
            for names in shards
        ]

    # scores

    def score_unit(
        self,
        name: str,
        rows: np.ndarray,
        ids: Sequence[str],
        layers: bool,
        norms: bool,
        loaded: LoadedQueries,
        metric: LoadedCurvature | None = None,
    ) -> tuple[str, dict[str, tuple[int, str]]]:
        """Score corpus rows against queries and write the block.

        Args:
            name: the unit's, for the object's key.
            rows: [n] corpus rows.
            ids: the queries to keep, all of them loaded.
            layers: keep per-layer scores too.
            norms: keep the sequences' gradient norms (for cosines).
            loaded: the queries to run against; the same for many units.
            metric: in which these norms are taken; None: as gradients are.

        Returns:
            The key and the objects of what was written, as ``RunFolder.write``.
        """
        scorer = self._scorer(loaded)
        columns = [loaded.ids.index(query) for query in ids]
        dtype = _array(torch.zeros(0, dtype=self.compute)).dtype
        total = np.full((len(ids), len(rows)), np.nan, dtype)
        by_layer = np.full((len(ids), len(self.spec.layers), len(rows)), np.nan, dtype) if layers else None
        norm = np.full(len(rows), np.nan, dtype)
        together = fresh = 1
        if scorer.rests:
            together = scorer.together
            if self.device == "cpu":  # a GPU's queries rest in its memory
                fresh = min(together, self._captured_together(loaded.contraction.torch_dtype))
        for pack in self._packs(rows, loaded.contraction, products=together, fresh=fresh):
            places = [place for part in pack.parts for place in part.places]
            counted = torch.tensor(pack.counted, device=self.device)
            whole = torch.zeros(sum(map(len, pack.parts)), len(loaded.ids), dtype=torch.float64, device=self.device)
            for index, part in enumerate(scorer.layer_scores(pack)):
                part = part.to(self.device)
                whole += part
                if by_layer is not None:
                    by_layer[:, index, places] = _array(part[counted])[:, columns].T
            total[:, places] = _array(whole[counted])[:, columns].T
            if norms:
                with profiling.of("square"):
                    found = self.lengths(pack, metric) if metric else pack.norms(self.spec.groups)
                    norm[places] = _array(found[counted])
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
        scorer = self._scorer(loaded)
        place = loaded.ids.index(query)
        sequences = self.reader.rows(rows)
        shares: list[np.ndarray] = [np.zeros(0)] * len(rows)
        # Of an expert's tokens it is not kept where in their sequences they stand.
        for pack in self._packs(rows, loaded.contraction, kept=not self._routed):
            for part in pack.parts:
                found = _array(scorer.token_scores(place, part))
                for at, row in enumerate(part.places):
                    shares[row] = found[at, : len(sequences[row].tokens)]
        offsets = np.concatenate([[0], np.cumsum([len(share) for share in shares])]).astype(np.int64)
        tokens = np.concatenate([row.tokens for row in sequences]).astype(np.int32)
        return self.folder.write(
            f"scores/tokens/{name}", {"shares": np.concatenate(shares), "offsets": offsets, "tokens": tokens}
        )

    def _packs(
        self,
        rows: np.ndarray,
        contraction: Contraction,
        kept: bool = True,
        wanted: Collection[str] | None = None,
        products: int = 1,
        fresh: int = 1,
    ) -> Iterator[Pack]:
        """Captured sequences, as many together as a product takes; those that are kept are not run again.

        ``wanted``: names of the layers that are captured; default: all. ``products``: of the sequences that are kept,
        as many together as so many products take; ``fresh``: likewise of the others.
        """
        plan, dtype = self.spec.plan, contraction.torch_dtype
        sequences = self.reader.rows(rows)
        here = [at for at, row in enumerate(rows) if kept and self._kept.has(int(row), GIVEN, dtype, wanted)]
        rest = sorted(set(range(len(rows))) - set(here))

        def parts(chosen: list[int], which: str | None) -> Iterator[PackPart]:
            own = rows[chosen]
            for batch in score_batches([sequences[at] for at in chosen], plan.batch_tokens, plan.longest):
                again = partial(self._captured, batch, dtype, wanted)
                tokens = self._kept.batch(own, batch, which, dtype, wanted, again) if which else None
                places, count = tuple(chosen[at] for at in batch.rows), len(batch.mask)
                if tokens is None:
                    yield PackPart(places, count, batch.mask.shape[1], *again())
                    continue
                turned = partial(self._kept.turned, own, batch, dtype)
                yield PackPart(places, count, batch.mask.shape[1], *tokens, turned)

        yield from packs(parts(here, GIVEN), plan.rows, products)
        yield from packs(parts(rest, None), plan.rows, fresh)

    def _captured_together(self, dtype: torch.dtype, lent: bool = False, read: float = 0.0) -> int:
        spec, itemsize = self.spec, torch.empty(0, dtype=dtype).element_size()
        shape = spec.plan.longest, spec.plan.rows, itemsize
        return captured_together(matrices(spec.layers), spec.groups, *shape, lent, read)

    def _captured(
        self, batch: Batch, dtype: torch.dtype, wanted: Collection[str] | None
    ) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """a and g of a batch on its own labels."""
        return self._operands(self._run(batch, sampled=False, wanted=wanted), dtype)

    # common

    def _synchronize(self) -> None:
        placed = self.spec.placement
        for device in placed.computing if placed else ("cuda",):
            torch.cuda.synchronize(device)

    def _scorer(self, loaded: LoadedQueries) -> Scorer:
        """The s_test of every layer, read unless they are held."""
        if self._held is None or self._held.loaded != loaded:
            self._release()
            self._curvatures.drop()
            spec = self.spec
            self._held = Scorer(self.folder, spec.layers, spec.groups, spec.plan, loaded, self._bases, self.devices)
        return self._held

    def _release(self) -> None:
        """Let go of queries and bases."""
        self._held = self._aimed = self._sieve = None
        self._bases.drop()

    def _run(
        self,
        batch: Batch,
        sampled: bool | Labeller,
        both: bool = False,
        wanted: Collection[str] | None = None,
    ) -> Captured:
        assert self._capture is not None, "prepare() comes first"
        # Where the mask still is on the CPU, so that nothing is waited for; filler rows stand last and do not count.
        profiling.count(tokens=int(batch.mask[: len(batch.rows)].sum()))
        labeller = sampled if callable(sampled) else self._draw if sampled else None
        return self._capture.run(batch.to(self.device), labeller, both, wanted)

    def _draw(self, probabilities: Tensor, keys: Tensor, places: Tensor) -> Tensor:
        return sample_labels(probabilities, keys, places, self.spec.seed)

    def _operands(self, captured: Captured, dtype: torch.dtype) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """a and g in the precision of the products."""
        return captured.inputs_in(dtype), {name: g.to(dtype) for name, g in captured.grads.items()}

    def _widened(self, captured: Captured) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """a and g in the precision of the sums."""
        return self._operands(captured, self.compute)


def _array(x: Tensor) -> np.ndarray:
    return gpu.to_host(x).numpy()
