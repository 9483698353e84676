"""One family and seed: a small model, what each method predicts of some sequences, and what their copies do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import raylux
from jobs import calibration
from jobs import proximal_optimum as small
from jobs.kept import Arrays
from raylux.batches import TokenRow
from raylux.errors import UserError
from raylux.evaluate import ProximalObjective
from raylux.evaluate.datamodel import pearson
from raylux.evaluate.exact import exact_norms
from raylux.layers import coverage
from raylux.ledger import QUERY
from raylux.queries import parse_queries
from raylux.store import CorpusReader, RunFolder

EKFAC, DOT, FEW = "EK-FAC", "dot product", "EK-FAC, then 5 products (`pcg`)"
METHODS: dict[str, tuple[str, ...]] = {
    DOT: ("curvature.kind=identity",),
    "K-FAC": ("curvature.kind=kfac",),
    EKFAC: (),
    FEW: ("curvature.solver=pcg", "curvature.iterations=5"),
    "EK-FAC, then 30 products (`pcg`)": ("curvature.solver=pcg", "curvature.iterations=30"),
    "LiSSA, 100 products": ("curvature.solver=lissa", "curvature.iterations=100"),
    "LiSSA, 500 products": ("curvature.solver=lissa", "curvature.iterations=500"),
}
# What loading and storing take is left out: on a model this small they would be all that there is to see.
_BESIDE = ("load", "read", "write", "wait", "ask", "commit")
FIT = ("covariance", "eigenbases", "lambda")
SOLVE = ("query",)


@dataclass(frozen=True)
class Settings:
    """What is tried.

    Attributes:
        train: N, training sequences, all of them fitted.
        queries: held-out texts.
        added: training sequences that get a copy, each by itself, drawn at random.
        copies: how much of a copy.
        length: characters of a text; with ``width``, ``layers`` and ``steps`` as in jobs/proximal_optimum.py.
        width: see ``length``.
        layers: see ``length``.
        steps: see ``length``.
        seeds: 0, 1, …: of texts, weights and training.
    """

    train: int = 256
    queries: int = 6
    added: int = 24
    copies: float = 0.1
    length: int = 24
    width: int = 16
    layers: int = 2
    steps: int = 400
    seeds: int = 3

    def small(self, seed: int) -> small.Settings:
        """Of the model and its texts, the held-out ones among them."""
        return small.Settings(
            seed, self.train + self.queries, length=self.length, width=self.width, layers=self.layers, steps=self.steps
        )


@dataclass(frozen=True)
class Predicted:
    """Of a method.

    Attributes:
        scores: [queries, added].
        fit: CPU seconds of fitting the curvature.
        solve: of solving the queries.
        scale: LiSSA's s; NaN for the others.
    """

    scores: np.ndarray
    fit: float
    solve: float
    scale: float


@dataclass(frozen=True)
class Outcome:
    """Of one family and seed.

    Attributes:
        family: see ``jobs/calibration.py``.
        seed: see ``Settings``.
        predicted: method -> what it said.
        measured: [queries, added] change of f per copy, in nats.
        left: largest share of the gradient that was left where a search ended.
    """

    family: str
    seed: int
    predicted: dict[str, Predicted]
    measured: np.ndarray
    left: float

    def pearson(self, method: str) -> np.ndarray:
        """[queries] over the sequences of each query."""
        return pearson(self.predicted[method].scores.T, self.measured.T)

    def arrays(self) -> Arrays:
        """As ``jobs.kept`` has it."""
        found = list(self.predicted.values())
        return {
            "scores": np.stack([one.scores for one in found]),
            "times": np.array([(one.fit, one.solve, one.scale) for one in found]),
            "measured": self.measured,
            "left": np.array(self.left),
        }

    @classmethod
    def of(cls, arrays: Arrays, family: str, seed: int) -> Outcome:
        """What ``arrays`` gave."""
        rows = zip(METHODS, arrays["scores"], arrays["times"], strict=True)
        predicted = {method: Predicted(scores, *map(float, times)) for method, scores, times in rows}
        return cls(family, seed, predicted, arrays["measured"], float(arrays["left"]))


def outcome(settings: Settings, family: str, seed: int, folder: Path) -> Outcome:
    """Train, let every method predict, measure."""
    own, random = settings.small(seed), np.random.default_rng(seed)
    texts = small._texts(own, random)
    train, chosen = texts[: settings.train], random.choice(settings.train, settings.added, replace=False)
    asked = small._questions(texts, range(settings.train, len(texts)))
    tokenizer = small._tokenizer(settings.length)
    rows = [tokenizer(text)["input_ids"] for text in train]
    model = small._train(own, rows, calibration.FAMILIES[family])
    exact_norms(model)
    base = [f"score.train_size={settings.train}", "query.max_error=0", "score.token_top=0"]

    def run(place: Path, more: Sequence[str]) -> raylux.Run:
        return raylux.attribute(model, tokenizer, train, asked, folder=place, overrides=[*base, *more])

    predicted: dict[str, Predicted] = {}
    for number, (method, overrides) in enumerate(METHODS.items()):
        # What one number of LiSSA's products has found out need not be tried again by the next.
        known = np.nanmax([1.0, *(one.scale for one in predicted.values())])
        predicted[method] = _predict(run, folder / str(number), overrides, chosen, float(known))
    store = RunFolder(str(folder / str(list(METHODS).index(EKFAC))))
    (manifest,) = store.units(QUERY).values()
    sequences = CorpusReader(store).rows(np.arange(settings.train))
    parts = [query.parts[0] for query in parse_queries(asked, tokenizer, len(tokenizer), settings.length)]
    objective = ProximalObjective(model, coverage(model).tracked, sequences, manifest.meta["damping"], draws=own.draws)
    queries = [TokenRow(part.tokens, part.labels) for part in parts]
    before, changes, left = objective.logprobs(queries), [], 0.0
    for place in chosen:
        optimum = objective.optimum(sequences[place], settings.copies / settings.train, own.iterations, 1e-4, None)
        changes.append(((objective.logprobs(queries, optimum.weights) - before) / settings.copies).numpy())
        left = max(left, optimum.gradient / optimum.start)
    return Outcome(family, seed, predicted, np.stack(changes, 1), left)


def _predict(
    run: Callable[[Path, Sequence[str]], raylux.Run],
    place: Path,
    overrides: Sequence[str],
    chosen: np.ndarray,
    known: float,
) -> Predicted:
    """A method's scores of the chosen sequences, and its time by the run's own profile."""
    scale = float("nan")
    if "curvature.solver=lissa" in overrides:
        found, scale = _converged(run, place, overrides, known)
    else:
        found = run(place, overrides)
    fit = solve = 0.0
    for stage in found.profile():
        seconds = sum(cpu for kind, (_, cpu) in stage.work.kinds.items() if kind not in _BESIDE)
        fit += seconds if stage.stage in FIT else 0.0
        solve += seconds if stage.stage in SOLVE else 0.0
    return Predicted(found.scores().to_numpy()[:, chosen], fit, solve, scale)


def _converged(
    run: Callable[[Path, Sequence[str]], raylux.Run], place: Path, overrides: Sequence[str], scale: float
) -> tuple[raylux.Run, float]:
    """LiSSA with the smallest s of ``scale``, 2 ``scale`` … that does not diverge, as trying finds it; and that s."""
    while True:
        try:
            return run(place / f"{scale:g}", [*overrides, f"curvature.scale={scale}"]), scale
        except UserError as error:
            if "diverges" not in str(error):
                raise
        scale *= 2
