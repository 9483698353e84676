"""One seed of the study: a model that has learned all three forms, questions, and the variants' influences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import raylux
from jobs.order.facts import FORMS, VARIANTS, Fact, draw_facts, variants
from raylux.demo.training import TrainingSettings, train_model, train_tokenizer

# Questions about facts that the training told in forward form, and about facts that it did not tell.
GROUPS = ("not told", "told")


@dataclass(frozen=True)
class Settings:
    """Equal settings give equal numbers on the same machine.

    Attributes:
        facts: told in training, a third of them in each form.
        queries: questions of each group.
        repeats: seeds of names, facts, initial weights and batches: 0, 1, …
        epochs: with ``vocabulary``, ``layers`` and ``width`` as in ``TrainingSettings``.
        vocabulary: see ``epochs``.
        layers: see ``epochs``.
        width: see ``epochs``.
    """

    facts: int = 600
    queries: int = 30
    repeats: int = 3
    epochs: int = 30
    vocabulary: int = 400
    layers: int = 3
    width: int = 64

    def training(self, seed: int) -> TrainingSettings:
        """How the model of a seed is trained."""
        return TrainingSettings(
            vocabulary=self.vocabulary, layers=self.layers, width=self.width, heads=4, context=64,
            epochs=self.epochs, batch_tokens=1024, seed=seed,
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Of one seed: group -> influences [questions, variants] in nats, and log p of the completions [questions]."""

    influence: dict[str, np.ndarray]
    logprob: dict[str, np.ndarray]


def outcome(settings: Settings, seed: int, folder: Path) -> Outcome:
    """Train the model of a seed, and score the variants of each question."""
    random = np.random.default_rng(seed)
    drawn = draw_facts(settings.facts + settings.queries + 1, random)
    told, asked, other = drawn[: settings.facts], drawn[settings.facts : -1], drawn[-1]
    groups = {"not told": asked, "told": told[:: len(FORMS)][: settings.queries]}
    texts = [fact.told(form) for fact, form in zip(told, _forms(len(told)), strict=True)]
    tokenizer = train_tokenizer(texts, settings.training(seed))
    model = train_model(texts, tokenizer, settings.training(seed))
    found = {name: _group(model, tokenizer, texts, facts, other, folder / name) for name, facts in groups.items()}
    return Outcome({name: one[0] for name, one in found.items()}, {name: one[1] for name, one in found.items()})


def _forms(count: int) -> list[str]:
    return [list(FORMS)[place % len(FORMS)] for place in range(count)]


def _group(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    facts: list[Fact],
    other: Fact,
    folder: Path,
) -> tuple[np.ndarray, np.ndarray]:
    """Influences [questions, variants] and log p [questions]; the curvature is that of the training texts."""
    rows = [{"id": f"t{place}", "text": text} for place, text in enumerate(texts)]
    for place, fact in enumerate(facts):
        rows += [{"id": f"v{place}/{name}", "text": text} for name, text in variants(fact, other).items()]
    asked = [
        dict(zip(("id", "prompt", "completion"), (f"q{place}", *fact.question()), strict=True))
        for place, fact in enumerate(facts)
    ]
    # All rows are scored, the training texts among them; a fit on some hundred variants beside them is no harm.
    overrides = ["query.max_error=0", "score.token_top=0", f"score.train_size={len(texts)}"]
    run = raylux.attribute(model, tokenizer, rows, asked, folder=folder, overrides=overrides)
    scores = run.scores()
    influence = np.array(
        [
            [float(scores.sel(query=f"q{place}", sequence=f"v{place}/{name}")) for name in VARIANTS]
            for place in range(len(facts))
        ]
    )
    measured = run.measurements["measurement"].loc[[f"q{place}" for place in range(len(facts))]]
    return influence, measured.to_numpy(float)
