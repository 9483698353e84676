"""Case deletion: what a classifier thinks of a text after training without the sequences that scores put first.

DEL+ of Yeh et al. 2022: f is the probability of a test text's class, and the sequences that raise it most by a method's
scores (proponents) are left out of a new training, or those that lower it most (opponents). Trainings with and without
them share initial weights and batches: a batch's loss is Σ L / B over what is left of it, B its size with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

import raylux
from jobs.deletion.reviews import CLASSES, SPECIAL, Review, split, train_tokenizer

CONTEXT, HEADS = 48, 2
WORDS = "TracIn-WE"
LAST = "TracIn, last layer"
EKFAC = "EK-FAC"
# Method -> what its runs are; those of TracIn are of all checkpoints.
METHODS = {
    WORDS: ("curvature.kind=identity", 'model.layers=["*.word_embeddings"]'),
    LAST: ("curvature.kind=identity", 'model.layers=["classifier"]'),
    EKFAC: (),
}
SIGNS = ("proponents", "opponents")
# Seed of the training whose checkpoints are scored; those that measure have others.
_SCORED = 1000

Watch = Callable[[int, PreTrainedModel], None]
"""Called after each epoch with its number and the model as it is then."""


@dataclass(frozen=True)
class Settings:
    """Equal settings give equal numbers on the same machine.

    Attributes:
        train: sentences that are trained on.
        questions: test sentences that are asked about, of those that are classified rightly.
        removed: share of the training set that is left out, in percent.
        repeats: seeds of each training without them: 0, 1, …
        random: sets drawn at random.
        epochs: of a training; checkpoints are those after half of them, and after all.
        words: of the vocabulary.
        width: of the model.
        layers: of the model.
        batch: sentences of a step.
        rate: of Adam, the same throughout.
        seed: of the split, and of what is drawn.
    """

    train: int = 3000
    questions: int = 20
    removed: float = 10.0
    repeats: int = 2
    random: int = 12
    epochs: int = 4
    words: int = 4000
    width: int = 32
    layers: int = 1
    batch: int = 100
    rate: float = 3e-3
    seed: int = 0

    @property
    def count(self) -> int:
        """Sentences that are left out."""
        return round(self.train * self.removed / 100)


@dataclass(frozen=True)
class Outcome:
    """What was measured; changes are of the probability of a question's class. Legend: Q questions, R repeats.

    Attributes:
        accuracy: on the test set, of the model that was scored and of each repeat.
        probability: [R, Q] after training on everything.
        changes: method and sign -> [R, Q].
        random: [sets, R, Q].
        special: share of TracIn-WE's ten best influences that is of ``[CLS]``, ``[SEP]`` and their kin, per question.
    """

    accuracy: list[float]
    probability: np.ndarray
    changes: dict[tuple[str, str], np.ndarray]
    random: np.ndarray
    special: np.ndarray


def study(settings: Settings, reviews: Sequence[Review], folder: Path) -> Outcome:
    """Train, score, leave out and train again.

    Args:
        settings: of the study.
        reviews: to be split.
        folder: for the runs.
    """
    return _Study(settings, reviews, folder).outcome()


class _Study:
    def __init__(self, settings: Settings, reviews: Sequence[Review], folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.train, self.test = split(reviews, settings.train, settings.seed)
        self.tokenizer = train_tokenizer([text for text, _ in self.train], settings.words, CONTEXT)
        self.rows = Rows.of(self.train, self.tokenizer)
        self.held = Rows.of(self.test, self.tokenizer)

    def outcome(self) -> Outcome:
        settings = self.settings
        checkpoints: list[PreTrainedModel] = []
        kept = torch.ones(len(self.train))

        def keep(epoch: int, model: PreTrainedModel) -> None:
            if epoch in (max(1, settings.epochs // 2), settings.epochs):
                checkpoints.append(_copy(model))

        model = train(self.rows, kept, settings, _SCORED, keep)
        asked = self._questions(model)
        scores, special = self._scores(checkpoints, asked)
        bases = [train(self.rows, kept, settings, seed) for seed in range(settings.repeats)]
        held = self.held.only(asked)
        before = np.stack([probabilities(base, held) for base in bases])
        changes = {
            (method, sign): self._changes([self._chosen(row, sign) for row in found], held, before)
            for method, found in scores.items()
            for sign in SIGNS
        }
        draw = np.random.default_rng(settings.seed + 1)
        sets = [draw.permutation(settings.train)[: settings.count] for _ in range(settings.random)]
        random = np.stack([self._without(out, held) - before for out in sets])
        accuracy = [float((probabilities(one, self.held) > 0.5).mean()) for one in (model, *bases)]
        return Outcome(accuracy, before, changes, random, special)

    def _questions(self, model: PreTrainedModel) -> list[int]:
        """Test sentences drawn among those that the scored model classifies rightly."""
        right = np.flatnonzero(probabilities(model, self.held) > 0.5)
        draw = np.random.default_rng(self.settings.seed + 2)
        return sorted(draw.permutation(right)[: self.settings.questions].tolist())

    def _scores(
        self, checkpoints: Sequence[PreTrainedModel], asked: list[int]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Method -> scores [Q, N]; and the share of special tokens."""
        train = [{"id": str(row), "text": text, "label": label} for row, (text, label) in enumerate(self.train)]
        queries = [{"id": f"q{row}", "text": self.test[row][0], "label": self.test[row][1]} for row in asked]
        scores, special = {}, np.zeros(0)
        for place, (method, overrides) in enumerate(METHODS.items()):
            # A constant rate weighs all checkpoints alike.
            models = checkpoints[-1:] if method == EKFAC else checkpoints
            runs = [
                raylux.attribute(
                    model,
                    self.tokenizer,
                    train,
                    queries,
                    folder=self.folder / f"{place}-{number}",
                    overrides=["prefilter.kind=none", "query.max_error=0", *overrides],
                )
                for number, model in enumerate(models)
            ]
            scores[method] = raylux.combine(runs).scores().to_numpy()
            if method == WORDS:
                special = np.array([_special(runs[-1], query) for query in runs[-1].queries])
        return scores, special

    def _chosen(self, scores: np.ndarray, sign: str) -> np.ndarray:
        """The training sentences that raise a question's f most, or lower it most."""
        order = np.argsort(-scores if sign == "proponents" else scores, kind="stable")
        return order[: self.settings.count]

    def _changes(self, sets: Sequence[np.ndarray], held: Rows, before: np.ndarray) -> np.ndarray:
        """[R, Q] of each question by leaving out its own set."""
        found = [self._without(out, held.only([place]))[:, 0] for place, out in enumerate(sets)]
        return np.stack(found, 1) - before

    def _without(self, out: np.ndarray, held: Rows) -> np.ndarray:
        """[R, n] probabilities after training without some sentences."""
        kept = torch.ones(len(self.train))
        kept[torch.as_tensor(out)] = 0
        models = (train(self.rows, kept, self.settings, seed) for seed in range(self.settings.repeats))
        return np.stack([probabilities(model, held) for model in models])


@dataclass(frozen=True)
class Rows:
    """Encoded sentences: ids [n, T] with padding, their mask, and classes [n]."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, reviews: Sequence[Review], tokenizer: PreTrainedTokenizerFast) -> Rows:
        """As the tokenizer has them, cut short at the model's context."""
        texts = [text for text, _ in reviews]
        found = tokenizer(texts, truncation=True, max_length=CONTEXT, padding=True, return_tensors="pt")
        labels = torch.tensor([CLASSES.index(label) for _, label in reviews])
        return cls(found["input_ids"], found["attention_mask"], labels)

    def only(self, rows: Sequence[int] | Tensor) -> Rows:
        """Some of them, no wider than the longest."""
        some = torch.as_tensor(rows)
        width = int(self.mask[some].sum(1).max())
        return Rows(self.ids[some, :width], self.mask[some, :width], self.labels[some])


def train(rows: Rows, kept: Tensor, settings: Settings, seed: int, watch: Watch | None = None) -> PreTrainedModel:
    """A classifier from scratch.

    Args:
        rows: the whole training set.
        kept: [n] 1, or 0 of those that are left out.
        settings: of the study.
        seed: of the initial weights and of the batches.
        watch: shown the model after each epoch.
    """
    model = _initial(settings.words, settings, seed)
    generator = torch.Generator().manual_seed(seed)
    search = torch.optim.Adam(model.parameters(), settings.rate)
    for epoch in range(1, settings.epochs + 1):
        for batch in torch.randperm(len(rows.ids), generator=generator).split(settings.batch):
            own = batch[kept[batch] > 0]
            search.zero_grad()
            if len(own):
                part = rows.only(own)
                logits = model(input_ids=part.ids, attention_mask=part.mask).logits
                (nn.functional.cross_entropy(logits, part.labels, reduction="sum") / len(batch)).backward()
            search.step()
        if watch is not None:
            watch(epoch, model)
    return model.eval()


def probabilities(model: PreTrainedModel, rows: Rows) -> np.ndarray:
    """Of each row's class [n]."""
    found = []
    with torch.no_grad():
        for part in torch.arange(len(rows.ids)).split(500):
            some = rows.only(part)
            logits = model(input_ids=some.ids, attention_mask=some.mask).logits
            found.append(logits.softmax(1).gather(1, some.labels[:, None])[:, 0])
    return torch.cat(found).numpy()


def _initial(vocabulary: int, settings: Settings, seed: int) -> PreTrainedModel:
    """Without dropout, so that trainings differ by their data alone."""
    names = dict(enumerate(CLASSES))
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=settings.width, num_hidden_layers=settings.layers,
        num_attention_heads=HEADS, intermediate_size=2 * settings.width, max_position_embeddings=CONTEXT,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
        id2label=names, label2id={name: number for number, name in names.items()},
        # The usual 0.02 is meant for wider layers.
        initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    own = BertForSequenceClassification(model.config)
    own.load_state_dict(model.state_dict())
    return own.eval()


def _special(run: raylux.Run, query: str) -> float:
    """Share of special tokens in the influence of the ten best."""
    frames = [run.word_scores(query, sequence) for sequence in run.top(query, 10)["sequence"]]
    total = sum(float(frame["influence"].sum()) for frame in frames)
    return sum(float(frame.loc[frame["token"].isin(SPECIAL), "influence"].sum()) for frame in frames) / total
