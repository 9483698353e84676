"""Models trained on subsets: Ray tasks, each with one core; what is done is kept, and goes on by the same command."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from jobs.lds.study import Settings, Study
from raylux.demo.training import train_model

# The model of all texts and the subsets' begin at the same weights: repeat r of a subset has this seed plus r.
FIRST_SEED = 0


def measured(study: Study, folder: Path) -> np.ndarray:
    """f after training on each subset, [S, repeats, Q] in nats; a file for each in ``folder``, read where it is."""
    settings = study.settings
    jobs = [(subset, repeat) for subset in range(settings.subsets) for repeat in range(settings.repeats)]
    todo = [job for job in jobs if not _path(folder, *job).exists()]
    if todo:
        _train_all(settings, todo, folder)
    values = [np.load(_path(folder, *job)) for job in jobs]
    return np.stack(values).reshape(settings.subsets, settings.repeats, -1)


def _path(folder: Path, subset: int, repeat: int) -> Path:
    return folder / f"subset-{subset:03d}-{repeat}.npy"


def _train_all(settings: Settings, todo: list[tuple[int, int]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # As the engine does: a process that knows of Ray before of its token does not use one.
    from raylux.engine import session

    started = session.connect()
    import ray

    try:
        task = ray.remote(num_cpus=1, max_retries=3)(_train)
        running = {task.remote(settings, *job): job for job in todo}
        began = time.monotonic()
        for count in range(1, len(todo) + 1):
            (ready,), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(ready)
            _keep(_path(folder, *job), ray.get(ready))
            left = (time.monotonic() - began) / count * (len(todo) - count)
            print(f"model {count} of {len(todo)}, about {left / 60:.1f} min left", file=sys.stderr, flush=True)
    finally:
        if started:
            ray.shutdown()


def _train(settings: Settings, subset: int, repeat: int) -> np.ndarray:
    """f of each query after training on a subset."""
    study = Study.of(settings)
    texts = [study.texts[place] for place in np.flatnonzero(study.members[subset])]
    return study.logprobs(train_model(texts, study.tokenizer, settings.training(FIRST_SEED + repeat)))


def _keep(path: Path, values: np.ndarray) -> None:
    """Whole or not at all: a file that is there is never looked at again."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, values)
    partial.replace(path)
