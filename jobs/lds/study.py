"""A study: its texts and queries, its subsets, and the model that is trained on all of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from jobs.kept import folder_name
from raylux.batches import IGNORED, TokenRow
from raylux.demo.corpus import read_leads
from raylux.demo.training import TrainingSettings, initial_model, train_tokenizer
from raylux.errors import UserError
from raylux.evaluate.training import Answers
from raylux.queries import parse_queries

# A lead that is no longer than this many characters is no text; a query's prompt is its first quarter.
_SHORTEST = 160


@dataclass(frozen=True)
class Settings:
    """Equal settings give equal numbers on the same machine.

    Attributes:
        seed: chooses texts, queries and subsets.
        train: N, training sequences.
        queries: Q, held-out texts.
        subsets: S, half of the training sequences each.
        repeats: models for each subset, each from other initial weights and in another order; f is their mean.
        characters: of a text.
        vocabulary: of the tokenizer; with ``layers``, ``width`` and ``epochs`` what ``TrainingSettings`` says.
        layers: see ``vocabulary``.
        width: see ``vocabulary``.
        epochs: see ``vocabulary``.
        tied: head and word embedding are one matrix; otherwise each has weights of its own.
    """

    seed: int = 0
    train: int = 512
    queries: int = 40
    subsets: int = 64
    repeats: int = 2
    characters: int = 160
    vocabulary: int = 1024
    layers: int = 2
    width: int = 64
    epochs: int = 12
    tied: bool = True

    def training(self, seed: int) -> TrainingSettings:
        """How a model is trained; ``seed``: of its initial weights and the order of its batches."""
        return TrainingSettings(
            vocabulary=self.vocabulary, layers=self.layers, width=self.width, heads=2, context=128,
            epochs=self.epochs, batch_tokens=1024, seed=seed,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """Of the folder of its results: other settings, other results."""
        return folder_name(self, without="tied") + ("" if self.tied else "-untied")


@dataclass(frozen=True)
class Study:
    """What a study's settings stand for.

    Attributes:
        settings: as asked for.
        texts: [N] for training.
        asked: [Q] queries, held-out texts.
        members: [S, N] bool, the subsets.
        tokenizer: trained on all texts.
    """

    settings: Settings
    texts: list[str]
    asked: list[dict[str, str]]
    members: np.ndarray
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def of(cls, settings: Settings) -> Study:
        """Drawn from Wikipedia leads, before anything is trained.

        Raises:
            UserError: there are not enough leads, or their package is missing.
        """
        random = np.random.default_rng(settings.seed)
        cleaned = (" ".join(text.split()) for _, text in read_leads())
        pool = sorted({text[: settings.characters] for text in cleaned if len(text) >= _SHORTEST})
        count = settings.train + settings.queries
        if count > len(pool):
            raise UserError(f"lds: {count:,} texts are wanted, there are {len(pool):,}; lower --train or --queries")
        chosen = [pool[place] for place in random.choice(len(pool), count, replace=False)]
        texts, held = chosen[: settings.train], chosen[settings.train :]
        members = np.zeros((settings.subsets, settings.train), bool)
        for row in members:
            row[random.choice(settings.train, settings.train // 2, replace=False)] = True
        asked = [
            {"id": f"q{place:03d}", "prompt": text[: len(text) // 4], "completion": text[len(text) // 4 :]}
            for place, text in enumerate(held)
        ]
        return cls(settings, texts, asked, members, train_tokenizer(texts, settings.training(0)))

    def start(self, seed: int) -> PreTrainedModel | None:
        """What training begins at: ``seed``'s initial model with a head of its own; None: what is usual, tied."""
        if self.settings.tied:
            return None
        usual = initial_model(self.tokenizer, self.settings.training(seed))
        config = copy.deepcopy(usual.config)
        config.tie_word_embeddings = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return type(usual)(config)

    @cached_property
    def rows(self) -> list[TokenRow]:
        """The texts [N] as they are trained on: every token but the first has a label."""
        encoded = self.tokenizer(self.texts)["input_ids"]
        return [TokenRow(np.asarray(tokens), np.asarray([IGNORED, *tokens[1:]])) for tokens in encoded]

    @cached_property
    def parts(self) -> list[TokenRow]:
        """The queries [Q]: their completions have labels."""
        context = self.settings.training(0).context
        queries = parse_queries(self.asked, self.tokenizer, len(self.tokenizer), context)
        return [TokenRow(part.tokens, part.labels) for query in queries for part in query.parts]

    def logprobs(self, model: PreTrainedModel) -> np.ndarray:
        """f of each query: log p of its completion, in nats [Q]."""
        return Answers(model).logprobs(self.parts).numpy()
