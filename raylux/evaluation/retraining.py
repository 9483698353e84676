"""Models trained without some sequences, by the config's recipe: tasks over Ray, each answer a unit of the ledger."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from raylux import fingerprints, models
from raylux.batches import TokenRow
from raylux.engine.progress import Reporter
from raylux.engine.tasks import run_tasks
from raylux.evaluate import Answers, Questions, Recipe, train
from raylux.evaluation.inputs import Inputs
from raylux.modelfiles import quiet
from raylux.queries import Query
from raylux.store import Files

# Of the ledger: what models answer; and those that were kept.
_STAGE, _KEPT = "trained", "model"


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

    def fingerprint(self, warm: bool) -> dict[str, str]:
        """What answers go by, but for the seed and what is left out."""
        files = self.scored if warm else self.start
        return {
            "model": fingerprints.of_config(Path(self.files.folder)),
            "start": "random" if files is None else fingerprints.of_weights(files.folder),
            "recipe": str(asdict(self.warm if warm else self.recipe)),
            "numbers": f"{self.dtype} {self.device}",
        }


def answers_without(training: Training, left_out: np.ndarray, seed: int, warm: bool) -> np.ndarray:
    """f of each query [Q], in nats, after training without some sequences."""
    model = trained(training, left_out, seed, warm)
    return Questions(training.parts, training.weights).at(Answers(model.eval()))


def kept(training: Training, place: str, key: str, seed: int) -> np.ndarray:
    """As ``answers_without`` of nothing; the model's files are written under ``key``."""
    model = trained(training, np.zeros(0, np.int64), seed, warm=False).eval()
    files = Files(place)
    with tempfile.TemporaryDirectory(prefix="raylux-") as folder:
        with quiet():
            model.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            files.put(f"{key}/{path.name}", path.read_bytes())
    return Questions(training.parts, training.weights).at(Answers(model))


def trained(training: Training, left_out: np.ndarray, seed: int, warm: bool) -> Any:
    """A model after training, in training mode; the caller's random state is left as it was."""
    weights = np.ones(len(training.rows))
    weights[left_out] = 0
    files = training.scored if warm else training.start
    cuda = [torch.cuda.current_device()] if training.device == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        model = _random(training) if files is None else _loaded(training, files)
        train(model, training.rows, training.warm if warm else training.recipe, seed, weights)
    return model


def _random(training: Training) -> Any:
    config = models.load_config(training.files, training.trusted)
    with quiet():
        model: Any = AutoModelForCausalLM.from_config(
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
        name = self._name(self._training.fingerprint(False), np.zeros(0, np.int64), seed)
        key = f"model/{name}"
        if not files.exists(f"{key}/config.json"):
            self._inputs.folder.forget(_KEPT, name)
        self._run(_KEPT, kept, {name: (files.place, key, seed)}, "models")
        section = {"path": files.where(key), "tokenizer": model.tokenizer or model.path}
        scored = models.find_model(model.model_copy(update=section))
        self._training = replace(self._training, scored=scored)
        return section

    def answers(self, sets: Sequence[np.ndarray], what: str, warm: bool = False) -> np.ndarray:
        """f after training without each set of sequences, [sets, seeds, Q] in nats.

        Args:
            sets: corpus rows, ascending; equal ones are trained once.
            what: the models are called.
            warm: go on from the scored model instead of training from the start.
        """
        facts = self._training.fingerprint(warm)
        names = [[self._name(facts, rows, seed, warm) for seed in self.seeds] for rows in sets]
        jobs = {
            name: (rows, seed, warm)
            for row, rows in zip(names, sets, strict=True)
            for name, seed in zip(row, self.seeds, strict=True)
        }
        found = self._run(_STAGE, answers_without, jobs, what)
        return np.array([[found[name] for name in row] for row in names])

    def _name(self, facts: dict[str, str], rows: np.ndarray, seed: int, warm: bool = False) -> str:
        state = fingerprints.digest(facts, {"inputs": self._inputs.print, "left out": str(rows.tolist())})
        return f"{'warm' if warm else 'cold'}-{len(rows)}-{state[:16]}-{seed}"

    def _run(self, stage: str, function: Any, jobs: dict[str, Any], what: str) -> dict[str, np.ndarray]:
        engine = self._inputs.config.engine
        return run_tasks(
            self._inputs.folder,
            stage,
            function,
            self._training,
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
