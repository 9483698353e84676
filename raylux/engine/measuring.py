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
from raylux.layers import TrackedLayer

# Memory for the gradients that choose the coordinates of a search.
_DRAWN_BYTES = 1 << 30
_FEWEST_DRAWS, _MOST_DRAWS = 64, 4096


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


def draws(layers: Sequence[TrackedLayer]) -> int:
    """Sampled gradients that choose a search's coordinates: more than there are weights, where memory allows."""
    size = sum(layer.parameters for layer in layers)
    return max(_FEWEST_DRAWS, min(size + size // 2, _MOST_DRAWS, _DRAWN_BYTES // (8 * size)))


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
            count = draws(spec.layers)
            self._check_memory(models.logit_width(model), rows, count)
            made = ProximalObjective(
                model, spec.layers, rows, asked.damping, batch_tokens=spec.plan.batch_tokens, draws=count
            )
            self._objective = asked.name, made
        return self._objective[1]

    def _check_memory(self, vocabulary: int, rows: Sequence[TokenRow], count: int) -> None:
        labelled = sum(int((np.asarray(row.labels) >= 0).sum()) for row in rows)
        size = sum(layer.parameters for layer in self.spec.layers)
        # Log-probabilities of the training set, the drawn gradients with their basis, and the search's history.
        need = 8 * (labelled * vocabulary + 2 * count * size + 200 * size)
        have = psutil.virtual_memory().available
        if self.device == "cpu" and need > have:
            raise UserError(
                f"verify: the log-probabilities of {len(rows):,} sequences and the search take {need / 1e9:,.1f} GB, "
                f"{have / 1e9:,.1f} GB are free; take fewer with --sequences, or track fewer layers"
            )
