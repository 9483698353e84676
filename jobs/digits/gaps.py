"""What does influence predict? Bae et al.'s decomposition (2022) on a small network that was not trained to the end.

A point's removal is measured in four ways: at the proximal Bregman optimum, by going on with the training without it
(warm), by training anew without it from the same start and on the same batches (cold), and from other starts. The
distances between their networks, step by step from one to the next, say which assumption of influence fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import raylux
from jobs.digits.data import Digits
from jobs.digits.training import Sgd, State, forward, network, states_of, train
from raylux.batches import TokenRow
from raylux.classes import class_labels
from raylux.engine.records import query_files, read_layer_queries
from raylux.evaluate import ProximalObjective
from raylux.evaluate.datamodel import pearson, spearman
from raylux.layers import coverage
from raylux.modulecheck import features_read
from raylux.modules import marked
from raylux.store import RunFolder

TRUTHS = ("proximal optimum", "warm", "cold, same seed", "cold, another seed", "cold, seeds of their own")
GAPS = (
    "cold to warm start",
    "warm start to proximity",
    "proximity to proximal Bregman optimum",
    "that to its linearisation",
    "exact to truncated solve",
)


@dataclass(frozen=True)
class Settings:
    """What is trained, asked and removed.

    Attributes:
        train: N.
        hidden: width of both hidden layers.
        epochs: K of the base; all go on for K/2 more.
        rate: of learning.
        damping: λ, per example, in prediction and truth.
        questions: test points that are asked about.
        removed: points that are removed, drawn at random.
        linearised: of these, for which the linearised optimum is found.
        first: seed of the first repetition.
        seeds: repetitions.
    """

    train: int = 800
    hidden: int = 32
    epochs: int = 20
    rate: float = 0.06
    damping: float = 1e-2
    questions: int = 10
    removed: int = 60
    linearised: int = 12
    first: int = 200
    seeds: int = 3


@dataclass(frozen=True)
class Gaps:
    """Of one repetition.

    Attributes:
        seed: of the split, the start and the batches.
        loss: of training, at the end of the base.
        accuracy: on the test set.
        predicted: [questions, removed] change of log p by removing a point, nats.
        measured: truth -> the same, measured.
        distances: gap -> mean over removals of the mean distance of logits over the training set.
        optima: largest gradient of a proximal objective where its search ended, as a share of that at its start.
    """

    seed: int
    loss: float
    accuracy: float
    predicted: np.ndarray
    measured: dict[str, np.ndarray]
    distances: dict[str, float]
    optima: float

    def correlation(self, truth: str) -> tuple[float, float]:
        """Pearson and Spearman, the mean over questions."""
        pairs = self.predicted.T, self.measured[truth].T
        return float(pearson(*pairs).mean()), float(spearman(*pairs).mean())

    def pooled(self, truth: str) -> tuple[float, float]:
        """The same over all pairs of questions and removals together."""
        a, b = self.predicted.ravel(), self.measured[truth].ravel()
        return float(pearson(a, b)), float(spearman(a, b))


def study(settings: Settings, seed: int, folder: Path) -> Gaps:
    """Train, predict, and remove points in every way.

    Args:
        settings: of the study.
        seed: of everything that is drawn.
        folder: for the runs.
    """
    return _Study(settings, seed, folder).gaps()


class _Study:
    """One repetition, its base trained."""

    def __init__(self, settings: Settings, seed: int, folder: Path) -> None:
        self.settings, self.seed, self.folder = settings, seed, folder
        self.digits, self.sgd = Digits.split(seed, settings.train), Sgd(settings.rate)
        draw = np.random.default_rng(seed + 1)
        self.removed = torch.as_tensor(draw.permutation(settings.train)[: settings.removed])
        self.questions = torch.as_tensor(draw.permutation(len(self.digits.test_x))[: settings.questions])
        # The network of nothing left out goes along last.
        self.out = torch.cat([self.removed, torch.tensor([-1])])
        self.model = network(settings.hidden, seed)
        base = self._train(states_of(self.model, 1), torch.tensor([-1]), settings.epochs, seed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(base[name][0])

    def _train(self, states: State, out: Tensor, epochs: int, order: int, first: int = 0, pull: float = 0.0) -> State:
        return train(states, self.digits.x, self.digits.y, out, epochs, order, self.sgd, first, pull)

    def gaps(self) -> Gaps:
        """Everything."""
        settings, half = self.settings, self.settings.epochs // 2
        count = len(self.out)
        predicted, exact = self._influence("curvature.solver=pcg", "curvature.tolerance=1e-6")
        _, truncated = self._influence("curvature.solver=cg", "curvature.iterations=20", "curvature.tolerance=0")
        start = states_of(self.model, count)
        warm = self._train(states_of(self.model, count), self.out, half, self.seed, settings.epochs)
        near = self._train(states_of(self.model, count), self.out, half, self.seed, settings.epochs, settings.damping)
        same = self._anew([self.seed] * count, self.seed)
        other = self._anew([self.seed + 5000] * count, self.seed + 5000)
        own = self._anew([self.seed + 10_000 + place for place in range(count)], self.seed + 10_000)
        optimum, optima = self._proximal()
        pairs = {
            "proximal optimum": (optimum, start),
            "warm": (warm, warm),
            "cold, same seed": (same, same),
            "cold, another seed": (other, other),
            "cold, seeds of their own": (own, same),
        }
        chain = [same, warm, near, optimum, exact, truncated]
        with torch.no_grad():
            logits = self.model(self.digits.x)
            accuracy = (self.model(self.digits.test_x).argmax(1) == self.digits.test_y).double().mean()
        return Gaps(
            self.seed,
            float(nn.functional.cross_entropy(logits, self.digits.y)),
            float(accuracy),
            predicted,
            {
                truth: self._log_p(after)[:, :-1] - self._log_p(before)[:, -1:]
                for truth, (after, before) in pairs.items()
            },
            {gap: self._distance(*chain[place : place + 2]) for place, gap in enumerate(GAPS)},
            optima,
        )

    def _anew(self, starts: list[int], order: int) -> State:
        """Trained from the start, as long as what goes on from the base."""
        found = [dict(network(self.settings.hidden, seed).named_parameters()) for seed in starts]
        states = {name: torch.stack([one[name].detach() for one in found]) for name in found[0]}
        states = self._train(states, self.out, self.settings.epochs, order)
        return self._train(states, self.out, self.settings.epochs // 2, order, self.settings.epochs)

    def _influence(self, *solver: str) -> tuple[np.ndarray, State]:
        """Predicted changes, and the networks at the linearised optimum of the first removals; the last is the base."""
        settings, digits = self.settings, self.digits
        some = self.removed[: settings.linearised]
        removed = [{"id": f"z{row}", "features": digits.x[row], "label": int(digits.y[row])} for row in some]
        asked = [
            {"id": f"q{place}", "features": x, "label": y}
            for place, (x, y) in enumerate(digits.questions(self.questions))
        ]
        run = raylux.attribute(
            self.model, None, digits.pairs(), [*asked, *removed], folder=self.folder / "-".join(solver),
            overrides=[
                f"curvature.damping={settings.damping}", f"fit.sequences={settings.train}", "query.basis=standard",
                "query.max_error=0", "curvature.iterations=400", *solver,
            ],
        )  # fmt: skip
        scores = run.scores().sel(query=[one["id"] for one in asked]).to_numpy()
        store = RunFolder(run.folder)
        states = states_of(self.model, len(some) + 1)
        for layer in coverage(self._marked()).tracked:
            ids = [one["id"] for one in removed]
            solved: Any = read_layer_queries(store, query_files(store), layer.name, ids, torch.float64, "cpu")
            # s_test is of a loss: of −log p.
            change = torch.stack(solved) / settings.train
            states[f"{layer.name}.weight"][:-1] += change[..., :-1]
            states[f"{layer.name}.bias"][:-1] += change[..., -1]
        return -scores[:, self.removed.numpy()], states

    def _marked(self) -> nn.Module:
        return marked(self.model, features_read(self.model, self.digits.x.numpy()))

    def _proximal(self) -> tuple[State, float]:
        """Networks at the proximal Bregman optimum; the last is the base. And how far a search was from its end."""
        x, y, model = self.digits.x.numpy(), self.digits.y.numpy(), self._marked()
        rows = [TokenRow(one[None], class_labels(1, int(label))) for one, label in zip(x, y, strict=True)]
        layers = coverage(model).tracked
        damping = {layer.name: self.settings.damping for layer in layers}
        objective = ProximalObjective(model, layers, rows, damping, batch_tokens=len(rows))
        states, worst = states_of(self.model, len(self.out)), 0.0
        for place, row in enumerate(self.removed.tolist()):
            found = objective.optimum(rows[row], -1 / len(rows))
            worst = max(worst, found.gradient / found.start)
            for name, value in found.weights.items():
                states[name][place] = value.detach()
        return states, worst

    def _log_p(self, states: State) -> np.ndarray:
        """log p of each question's class at each network, [questions, R]."""
        logits = forward(states, self.digits.test_x[self.questions])
        labels = self.digits.test_y[self.questions]
        return logits.log_softmax(2)[:, torch.arange(len(labels)), labels].T.numpy()

    def _distance(self, one: State, other: State) -> float:
        """Mean distance of logits over the training set and the removals."""
        logits = forward(one, self.digits.x), forward(other, self.digits.x)
        count = min(map(len, logits)) - 1
        return float((logits[0][:count] - logits[1][:count]).norm(dim=2).mean())
