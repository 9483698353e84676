"""The solvers on a small language model, held against the dense Gauss-Newton matrix in float64."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import raylux
from jobs import proximal_optimum as small
from raylux.batches import IGNORED, Batch, TokenRow, collate, fit_batches
from raylux.capture import Capture
from raylux.curvature import KINDS, Spectral
from raylux.curvature.gauss_newton import add_products
from raylux.curvature.solvers import SOLVERS, Rule, solve_here
from raylux.engine.plan import choose_fit_rows
from raylux.engine.records import factor_files, read_basis
from raylux.engine.stages.fit import rows_per_sequence
from raylux.influence.dots import sequence_gradients
from raylux.layers import TrackedLayer, coverage
from raylux.ledger import COVARIANCE, EIGEN, MOMENTS, QUERY
from raylux.queries import parse_queries
from raylux.store import CorpusReader, RunFolder

KIND = "ekfac"


@dataclass(frozen=True)
class Setting:
    """What is tried: the model and texts of jobs/proximal_optimum.py, and a fit on some of them."""

    seed: int = 0
    fitted: int = 128
    queries: int = 6
    batch: int = 32

    @property
    def model(self) -> small.Settings:
        return small.Settings(self.seed)


@dataclass(frozen=True)
class Curve:
    """One solver at one damping, after each product; means over queries, and the worst of them.

    Attributes:
        counts: products taken [k].
        error: ‖x − x*‖ / ‖x*‖ [k], and ``score`` the least Pearson correlation over queries of the scores with x
            and with x*, on all training sequences [k].
    """

    solver: str
    damping: float
    counts: list[int]
    error: list[float]
    score: list[float]


@dataclass(frozen=True)
class Found:
    """Of one seed.

    Attributes:
        parameters: tracked, D.
        condition: of G + λ, by damping.
        direct: ‖x − x*‖ / ‖x*‖ and score correlation (least over queries) of the direct solve, by damping.
        curves: by solver and damping.
        runs: solver -> least and mean correlation over queries of a whole run's scores with the exact ones.
        products: of that run.
        slopes: of the preconditioned run.
    """

    seed: int
    parameters: int
    condition: dict[float, float]
    direct: dict[float, tuple[float, float]]
    curves: list[Curve]
    runs: dict[str, tuple[float, float]]
    products: dict[str, int]
    slopes: list[float]


def dense_gauss_newton(model: nn.Module, layers: Sequence[TrackedLayer], rows: Sequence[TokenRow]) -> Tensor:
    """Σ_it J'HJ [D, D], by Jacobians of one sequence's logits at a time; none of raylux's own derivatives is used."""
    names = [f"{layer.name}.{leaf}" for layer in layers for leaf in (("weight", "bias") if layer.bias else ("weight",))]
    own = dict(model.named_parameters())
    weights = [own[name].requires_grad_(True) for name in names]
    size = sum(layer.parameters for layer in layers)
    total = torch.zeros(size, size, dtype=torch.float64)
    for row in rows:
        logits = model(input_ids=torch.as_tensor(np.asarray(row.tokens, np.int64))[None]).logits[0]
        counted = torch.as_tensor(np.asarray(row.labels[1:]) != IGNORED)
        logits = logits[:-1][counted]
        eye = torch.eye(logits.numel(), dtype=logits.dtype).view(-1, *logits.shape)
        grads = torch.autograd.grad(logits, weights, eye, is_grads_batched=True)
        jacobian = _by_layer(layers, grads).view(*logits.shape, size)
        p = logits.detach().softmax(-1)
        centred = jacobian - (p.unsqueeze(-1) * jacobian).sum(1, keepdim=True)
        half = (p.sqrt().unsqueeze(-1) * centred).reshape(-1, size)
        total += half.T @ half
    for weight in weights:
        weight.requires_grad_(False)
    return total


def _by_layer(layers: Sequence[TrackedLayer], grads: Sequence[Tensor]) -> Tensor:
    """[n, D] in the order of the layers' [P, M]."""
    left, parts = iter(grads), []
    for layer in layers:
        weight = next(left)
        weight = weight.mT if layer.conv1d else weight
        parts.append((torch.cat([weight, next(left).unsqueeze(-1)], -1) if layer.bias else weight).flatten(1))
    return torch.cat(parts, 1)


class _Problem:
    """A fitted run in memory: gradients, factors, and products with G."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        rng = np.random.default_rng(setting.seed)
        self.setting, settings = setting, setting.model
        self.texts = small._texts(settings, rng)
        self.tokenizer = small._tokenizer(settings.length)
        self.model = small._train(settings, [self.tokenizer(text)["input_ids"] for text in self.texts])
        self.asked = small._questions(self.texts, rng.choice(settings.train, setting.queries, replace=False))
        self.layers = coverage(self.model).tracked
        self.run = self.attribute(folder / "direct", "direct")
        self.capture = Capture(self.model, self.layers)
        store = RunFolder(self.run.folder)
        reader = CorpusReader(store)
        self.rows = reader.rows(range(len(reader)))
        ids = self.run.sequences["sequence"].tolist()
        chosen = choose_fit_rows(ids, setting.fitted, self.run.config.fit.seed)
        self.fitted = [self.rows[int(row)] for row in chosen]
        (manifest,) = store.units(QUERY).values()
        self.damping: dict[str, float] = manifest.meta["damping"]
        self.curvatures = {layer.name: _curvature(store, layer) for layer in self.layers}
        parts = [q.parts[0] for q in parse_queries(self.asked, self.tokenizer, len(self.tokenizer), settings.length)]
        self.gradients = [self.gradient(TokenRow(part.tokens, part.labels)) for part in parts]
        self.candidates = torch.stack([_flat(self.gradient(row)) for row in self.rows])
        self._whole: list[Batch] | None = None

    def attribute(self, folder: Path, solver: str, *more: str) -> raylux.Run:
        overrides = [f"curvature.kind={KIND}", f"curvature.solver={solver}", f"fit.sequences={self.setting.fitted}"]
        overrides += [f"curvature.batch={self.setting.batch}", "query.max_error=0", "score.token_top=0", *more]
        return raylux.attribute(self.model, self.tokenizer, self.texts, self.asked, folder=folder, overrides=overrides)

    def gradient(self, row: TokenRow) -> dict[str, Tensor]:
        """Σ_t g_t a_tᵀ of one sequence, by layer."""
        captured = self.capture.run(collate([row], [0], len(row.tokens)))
        return {x.name: sequence_gradients(captured.inputs[x.name], captured.grads[x.name])[0] for x in self.layers}

    def products(self, krylov: bool) -> object:
        """G times vectors: over all fitted sequences, or over a batch drawn for each iteration, as the engine draws."""

        def product(iteration: int, vectors: Sequence[dict[str, Tensor]]) -> list[Mapping[str, Tensor]]:
            rows = self.fitted
            if not krylov:
                draw = np.random.default_rng([0, iteration])
                places = np.sort(draw.choice(len(rows), min(self.setting.batch, len(rows)), replace=False))
                rows = [rows[place] for place in places]
            totals = [{x.name: torch.zeros(x.shape, dtype=torch.float64) for x in self.layers} for _ in vectors]
            for batch in fit_batches(rows, 1024):
                add_products(self.capture, batch, vectors, totals)
            return [{name: part / len(rows) for name, part in total.items()} for total in totals]

        return product


def _curvature(store: RunFolder, layer: TrackedLayer) -> Spectral:
    q_a, q_s = read_basis(store, factor_files(store), layer.name, layer.name, torch.float64, "cpu")
    values = [
        torch.as_tensor(store.group(store.manifest(EIGEN, f"{side}:{layer.name}").meta["key"]).read("values"))
        for side in "AS"
    ]
    key = store.manifest(MOMENTS, layer.name).meta["key"]
    moments = torch.as_tensor(store.group(key).read("matrix"))
    rows = rows_per_sequence(store.units(COVARIANCE))[layer.name]
    return KINDS[KIND].assemble(q_a, q_s, values[0], values[1], moments, rows)


def _flat(vector: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in vector.values()])


def correlations(found: Tensor, wanted: Tensor) -> Tensor:
    """Pearson over sequences of each query; [Q, N] both."""
    x, y = found - found.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True)
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))


def study(setting: Setting, shares: Sequence[float], solvers: Mapping[str, tuple[int, float]]) -> Found:
    """Fit, take the dense inverse, and follow each solver.

    Args:
        setting: what is tried.
        shares: λ of each layer as a multiple of the run's own (0.1 × mean Λ).
        solvers: name in the page -> (iterations, step); the solver is the name's first word.
    """
    with tempfile.TemporaryDirectory(prefix="raylux-solvers-") as name:
        problem = _Problem(setting, Path(name))
        g = dense_gauss_newton(problem.model, problem.layers, problem.fitted) / len(problem.fitted)
        asked = torch.stack([_flat(v) for v in problem.gradients])
        condition, direct, curves = {}, {}, []
        runs, products, slopes = {}, {}, []
        for share in shares:
            damping = {layer: share * value for layer, value in problem.damping.items()}
            diagonal = torch.cat([torch.full((x.parameters,), damping[x.name]) for x in problem.layers]).double()
            damped = g + torch.diag(diagonal)
            values = torch.linalg.eigvalsh(damped)
            condition[share] = float(values[-1] / values[0])
            exact = torch.linalg.solve(damped, asked.T).T
            wanted = exact @ problem.candidates.T
            start = torch.stack(
                [
                    _flat({n: c.solve(v[n], damping[n]) for n, c in problem.curvatures.items()})
                    for v in problem.gradients
                ]
            )
            direct[share] = _against(start, exact, problem.candidates, wanted)
            if share == 1.0:
                for solver, run in _runs(problem, Path(name)):
                    scores = torch.as_tensor(run.scores().to_numpy())
                    found = correlations(scores, wanted)
                    runs[solver] = float(found.min()), float(found.mean())
                    if solver != "direct":
                        products[solver] = int(run.solves()["products"].max())
                        slopes = [float(x) for x in run.solves()["slope"]]
            for label, (iterations, step) in solvers.items():
                curves.append(_curve(problem, label, share, damping, iterations, step, exact, wanted))
                print(label, share, [f"{x:.2e}" for x in curves[-1].error[:: max(1, iterations // 6)]], flush=True)
    return Found(setting.seed, len(g), condition, direct, curves, runs, products, slopes)


def _runs(problem: _Problem, folder: Path) -> Iterator[tuple[str, raylux.Run]]:
    yield "direct", problem.run
    yield "pcg", problem.attribute(folder / "pcg", "pcg")


def _curve(
    problem: _Problem,
    label: str,
    share: float,
    damping: Mapping[str, float],
    iterations: int,
    step: float,
    exact: Tensor,
    wanted: Tensor,
) -> Curve:
    solver = SOLVERS[label.split()[0]]
    error, score = [], []

    def watch(_: int, found: list[dict[str, Tensor]]) -> None:
        x = torch.stack([_flat(one) for one in found])
        one, least = _against(x, exact, problem.candidates, wanted)
        error.append(one)
        score.append(least)

    rule = Rule(solver, iterations, 0.0, step)
    solve_here(problem.products(solver.krylov), problem.gradients, problem.curvatures, damping, rule, watch)
    return Curve(label, share, list(range(1, len(error) + 1)), error, score)


def _against(x: Tensor, exact: Tensor, candidates: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Mean relative error over queries, and the least score correlation."""
    error = ((x - exact).norm(dim=1) / exact.norm(dim=1)).mean()
    return float(error), float(correlations(x @ candidates.T, wanted).min())
