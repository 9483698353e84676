"""Models trained on subsets, each a task of its own; what is done is kept, and goes on by the same command."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jobs.lds.study import Settings, Study
from raylux.demo.training import train_model
from raylux.engine.progress import Reporter
from raylux.engine.tasks import run_tasks
from raylux.store import RunFolder

# The model of all texts and the subsets' begin at the same weights: repeat r of a subset has this seed plus r.
FIRST_SEED = 0
# Of the ledger.
STAGE = "subsets"


def measured(study: Study, folder: Path, backend: str = "ray", quiet: bool = False) -> np.ndarray:
    """f after training on each subset, [S, repeats, Q] in nats; what is in the folder's ledger is read from there."""
    settings = study.settings
    jobs = {unit(*job): job for job in np.ndindex(settings.subsets, settings.repeats)}
    store = RunFolder(str(folder))
    found = run_tasks(
        store, STAGE, train, settings, jobs, reporter=Reporter(store, quiet), what="models", backend=backend
    )
    return np.stack(list(found.values())).reshape(settings.subsets, settings.repeats, -1)


def unit(subset: int, repeat: int) -> str:
    """The ledger's name of a model."""
    return f"subset-{subset:03d}-{repeat}"


def train(settings: Settings, subset: int, repeat: int) -> np.ndarray:
    """f of each query after training on a subset."""
    study = Study.of(settings)
    texts = [study.texts[place] for place in np.flatnonzero(study.members[subset])]
    seed = FIRST_SEED + repeat
    return study.logprobs(train_model(texts, study.tokenizer, settings.training(seed), start=study.start(seed)))
