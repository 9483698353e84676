"""A gradient worker's part of the fit: sums of a unit, for the layers of a pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from raylux import gpu, profiling
from raylux.batches import KEPT_PADDING, Batch, TokenRow, fit_batches, is_scored_so
from raylux.capture import Captured, Labeller
from raylux.curvature import Covariances, add_second_moments, weighted
from raylux.curvature.joint import COLUMNS
from raylux.engine.captures import FIT, CapturedSequences
from raylux.engine.parts import WorkerPart
from raylux.engine.records import Contraction, FactorFiles
from raylux.engine.scorer import Bases
from raylux.routed import Rows
from raylux.sampling import drawn_before

Part = dict[str, Any]
"""What goes to one shard: arrays by layer, and counts."""


class FitSums(WorkerPart):
    """Sums of the fit.

    The layers that are summed are those that ``shards`` names: all of the model's, or those of a layer pass.
    """

    _kept: CapturedSequences
    _bases: Bases

    @abstractmethod
    def _run(
        self,
        batch: Batch,
        sampled: bool | Labeller,
        both: bool = False,
        wanted: Collection[str] | None = None,
    ) -> Captured: ...

    @abstractmethod
    def _operands(self, captured: Captured, dtype: torch.dtype) -> tuple[dict[str, Rows], dict[str, Rows]]: ...

    def covariance_unit(
        self,
        rows: np.ndarray,
        labels: np.ndarray | None,
        shards: Sequence[Sequence[str]],
        sampled: bool,
        contraction: Contraction,
    ) -> tuple[Any, ...]:
        """Sums of a aᵀ and g gᵀ of a fit unit; what was captured is kept for the passes to come, where it fits.

        Args:
            rows: corpus rows of the unit.
            labels: flat labels drawn in an earlier pass, or None to draw (or read) them now.
            shards: layer names of each shard, those of the pass.
            sampled: draw labels, where none are given.
            contraction: how products will be taken of what is kept.

        Returns:
            The labels the gradients were taken on (flat, in the order of ``rows``), None where they were given; then
            a part per shard, its sums as triangles (``raylux.triangles``).
        """
        wanted = frozenset(name for names in shards for name in names)
        keeps = contraction.scored and self.spec.keep != 0
        sums = Covariances(blocks=self.spec.blocks)
        sequences = self.reader.rows(rows)
        unit = _Labels(sequences, labels, sampled)
        for batch in self._fit_batches(sequences):
            both = keeps and self._is_scored_so(batch)
            captured = self._run(batch, unit.labeller, both, wanted)
            inputs, grads = self._summed(captured)
            with profiling.of("covariance"):
                sums.add(*weighted(self.spec.statistics, inputs, grads, batch.mask.to(self.device)))
            if self.spec.keep != 0:
                dtype = contraction.torch_dtype
                self._keep(rows, batch, captured, self._operands(captured, dtype), dtype)
            unit.note(batch, captured)
        with profiling.of("covariance"):
            triangles = sums.triangles()
        arrays = [{name: gpu.to_host(x).numpy() for name, x in found.items()} for found in triangles]
        parts = [
            {
                "inputs": {name: arrays[0][name] for name in names if name in arrays[0]},
                "grads": {name: arrays[1][name] for name in names},
                "rows": {name: sums.rows[name] for name in names},
                "sequences": sums.sequences,
            }
            for names in shards
        ]
        return (unit.drawn(), *parts)

    def moment_unit(
        self,
        rows: np.ndarray,
        labels: np.ndarray | None,
        shards: Sequence[Sequence[str]],
        sampled: bool,
        files: FactorFiles,
        contraction: Contraction,
    ) -> tuple[Any, ...]:
        """Sums of squared per-sequence gradients in the eigenbasis of a fit unit.

        Args:
            rows: corpus rows of the unit.
            labels: flat labels drawn in an earlier pass, or None to draw (or read) them now.
            shards: layer names of each shard, those of the pass.
            sampled: draw labels, where none are given.
            files: the eigenbases; empty: the standard basis.
            contraction: how products are taken.

        Returns:
            As ``covariance_unit``.
        """
        dtype, wanted = contraction.torch_dtype, frozenset(name for names in shards for name in names)
        bases = self._bases.get(files, dtype, wanted)
        # What the pass before did not run, it did not keep either.
        keeps = bool(files.eigen) and contraction.scored and self.spec.keep != 0
        turns = self.spec.plan.query_basis == "eigen"
        sequences = self.reader.rows(rows)
        unit = _Labels(sequences, labels, sampled)
        totals = {
            layer.name: torch.zeros(layer.shape, dtype=self.compute, device=self.devices[layer.name])
            for layer in self.spec.layers
            if layer.name in wanted
        }
        for batch in self._fit_batches(sequences):
            again = partial(self._again, batch, unit.labeller, wanted, dtype)
            kept = None if labels is None else self._kept.batch(rows, batch, FIT, dtype, wanted, again)
            if kept is None:
                both = keeps and self._is_scored_so(batch)
                captured = self._run(batch, unit.labeller, both, wanted)
                kept = self._operands(captured, dtype)
                if both:
                    self._keep(rows, batch, captured, kept, dtype)
                unit.note(batch, captured)
            turned = partial(self._kept.keep_turned, rows, batch, files) if keeps and turns else None
            add_second_moments(totals, *kept, self.spec.groups, bases, turned)
        parts = [
            {"moments": {name: gpu.to_host(totals[name]).numpy() for name in names}, "sequences": len(sequences)}
            for names in shards
        ]
        return (unit.drawn(), *parts)

    def joint_unit(
        self, rows: np.ndarray, labels: np.ndarray | None, shards: Sequence[Sequence[str]], kind: str
    ) -> tuple[Any, ...]:
        """Sums of the exact matrix of a fit unit, over all tracked weights together: ``raylux.curvature.joint``.

        Args:
            rows: corpus rows of the unit.
            labels: of no use here: G is an exact mean over labels, and the Hessian of the data's own.
            shards: layer names of each shard.
            kind: of the matrix.

        Returns:
            None, then a part per shard with each layer's rows of it [P · M, D] under ``moments``.
        """
        assert self._capture is not None, "prepare() comes first"
        layers, sequences = self.spec.layers, self.reader.rows(rows)
        size = sum(layer.parameters for layer in layers)
        total = torch.zeros(size, size, dtype=self.compute, device=self.device)
        for batch in self._fit_batches(sequences):
            profiling.count(tokens=batch.tokens)
            COLUMNS[kind](self._capture, batch.to(self.device), total)
        panels = dict(zip((layer.name for layer in layers), total.split([x.parameters for x in layers]), strict=True))
        parts = [
            {"moments": {name: gpu.to_host(panels[name]).numpy() for name in names}, "sequences": len(sequences)}
            for names in shards
        ]
        return (None, *parts)

    def _again(
        self, batch: Batch, labeller: bool | Labeller, wanted: Collection[str], dtype: torch.dtype
    ) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """a and g of a batch that was kept, on the same labels."""
        return self._operands(self._run(batch, labeller, False, wanted), dtype)

    def _keep(
        self,
        rows: np.ndarray,
        batch: Batch,
        captured: Captured,
        operands: tuple[dict[str, Rows], dict[str, Rows]],
        dtype: torch.dtype,
    ) -> None:
        """Keep a and g of a batch, in the precision of the products, for the passes to come and the scores."""
        with profiling.of("keep"):
            given = {name: g.to(dtype) for name, g in captured.given.items()}
            self._kept.keep(rows, batch, *operands, given)

    def _is_scored_so(self, batch: Batch) -> bool:
        return is_scored_so(batch, self.spec.plan.batch_tokens, self.spec.plan.longest)

    def _fit_batches(self, sequences: Sequence[TokenRow]) -> list[Batch]:
        plan = self.spec.plan
        return fit_batches(sequences, plan.batch_tokens, most=plan.longest, padding=KEPT_PADDING)

    def _summed(self, captured: Captured) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """a and g as their covariances are summed: widened, but for bf16 on a GPU, which multiplies it exactly."""
        native = self.device == "cuda" and self.spec.plan.dtype == "bfloat16" and self.spec.statistics == "tokens"
        return self._operands(captured, torch.bfloat16 if native else self.compute)


class _Labels:
    """What the gradients of a unit are taken on: labels drawn in an earlier pass, or now, as its batches run.

    Args:
        sequences: of the unit.
        given: [tokens] flat, drawn before; None: there are none yet.
        sampled: draw them, where there are none; otherwise they are the data's own.
    """

    def __init__(self, sequences: Sequence[TokenRow], given: np.ndarray | None, sampled: bool) -> None:
        self._new = given is None
        self._found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(sequences)
        self.labeller: bool | Labeller = sampled
        if given is not None:
            ends = np.cumsum([len(row.tokens) for row in sequences])
            self.labeller = drawn_before([row.key for row in sequences], np.split(given, ends[:-1]))

    def note(self, batch: Batch, captured: Captured) -> None:
        """Put the labels of a batch where its sequences stand in the unit, if they are new."""
        if not self._new:
            return
        labels = captured.labels.cpu().numpy()
        lengths = batch.mask.sum(1).tolist()
        for place, row in enumerate(batch.rows):
            self._found[row] = labels[place, : lengths[place]].astype(np.int32)

    def drawn(self) -> np.ndarray | None:
        """Those that are new, flat in the order of the unit; None where they were given."""
        return np.concatenate(self._found) if self._new else None
