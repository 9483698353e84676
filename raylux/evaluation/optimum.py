"""What a sequence's removal does at the proximal Bregman optimum: a task of its own for each, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import psutil
from torch import nn

from raylux import fingerprints, models
from raylux.batches import TokenRow
from raylux.errors import NumericsError, UserError
from raylux.evaluate import ProximalObjective, Questions, measure
from raylux.evaluate.exact import exact_norms
from raylux.evaluate.proximal import draws_for, memory_of
from raylux.layers import TrackedLayer, coverage

# Of L-BFGS, for each of the two searches of a sequence.
_ITERATIONS = 200
# With G, of the exact solve of the linearised objective, and the error at which it ends.
_PRODUCTS, _ERROR = 200, 1e-4


@dataclass(frozen=True)
class Removing:
    """What all removals have in common.

    Attributes:
        files: of the scored model.
        trusted: whether code that ships with the model may run.
        device: cpu or cuda.
        damping: λ of each tracked layer, per sequence.
        train_size: N.
        rows: the corpus, which stands for the training set.
        parts: rows of tokens of each query.
        weights: of each part in the query's measurement.
        name: tells all of this from anything else.
    """

    files: models.ModelFiles
    trusted: bool
    device: str
    damping: Mapping[str, float]
    train_size: int
    rows: tuple[TokenRow, ...]
    parts: tuple[tuple[TokenRow, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    name: str = ""

    def fingerprint(self) -> dict[str, str]:
        """What answers go by, but for texts, questions and what is left out."""
        return {
            "model": fingerprints.of_weights(self.files.folder, self.files.adapter),
            "damping": damping_print(self.damping),
            "numbers": f"{self.train_size} {_ITERATIONS} {_PRODUCTS} {_ERROR} {self.device}",
        }


@dataclass(frozen=True)
class Removed:
    """What removals do; arrays in nats.

    Attributes:
        before: [Q] f at the scored weights.
        change: [n, Q] of f, at the optimum without each sequence.
        noise: [n, Q] by how much the search and rounding leave ``change`` open.
        linear: [n, Q] change to first order, by the exact solve of the linearised objective; NaN where the solve
            did not come to its end.
    """

    before: np.ndarray
    change: np.ndarray
    noise: np.ndarray
    linear: np.ndarray

    @classmethod
    def of(cls, found: Sequence[np.ndarray]) -> Removed:
        """From what ``removed`` found of each sequence."""
        lacking = np.full_like(found[0][0], np.nan)
        whole = np.stack([one if len(one) == 4 else np.stack([*one, lacking]) for one in found])
        return cls(whole[0, 0], whole[:, 1], whole[:, 2], whole[:, 3])


def damping_print(damping: Mapping[str, float]) -> str:
    """Tells λ of the tracked layers from any others."""
    return fingerprints.digest({name: repr(value) for name, value in damping.items()})


def layers_with(model: nn.Module, damping: Mapping[str, float]) -> tuple[TrackedLayer, ...]:
    """The tracked layers of a run, by the names that have a λ."""
    return coverage(model, tuple(damping)).tracked


def removed(removing: Removing, row: int) -> np.ndarray:
    """Without one sequence of the corpus: [4, Q], the fields of ``Removed``; [3, Q] where there is no ``linear``.

    Raises:
        UserError: there is not enough memory.
        NumericsError: an objective is not finite.
    """
    objective = _objective(removing)
    questions = Questions(removing.parts, removing.weights)
    sequence = removing.rows[row]
    found = measure(objective, sequence, questions, (-1.0,), removing.train_size, _ITERATIONS)
    values = [questions.at(objective), found.change[0], found.noise[0]]
    with suppress(NumericsError):
        linear = objective.linearised(sequence, -1 / removing.train_size, _PRODUCTS, _ERROR)
        values.append(questions.slopes(objective, linear))
    return np.stack(values)


# Made once in each process: all removals share it.
_made: dict[str, ProximalObjective] = {}


def forget() -> None:
    """Give back the memory of the objective that this process holds."""
    _made.clear()


def _objective(removing: Removing) -> ProximalObjective:
    if removing.name not in _made:
        forget()
        here = models.on_this_node(removing.files)
        model = models.load_model(here, "float64", removing.device, removing.trusted)
        exact_norms(model)
        layers = layers_with(model, removing.damping)
        draws = draws_for(layers)
        _check_memory(removing, memory_of(removing.rows, models.logit_width(model), layers, draws))
        _made[removing.name] = ProximalObjective(model, layers, removing.rows, removing.damping, draws=draws)
    return _made[removing.name]


def _check_memory(removing: Removing, need: int) -> None:
    have = psutil.virtual_memory().available
    if removing.device == "cpu" and need > have:
        raise UserError(
            f"evaluate.tests: pbrf: the log-probabilities of {len(removing.rows):,} sequences and the search take "
            f"{need / 1e9:,.1f} GB, {have / 1e9:,.1f} GB are free; set corpus.limit, or track fewer layers"
        )
