"""Models trained without some sequences, by the config's recipe, and proximal optima without one: tasks over Ray.

Each answer is a unit of the ledger.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from raylux import fingerprints, models
from raylux.batches import TokenRow
from raylux.engine.progress import Reporter
from raylux.engine.tasks import run_tasks
from raylux.evaluate import Answers, Proximity, Questions, Recipe, train
from raylux.evaluation.inputs import Inputs
from raylux.evaluation.optimum import Removed, Removing, damping_print, forget, layers_with, removed
from raylux.modelfiles import quiet
from raylux.parameters import parameters_of
from raylux.queries import Query
from raylux.store import Files

# Of the ledger: what models answer; those that were kept; and what is found at proximal optima.
_STAGE, _KEPT, _REMOVED = "trained", "model", "proximal"

Way = Literal["cold", "warm", "proximal"]
"""From the start; on from the scored model; the same with the tracked weights alone, held near where they are."""


@dataclass(frozen=True)
class Training:
    """What all trainings have in common.

    Attributes:
        files: of the model: its config.json.
        start: of the weights that they start from; None: random ones by the seed.
        scored: of the model that warm ones go on from; None where there are none.
        recipe: from the start.
        warm: of going on.
        dtype: of the weights.
        device: cpu or cuda.
        trusted: whether code that ships with the model may run.
        rows: [N] the corpus.
        parts: rows of tokens of each query.
        weights: of each part in the query's measurement.
        damping: λ of each tracked layer, per sequence; of proximal ones.
    """

    files: models.ModelFiles
    start: models.ModelFiles | None
    scored: models.ModelFiles | None
    recipe: Recipe
    warm: Recipe
    dtype: str
    device: str
    trusted: bool
    rows: tuple[TokenRow, ...]
    parts: tuple[tuple[TokenRow, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    damping: Mapping[str, float] = field(default_factory=dict)

    def begins(self, way: Way) -> models.ModelFiles | None:
        """Where training starts from; None: random weights."""
        return self.start if way == "cold" else self.scored

    def rule(self, way: Way) -> Recipe:
        return self.recipe if way == "cold" else self.warm

    def fingerprint(self, way: Way) -> dict[str, str]:
        """What answers go by, but for the seed and what is left out."""
        files = self.begins(way)
        return {
            "model": fingerprints.of_config(Path(self.files.folder)),
            "start": "random" if files is None else fingerprints.of_weights(files.folder),
            "recipe": str(asdict(self.rule(way))),
            "numbers": f"{self.dtype} {self.device}",
            **({"damping": damping_print(self.damping)} if way == "proximal" else {}),
        }


def answers_without(training: Training, left_out: np.ndarray, seed: int, way: Way = "cold") -> np.ndarray:
    """f of each query [Q], in nats, after training without some sequences."""
    model = trained(training, left_out, seed, way)
    return Questions(training.parts, training.weights).at(Answers(model.eval()))


def kept(training: Training, place: str, key: str, seed: int) -> np.ndarray:
    """As ``answers_without`` of nothing; the model's files are written under ``key``."""
    model = trained(training, np.zeros(0, np.int64), seed).eval()
    files = Files(place)
    with tempfile.TemporaryDirectory(prefix="raylux-") as folder:
        with quiet():
            model.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            files.put(f"{key}/{path.name}", path.read_bytes())
    return Questions(training.parts, training.weights).at(Answers(model))


def trained(training: Training, left_out: np.ndarray, seed: int, way: Way = "cold") -> Any:
    """A model after training, in training mode; the caller's random state is left as it was."""
    weights = np.ones(len(training.rows))
    weights[left_out] = 0
    files = training.begins(way)
    cuda = [torch.cuda.current_device()] if training.device == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        model = _random(training) if files is None else _loaded(training, files)
        near = _held(model, training.damping) if way == "proximal" else None
        train(model, training.rows, training.rule(way), seed, weights, proximity=near)
    return model


def _held(model: Any, damping: Mapping[str, float]) -> Proximity:
    """Of the tracked weights; all others are frozen, as where the optimum is searched."""
    model.requires_grad_(False)
    start, strength = {}, {}
    for layer in layers_with(model, damping):
        for name in parameters_of(model, (layer,)):
            parameter = model.get_parameter(name).requires_grad_(True)
            start[name], strength[name] = parameter.detach().clone(), damping[layer.name]
    return Proximity(strength, start)


def _random(training: Training) -> Any:
    config = models.load_config(training.files, training.trusted)
    with quiet():
        model: Any = models.LOADERS[training.files.task].from_config(
            config, trust_remote_code=training.trusted, dtype=models.DTYPES[training.dtype]
        )
    return model.to(training.device)


def _loaded(training: Training, files: models.ModelFiles) -> Any:
    here = models.on_this_node(files)
    return models.load_model(here, training.dtype, training.device, training.trusted).requires_grad_(True)


class Retraining:
    """Trains what the tests ask for; what the ledger has is read from there.

    Args:
        inputs: of the evaluation.
        reporter: told of the progress.
    """

    def __init__(self, inputs: Inputs, reporter: Reporter) -> None:
        self._inputs, self._reporter = inputs, reporter
        model, sequences = inputs.config.model, inputs.sequences
        self._training = Training(
            inputs.files,
            inputs.start,
            None,
            inputs.recipe,
            inputs.warm_recipe,
            model.dtype,
            models.resolve_device(model.device),
            model.trust_remote_code,
            tuple(TokenRow(*sequences.row(place)) for place in range(len(sequences))),
            tuple(_parts(query) for query in inputs.queries),
            tuple(tuple(part.weight for part in query.parts) for query in inputs.queries),
        )

    @property
    def seeds(self) -> range:
        first = self._inputs.chosen.seed
        return range(first, first + self._inputs.chosen.seeds)

    def scored_model(self) -> dict[str, Any]:
        """Keys of the section ``model`` that name the scored weights, trained here where the config says so."""
        chosen, model = self._inputs.chosen, self._inputs.config.model
        if chosen.scored == "given":
            self._training = replace(self._training, scored=self._inputs.files)
            return {}
        seed, files = chosen.seed, self._inputs.folder.files
        name = self._name(self._training.fingerprint("cold"), np.zeros(0, np.int64), seed)
        key = f"model/{name}"
        if not files.exists(f"{key}/config.json"):
            self._inputs.folder.forget(_KEPT, name)
        self._run(_KEPT, kept, {name: (files.place, key, seed)}, "models", self._training)
        section = {"path": files.where(key), "tokenizer": model.tokenizer or model.path}
        scored = models.find_model(model.model_copy(update=section))
        self._training = replace(self._training, scored=scored)
        return section

    def answers(
        self, sets: Sequence[np.ndarray], what: str, way: Way = "cold", damping: Mapping[str, float] | None = None
    ) -> np.ndarray:
        """f after training without each set of sequences, [sets, seeds, Q] in nats.

        Args:
            sets: corpus rows, ascending; equal ones are trained once.
            what: the models are called.
            way: of training; what goes on from the scored model needs ``scored_model`` to have found it. Proximal
                ones are trained by the first seed alone.
            damping: λ of each tracked layer, of proximal ones.
        """
        training = replace(self._training, damping=damping or {})
        facts, seeds = training.fingerprint(way), self.seeds[:1] if way == "proximal" else self.seeds
        names = [[self._name(facts, rows, seed, way) for seed in seeds] for rows in sets]
        jobs = {
            name: (rows, seed, way)
            for row, rows in zip(names, sets, strict=True)
            for name, seed in zip(row, seeds, strict=True)
        }
        found = self._run(_STAGE, answers_without, jobs, what, training)
        return np.array([[found[name] for name in row] for row in names])

    def removed(self, rows: np.ndarray, damping: Mapping[str, float], train_size: int) -> Removed:
        """What the proximal Bregman optimum of the scored model becomes without each of some sequences.

        Args:
            rows: of the corpus.
            damping: λ of each tracked layer, per sequence.
            train_size: N.
        """
        common = self._training
        assert common.scored is not None, "scored_model() comes first"
        removing = Removing(
            common.scored, common.trusted, common.device, damping, train_size, common.rows, common.parts, common.weights
        )
        state = fingerprints.digest(removing.fingerprint(), {"inputs": self._inputs.print})
        removing = replace(removing, name=state)
        jobs = {f"{state[:16]}-{row:08d}": (row,) for row in rows.tolist()}
        try:
            return Removed.of(list(self._run(_REMOVED, removed, jobs, "proximal optima", removing).values()))
        finally:
            forget()

    def _name(self, facts: dict[str, str], rows: np.ndarray, seed: int, way: Way = "cold") -> str:
        state = fingerprints.digest(facts, {"inputs": self._inputs.print, "left out": str(rows.tolist())})
        return f"{way}-{len(rows)}-{state[:16]}-{seed}"

    def _run(
        self, stage: str, function: Any, jobs: dict[str, Any], what: str, shared: Training | Removing
    ) -> dict[str, np.ndarray]:
        engine = self._inputs.config.engine
        return run_tasks(
            self._inputs.folder,
            stage,
            function,
            shared,
            jobs,
            reporter=self._reporter,
            what=what,
            backend=engine.backend,
            threads=engine.threads,
            gpu=self._training.device == "cuda",
            patience=engine.timeout,
        )


def _parts(query: Query) -> tuple[TokenRow, ...]:
    return tuple(TokenRow(part.tokens, part.labels) for part in query.parts)
