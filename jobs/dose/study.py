"""What is tried: everything that is drawn or fixed before the first score is looked at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import torch
from transformers import PreTrainedModel

from jobs.kept import folder_name
from jobs.lds import study as lds
from raylux.batches import TokenRow
from raylux.demo.training import TrainingSettings, initial_model

COLD, WARM, PROXIMAL = "cold", "warm", "proximal"
RETRAINED = (COLD, WARM)
# Copies that are added to the one there is. Retrained: none is left, two, five. At the proximal optimum: a pair that is
# small enough to be in proportion. Whole copies of a set are not, there, and without the set the objective has hardly a
# bottom: the weights may go where they like as long as they spoil these very sequences.
DOSES = {COLD: (-1.0, 1.0, 4.0), WARM: (-1.0, 1.0, 4.0), PROXIMAL: (-0.02, 0.02)}
# Of the initial weights and the order of the batches: the same for every model of the study.
_TRAINING_SEED = 0

Members = tuple[int, ...]
"""A set of training sequences, ascending."""


@dataclass(frozen=True)
class Settings:
    """Equal settings give equal numbers on the same machine.

    Attributes:
        seed: chooses texts, queries and the sets that are drawn.
        train: N, training sequences.
        queries: Q, held-out texts.
        characters: of a text.
        vocabulary: of the tokenizer; those up to ``rate`` are what ``TrainingSettings`` says.
        layers: see ``vocabulary``.
        width: see ``vocabulary``.
        epochs: see ``vocabulary``.
        batch_tokens: see ``vocabulary``.
        rate: see ``vocabulary``.
        size: sequences of a set.
        random: sets drawn at random, the same for all queries.
        warm_epochs: of the training that goes on from the trained model.
        warm_rate: its largest learning rate.
        products: with the exact Gauss-Newton matrix, for each query.
        proximal: queries whose sets are measured at the proximal optimum too, the first so many; and as many of the
            sets drawn at random, if there are.
    """

    seed: int = 0
    train: int = 200
    queries: int = 30
    characters: int = 96
    vocabulary: int = 768
    layers: int = 2
    width: int = 48
    epochs: int = 6
    batch_tokens: int = 512
    rate: float = 4e-3
    size: int = 10
    random: int = 8
    warm_epochs: int = 2
    warm_rate: float = 1e-3
    products: int = 12
    proximal: int = 5

    def drawn(self) -> lds.Settings:
        """Texts, queries and model as the study of ``jobs/datamodel.py`` draws them; it has no subsets here."""
        return lds.Settings(
            self.seed, self.train, self.queries, 0, 0, self.characters, self.vocabulary, self.layers, self.width,
            self.epochs,
        )  # fmt: skip

    def training(self, warm: bool = False) -> TrainingSettings:
        """How a model is trained from the start, or trained on."""
        own = replace(self.drawn().training(_TRAINING_SEED), batch_tokens=self.batch_tokens, rate=self.rate)
        return replace(own, epochs=self.warm_epochs, rate=self.warm_rate) if warm else own

    @property
    def name(self) -> str:
        """Of the folder of its results: other settings, other results."""
        return folder_name(self)


@dataclass(frozen=True)
class Study:
    """What the settings stand for.

    Attributes:
        settings: as asked for.
        drawn: texts, queries, tokenizer.
        random: sets drawn at random.
    """

    settings: Settings
    drawn: lds.Study
    random: tuple[Members, ...]

    @classmethod
    def of(cls, settings: Settings) -> Study:
        """Drawn from Wikipedia leads.

        Raises:
            UserError: there are not enough leads, or their package is missing.
        """
        random = np.random.default_rng([settings.seed, 1])
        sets = [random.choice(settings.train, settings.size, replace=False) for _ in range(settings.random)]
        return cls(settings, lds.Study.of(settings.drawn()), tuple(members(places) for places in sets))

    @cached_property
    def rows(self) -> list[TokenRow]:
        """The texts [N] as they are trained on: every token but the first has a label."""
        return self.drawn.rows

    @cached_property
    def parts(self) -> list[TokenRow]:
        """The queries [Q]: their completions have labels."""
        return self.drawn.parts

    def model(self, weights: np.ndarray) -> PreTrainedModel:
        """The model with these parameters [P], in their precision and ready to be asked."""
        # A copy: what comes from Ray's store is read-only.
        flat = torch.from_numpy(weights.copy())
        model = initial_model(self.drawn.tokenizer, self.settings.training()).to(flat.dtype)
        torch.nn.utils.vector_to_parameters(flat, model.parameters())
        return model.eval()


def members(places: np.ndarray) -> Members:
    """A set of these rows."""
    return tuple(sorted(int(place) for place in places))


def weights_of(model: PreTrainedModel) -> np.ndarray:
    """All parameters as one vector [P]."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


# A worker process makes the texts and the tokenizer once, not for each of its models.
study_of = cache(Study.of)
