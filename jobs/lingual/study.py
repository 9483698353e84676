"""The models of the study, and what each says of the influence of every sequence on every query."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from jobs.kept import Arrays, folder_name, kept
from jobs.lds import methods
from jobs.lds import study as lds
from jobs.lingual.subjects import Drawn, Lead, draw
from jobs.shape.blocks import block_shares
from raylux.demo.training import TrainingSettings, train_model, train_tokenizer

EKFAC, DOT = "ekfac", "identity"
FILTERS = ("idf", "bm25")
# Sequences whose layers are looked at.
BEST = 50


@dataclass(frozen=True)
class Size:
    """Of a model."""

    width: int
    layers: int

    def __str__(self) -> str:
        return f"{self.width} × {self.layers}"


SIZES = (Size(32, 1), Size(64, 2), Size(128, 4))


@dataclass(frozen=True)
class Settings:
    """Equal settings give equal numbers on the same machine.

    Attributes:
        seed: chooses subjects, leads, initial weights and batches.
        each: training sequences of each language.
        held: queries of each language whose twins are trained on.
        apart: subjects of which nothing is trained on.
        characters: of a lead.
        vocabulary: of the one tokenizer of all languages.
        epochs: of each model.
    """

    seed: int = 0
    each: int = 800
    held: int = 30
    apart: int = 30
    characters: int = 160
    vocabulary: int = 2048
    epochs: int = 6

    def training(self, size: Size) -> TrainingSettings:
        """How a model of a size is trained."""
        # A character has four bytes at most, a token one at least, and one stands before the text: nothing is cut.
        return TrainingSettings(
            vocabulary=self.vocabulary, layers=size.layers, width=size.width, heads=4, context=4 * self.characters + 1,
            epochs=self.epochs, batch_tokens=1024, seed=self.seed,
        )  # fmt: skip

    def drawn(self) -> Drawn:
        """Subjects and leads."""
        return draw(self.each, self.held, self.apart, self.characters, self.seed)

    @property
    def name(self) -> str:
        """Of the folder of its results: other settings, other results."""
        return folder_name(self)


@dataclass(frozen=True)
class Outcome:
    """Of one size. Legend: Q queries, N training sequences and probes.

    Attributes:
        scores: EKFAC in nats and DOT -> [Q, N].
        blocks: [Q, 2, blocks] share of each block in the influence of the best sequences of the query's language, and
            of those of the other languages.
        logprob: [Q] of the completions.
        parameters: tracked, and of the model.
    """

    scores: dict[str, np.ndarray]
    blocks: np.ndarray
    logprob: np.ndarray
    parameters: tuple[int, int]


def prepared(settings: Settings, drawn: Drawn) -> lds.Study:
    """Texts (training sequences, then probes), queries and tokenizer as the other studies have them.

    A query is a lead: its first quarter the prompt, the rest the completion.
    """
    asked = [
        {
            "id": f"q{place:03d}",
            "prompt": lead.text[: len(lead.text) // 4],
            "completion": lead.text[len(lead.text) // 4 :],
        }
        for place, lead in enumerate(drawn.queries)
    ]
    tokenizer = train_tokenizer([lead.text for lead in drawn.train], settings.training(SIZES[0]))
    texts = [lead.text for lead in [*drawn.train, *drawn.probes]]
    own = lds.Settings(settings.seed, len(drawn.train), len(asked), 0, 0, settings.characters, settings.vocabulary)
    return lds.Study(own, texts, asked, np.zeros((0, len(texts)), bool), tokenizer)


def outcomes(settings: Settings, drawn: Drawn, study: lds.Study, folder: Path) -> dict[Size, Outcome]:
    """Train and score each size; what lies in the folder is not made again."""
    found = {}
    for size in SIZES:
        path = folder / settings.name / f"{size.width}-{size.layers}.npz"
        one = kept(path, partial(_made, settings, drawn, study, size))
        tracked, whole = (int(count) for count in one["parameters"])
        found[size] = Outcome(
            {kind: one[kind] for kind in (EKFAC, DOT)}, one["blocks"], one["logprob"], (tracked, whole)
        )
    return found


def _made(settings: Settings, drawn: Drawn, study: lds.Study, size: Size) -> Arrays:
    def watch(epoch: int, rate: float, model: PreTrainedModel) -> None:
        print(f"{size}: {epoch} of {settings.epochs} epochs", file=sys.stderr, flush=True)

    texts = [lead.text for lead in drawn.train]
    model = train_model(texts, study.tokenizer, settings.training(size), watch=watch)
    print(f"{size}: scoring", file=sys.stderr, flush=True)
    nats = ["score.unit=nats", f"score.train_size={len(texts)}", "score.layers=true"]
    with tempfile.TemporaryDirectory() as folder:
        run = methods.run(study, model, Path(folder, EKFAC), EKFAC, nats)
        dots = methods.scores(study, model, Path(folder, DOT), DOT)
        layers = [run.layer_scores(query["id"]) for query in study.asked]
        names = [str(name) for name in layers[0]["layer"].to_numpy()]
        parts = zip(drawn.queries, layers, strict=True)
        tracked = sum(model.get_submodule(name).weight.numel() for name in names)
        return {
            EKFAC: methods.array(study, run),
            DOT: dots,
            "blocks": np.stack([_blocks(drawn.train, lead, names, own.to_numpy()) for lead, own in parts]),
            "logprob": run.measurements["measurement"].loc[[query["id"] for query in study.asked]].to_numpy(float),
            "parameters": np.array([tracked, sum(x.numel() for x in model.parameters())]),
        }


def _blocks(train: Sequence[Lead], query: Lead, names: Sequence[str], layers: np.ndarray) -> np.ndarray:
    """[2, blocks] of the best sequences of the query's language, and of the others."""
    home = np.array([lead.language == query.language for lead in train])
    layers = layers[:, : len(train)]
    total, found = layers.sum(0), []
    for kind in (home, ~home):
        places = np.flatnonzero(kind)
        best = places[np.argsort(-total[places])[:BEST]]
        found.append(block_shares(names, layers[:, best]))
    return np.stack(found)
