"""A gradient worker's part of verifying: measured effects of training sequences, at the proximal optimum in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from raylux import models, profiling
from raylux.batches import TokenRow
from raylux.engine.parts import WorkerPart
from raylux.errors import UserError
from raylux.evaluate import ProximalObjective, Questions, measure
from raylux.evaluate.exact import exact_norms
from raylux.evaluate.proximal import draws_for, memory_of


@dataclass(frozen=True)
class Measuring:
    """What a run's measurements have in common.

    Attributes:
        name: tells it from any other.
        rows: corpus rows that stand for the training set.
        damping: layer -> λ.
        parts: rows of tokens of each query.
        weights: of each part in the query's measurement.
        copies: doses.
        train_size: N.
        iterations: of a search, at most.
    """

    name: str
    rows: np.ndarray
    damping: Mapping[str, float]
    parts: tuple[tuple[TokenRow, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    copies: tuple[float, ...]
    train_size: int
    iterations: int


class ProximalMeasurements(WorkerPart):
    """Measurements at the proximal optimum."""

    _objective: tuple[str, ProximalObjective] | None

    def measure_unit(self, asked: Measuring, row: int) -> dict[str, Any]:
        """Change of every query's measurement by each dose of one corpus row.

        Returns:
            ``change`` and ``noise`` as lists [doses][Q] in nats, and ``evaluations`` of the objective.

        Raises:
            UserError: there is not enough memory.
        """
        with profiling.of("solve"):
            objective = self._proximal(asked)
            (sequence,) = self.reader.rows([row])
            questions = Questions(asked.parts, asked.weights)
            found = measure(objective, sequence, questions, asked.copies, asked.train_size, asked.iterations)
        return {"change": found.change.tolist(), "noise": found.noise.tolist(), "evaluations": found.evaluations}

    def _proximal(self, asked: Measuring) -> ProximalObjective:
        """The objective, made once: all units of a command share it."""
        if self._objective is None or self._objective[0] != asked.name:
            self._objective = None
            spec = self.spec
            rows = self.reader.rows(asked.rows)
            model = models.load_model(models.on_this_node(spec.files), "float64", self.device, spec.trust_remote_code)
            exact_norms(model)
            count = draws_for(spec.layers)
            self._check_memory(models.logit_width(model), rows, count)
            made = ProximalObjective(
                model, spec.layers, rows, asked.damping, batch_tokens=spec.plan.batch_tokens, draws=count
            )
            self._objective = asked.name, made
        return self._objective[1]

    def _check_memory(self, vocabulary: int, rows: Sequence[TokenRow], count: int) -> None:
        need = memory_of(rows, vocabulary, self.spec.layers, count)
        have = psutil.virtual_memory().available
        if self.device == "cpu" and need > have:
            raise UserError(
                f"verify: the log-probabilities of {len(rows):,} sequences and the search take {need / 1e9:,.1f} GB, "
                f"{have / 1e9:,.1f} GB are free; take fewer with --sequences, or track fewer layers"
            )
