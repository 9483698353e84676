"""The scores of each estimator: a run of its own over the whole corpus, or what the texts alone say."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raylux import api, fingerprints, prefilter
from raylux.engine.progress import Reporter
from raylux.engine.records import damping_of
from raylux.errors import RayluxError, UserError
from raylux.evaluation.inputs import Estimator, Inputs, overridden
from raylux.report.profile import total

# Sections of a config that an estimator's numbers go by, and what of the engine's does.
_SECTIONS = ("model", "corpus", "fit", "curvature", "query", "score")
_ENGINE = ("threads", "batch_tokens", "contraction_dtype")


@dataclass(frozen=True)
class Scored:
    """What an estimator says.

    Attributes:
        scores: [Q, N] float64.
        unit: of them; empty where they have none.
        train_size: N.
        seconds: of all workers and shards, in all commands that worked on it; NaN where nobody counted.
        folder: of its run; empty where it is none.
        own: [N] self-influences, where a test asks for them.
        damping: λ of each tracked layer; empty where there is no curvature.
    """

    scores: np.ndarray
    unit: str
    train_size: int
    seconds: float
    folder: str = ""
    own: np.ndarray | None = None
    damping: Mapping[str, float] = field(default_factory=dict)


def scored(inputs: Inputs, estimator: Estimator, model: Mapping[str, Any], reporter: Reporter, quiet: bool) -> Scored:
    """Run an estimator, or what is missing of it.

    Args:
        inputs: of the evaluation.
        estimator: one of them.
        model: keys of the section ``model`` that name the scored weights.
        reporter: told what is worked on.
        quiet: no progress of its stages on the terminal.

    Raises:
        UserError: the estimator cannot serve this model or corpus.
        RayluxError: units of it were given up.
    """
    if estimator.word:
        return Scored(_by_words(inputs, estimator), "", len(inputs.sequences), float("nan"))
    reporter.say(f"estimator '{estimator.name}': {' '.join(estimator.overrides) or 'the config as it is'}")
    config = overridden(inputs.config, "evaluate", estimator.overrides, model)
    if config.score.best is not None:
        raise UserError(f"estimator '{estimator.name}': every pair wants a score here; remove score.best")
    said = config.dump()
    del said["score"]["self_influence"]  # may be measured later in the same folder
    named = {name: str(said[name]) for name in _SECTIONS} | {name: str(said["engine"][name]) for name in _ENGINE}
    state = fingerprints.digest(named, {"inputs": inputs.print})[:8]
    folder = f"{inputs.folder.files.place}/runs/{estimator.name.replace(' ', '-')}-{state}"
    config = overridden(inputs.config, folder, estimator.overrides, model)
    measured = "mislabelled" in inputs.chosen.tests
    if measured:
        config = config.model_copy(update={"score": config.score.model_copy(update={"self_influence": True})})
    run = api.run_stages(config, api.STAGES[:-1], quiet=quiet)
    ids, names = [query.id for query in inputs.queries], inputs.sequences.table["sequence"].tolist()
    if run.quarantined or len(run.rows) < len(names):
        raise RayluxError(f"{folder}: not every sequence has a score; raylux inspect says which are quarantined")
    scores = run.scores().sel(query=ids, sequence=names).to_numpy().astype(np.float64)
    if not np.isfinite(scores).all():
        raise RayluxError(f"{folder}: a score is missing or not finite; raylux inspect says what is quarantined")
    own = run.self_influence().set_index("sequence")["self_influence"].loc[names].to_numpy() if measured else None
    damping = damping_of(run.store) if run.unit == "nats" else {}
    return Scored(scores, run.unit, run.train_size, total(run.profile())[0], folder, own, damping)


def _by_words(inputs: Inputs, estimator: Estimator) -> np.ndarray:
    if estimator.word == "random":
        # Names tell several of them apart.
        seed = inputs.chosen.seed, zlib.crc32(estimator.name.encode())
        return np.random.default_rng(seed).normal(size=(len(inputs.queries), len(inputs.sequences)))
    return by_prefilter(inputs, estimator.word)


def by_prefilter(inputs: Inputs, kind: str) -> np.ndarray:
    """Scores of a kind of prefilter [Q, N]."""
    tokens = [query.search_tokens for query in inputs.queries]
    return prefilter.score_all(kind, inputs.sequences.tokens, inputs.sequences.offsets, inputs.vocabulary, tokens)
