"""What a dose of a set does to every query: models trained with it, and the proximal optimum.

Common random numbers: a model of a dose starts at the weights of the model without it, and its batches hold the same
texts in the same order. Only the loss of the set's texts is weighted, by 1 + dose (``train_model``): a text that is
taken away has weight 0 and keeps its place. So two models differ by the dose and by nothing that is drawn.

Models are tasks of the engine, and units of a ledger: interrupted, the same call goes on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from jobs.dose.choose import Base
from jobs.dose.study import DOSES, PROXIMAL, RETRAINED, WARM, Members, Settings, Study, study_of
from raylux.demo.training import train_model
from raylux.engine.progress import Reporter
from raylux.engine.tasks import run_tasks
from raylux.evaluate import ProximalObjective, Questions, measure
from raylux.evaluate.exact import exact_norms
from raylux.layers import coverage
from raylux.store import RunFolder

# Searches for an optimum end where the gradient has fallen to these shares.
_TOLERANCES = (3e-2, 1e-2)
_ITERATIONS = 60
# Gradients that choose a search's coordinates: enough for a few tens of steps, in little memory.
_DRAWS = 512
_BATCH_TOKENS = 2048

Start = tuple[Settings, np.ndarray]
"""What all retrainings share: the study's settings, and the trained model's weights [P]."""


@dataclass(frozen=True)
class Measured:
    """What doses did.

    Attributes:
        change: way -> [doses, sets, Q] f with the dose less f without it, in nats; NaN where it was not measured.
        noise: [doses, sets, Q] nats by which the searches for the proximal optimum left ``change`` open.
        seconds: way -> CPU seconds of each of its models; proximal optimum: of each set, in all doses.
    """

    change: dict[str, np.ndarray]
    noise: np.ndarray
    seconds: dict[str, np.ndarray]


def measured(
    study: Study,
    base: Base,
    sets: Sequence[Members],
    proximal: Collection[int],
    folder: Path,
    ways: Collection[str] = tuple(DOSES),
    backend: str = "ray",
    quiet: bool = False,
) -> Measured:
    """Every set in every dose, trained from the start and trained on; some at the proximal optimum.

    Args:
        study: whose texts and queries.
        base: the model of all texts; training on begins there.
        sets: without repeats.
        proximal: places of the sets that are measured at the proximal optimum.
        folder: of the ledger.
        ways: to measure; what is left out is NaN.
        backend: as of ``run_tasks``.
        quiet: no progress on the terminal.
    """
    store = RunFolder(str(folder))
    weights = base.weights[-1]
    common: dict[str, Any] = {"reporter": Reporter(store, quiet), "backend": backend}
    change = {way: np.full((len(doses), len(sets), len(study.parts)), np.nan) for way, doses in DOSES.items()}
    noise, seconds = change[PROXIMAL].copy(), {way: np.zeros(0) for way in DOSES}
    for way in (way for way in RETRAINED if way in ways):
        jobs = {unit((), 0.0): (way, (), 0.0)}
        jobs |= {unit(own, dose): (way, own, dose) for own in sets for dose in DOSES[way]}
        found = run_tasks(store, way, retrained, (study.settings, weights), jobs, what="models", **common)
        seconds[way] = np.array([one[-1] for one in found.values()])
        for place, own in enumerate(sets):
            for at, dose in enumerate(DOSES[way]):
                change[way][at, place] = found[unit(own, dose)][:-1] - found[unit((), 0.0)][:-1]
    if PROXIMAL in ways:
        searches = {unit(sets[place]): (sets[place], base.damping) for place in proximal}
        found = run_tasks(store, PROXIMAL, optimum, (study.settings, weights), searches, what="sets", **common)
        seconds[PROXIMAL] = np.array([one[-1] for one in found.values()])
        for place in proximal:
            result = found[unit(sets[place])][:-1].reshape(2, len(DOSES[PROXIMAL]), -1)
            change[PROXIMAL][:, place], noise[:, place] = result
    return Measured(change, noise, seconds)


def unit(own: Members, dose: float | None = None) -> str:
    """The ledger's name of a set, in a dose."""
    digest = hashlib.blake2b(repr(own).encode(), digest_size=8).hexdigest()
    return digest if dose is None else f"{digest}{dose:+g}"


def retrained(start: Start, way: str, own: Members, dose: float) -> np.ndarray:
    """f of each query of a model trained with a dose of a set, and the CPU seconds that it took [Q + 1]: a task."""
    began = time.process_time()
    settings, weights = start
    study = study_of(settings)
    model = trained(study, own, dose, study.model(weights) if way == WARM else None)
    return np.append(study.drawn.logprobs(model), time.process_time() - began)


def trained(study: Study, own: Members, dose: float, start: PreTrainedModel | None = None) -> PreTrainedModel:
    """The model with a dose of a set; with ``start`` trained on from there, with the settings of that."""
    weights = np.ones(len(study.drawn.texts))
    weights[list(own)] += dose
    how = study.settings.training(warm=start is not None)
    return train_model(study.drawn.texts, study.drawn.tokenizer, how, weights=weights.tolist(), start=start)


def optimum(start: Start, own: Members, damping: Mapping[str, float]) -> np.ndarray:
    """Doses of a set at the proximal optimum, a task: its change and noise [2, doses, Q] flat, and the CPU seconds."""
    began = time.process_time()
    settings, weights = start
    study = study_of(settings)
    objective = _objective(settings, weights.tobytes(), weights.dtype.str, tuple(damping.items()))
    questions = Questions([[part] for part in study.parts], [[1.0]] * len(study.parts))
    rows = [study.rows[place] for place in own]
    found = measure(objective, rows, questions, DOSES[PROXIMAL], len(study.rows), _ITERATIONS, _TOLERANCES)
    return np.append(np.stack([found.change, found.noise]), time.process_time() - began)


# A worker process computes what the model says of all texts once, not for each set.
@lru_cache(maxsize=1)
def _objective(
    settings: Settings, weights: bytes, dtype: str, damping: tuple[tuple[str, float], ...]
) -> ProximalObjective:
    study = study_of(settings)
    model = study.model(np.frombuffer(weights, dtype).astype(np.float64))
    exact_norms(model)
    return ProximalObjective(
        model, coverage(model).tracked, study.rows, dict(damping), batch_tokens=_BATCH_TOKENS, draws=_DRAWS
    )
