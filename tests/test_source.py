"""SOURCE: a segment of training as a spectral function, queries carried back through later ones; what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import Tensor

import raylux
from raylux.curvature import Spectral
from raylux.engine.shard import FactorShard
from raylux.engine.stages.carried import taken
from raylux.errors import UserError
from raylux.ledger import QUERY
from tests import reference
from tests import test_exact as exact
from tests.apart import processes
from tests.interrupts import Interrupt
from tests.small import Inputs, contents, differing, make_inputs
from tests.test_combined import attribute, moved

P, M = 3, 4


def spectral(seed: int, segment: float | None) -> Spectral:
    """A curvature in float64 with eigenvalues from 0 to some."""
    draw = torch.Generator().manual_seed(seed)
    values = 3 * torch.rand(P, M, generator=draw, dtype=torch.float64)
    values[0, 0] = 0.0
    bases = [torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0] for n in (M, P)]
    return Spectral(values, *bases, segment=segment)


def dense(curvature: Spectral, damping: float = 0.0) -> np.ndarray:
    """G + λ as a matrix [PM, PM], by its products."""
    columns = [curvature.multiply(unit.view(P, M)).reshape(-1) for unit in torch.eye(P * M, dtype=torch.float64)]
    return torch.stack(columns, 1).numpy() + damping * np.eye(P * M)


def response(matrix: np.ndarray, length: float) -> np.ndarray:
    """∫ exp(−sH) ds from 0 to h, by one exponential of a matrix twice the size."""
    size = len(matrix)
    joined = np.block([[-matrix, np.eye(size)], [np.zeros((size, 2 * size))]])
    return np.asarray(expm(length * joined)[:size, size:])


def vectors(seed: int, count: int) -> Tensor:
    return torch.randn(count, P, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------ one segment


@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_a_segment_is_the_integral_of_the_exponential(damping: float) -> None:
    curvature, (v,) = spectral(1, 0.7), vectors(2, 1)
    wanted = response(dense(curvature, damping), 0.7) @ v.reshape(-1).numpy()
    assert reference.difference(curvature.solve(v, damping).reshape(-1), wanted) < 1e-12
    carried = expm(-0.7 * dense(curvature, damping)) @ v.reshape(-1).numpy()
    solved = curvature.divide(curvature.into(v), damping)
    assert reference.difference(curvature.before(solved, damping).reshape(-1), carried) < 1e-12


def test_a_long_segment_is_the_damped_inverse_and_a_short_one_a_gradient_step() -> None:
    (v,) = vectors(3, 1)
    inverse = spectral(1, None).solve(v, 0.2)
    assert reference.difference(spectral(1, 1e4).solve(v, 0.2), inverse) < 1e-12
    for short in (1e-6, 1e-12):
        step = spectral(1, short).solve(v, 0.0) / short
        assert reference.difference(step, v) < 10 * short + 1e-14
    forgotten = spectral(1, 1e6)
    assert float(forgotten.before(forgotten.divide(forgotten.into(v), 0.2), 0.2).abs().max()) == 0.0


def test_the_default_damping_of_a_segment_is_none() -> None:
    assert spectral(1, 0.5).damping("auto") == 0.0 and spectral(1, 0.5).damping(0.3) == 0.3
    assert spectral(1, None).damping("auto") > 0


def test_two_segments_are_an_unrolled_training() -> None:
    """Gradient descent on a quadratic whose Hessian and extra gradient change once: error in proportion to the rate."""
    lengths, gradients, (asked,) = (0.8, 1.7), vectors(5, 2), vectors(6, 1)
    first, second = (spectral(seed, length) for seed, length in zip((1, 2), lengths, strict=True))
    last = second.divide(second.into(asked), 0.0)
    predicted = float((second.back(last) * gradients[1]).sum())
    predicted += float((first.solve(second.before(last, 0.0), 0.0) * gradients[0]).sum())

    def unrolled(steps: int) -> float:
        moved = np.zeros(P * M)
        for curvature, length, gradient in zip((first, second), lengths, gradients, strict=True):
            matrix, rate = dense(curvature), length / steps
            for _ in range(steps):
                moved = moved - rate * (matrix @ moved) + rate * gradient.reshape(-1).numpy()
        return float(asked.reshape(-1).numpy() @ moved)

    errors = [abs(unrolled(steps) - predicted) for steps in (500, 1000)]
    assert errors[1] < 2e-3 * abs(predicted)
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.05)


# ------------------------------------------------------------------------------------------- whole runs


Segment = Sequence[tuple[raylux.Run, Any]]
"""Its checkpoints, each a run and its model."""


def expected(segments: Sequence[Segment], kind: str, lengths: Sequence[float]) -> np.ndarray:
    """SOURCE by dense matrices and autograd [Q, N], the last segment first; of each the mean over its checkpoints."""
    run, last = segments[0][0]
    layers = run.settings["model"]["layers"]
    asked = [reference.question_gradient(last, layers, question) for question in exact.QUESTIONS]
    total = np.zeros((len(asked), len(exact.TEXTS)))
    carried = [{name: query[name].reshape(-1) for name in layers} for query in asked]
    for segment, length in zip(segments, lengths, strict=True):
        before = [{name: np.zeros_like(query[name]) for name in layers} for query in carried]
        for run, model in segment:
            fit = exact.fitted_on(run)
            grads = [reference.gradients(model, layers, example) for example in fit]
            pairs = [reference.token_pairs(model, layers, example) for example in fit]
            sequences = [reference.gradients(model, layers, example) for example in exact.corpus_of(run)]
            for name in layers:
                matrix = reference.curvature(kind, [g[name] for g in grads], [p[name] for p in pairs]).matrix
                took, left = response(matrix, length) / len(segment), expm(-length * matrix) / len(segment)
                for place, query in enumerate(carried):
                    solved = took @ query[name]
                    total[place] -= [solved @ sequence[name].reshape(-1) for sequence in sequences]
                    before[place][name] += left @ query[name]
        carried = before
    return total / len(exact.TEXTS)


def trained(folder: Path, models: Sequence[Sequence[Any]], lengths: Sequence[float], *how: str) -> list[Segment]:
    """Runs of a training, the last segment first; it ends with the first model."""
    segments: list[Segment] = []
    after: list[str] = []
    if len(models[0]) > 1:
        after = [attribute(models[0][0], folder / "end", "curvature.kind=identity").folder]
    for place, (checkpoints, length) in enumerate(zip(models, lengths, strict=True)):
        carried = [f"query.carried_from={json.dumps(after)}"] if after else []
        options = (*how, f"curvature.segment={length}", *carried)
        runs = [attribute(model, folder / f"{place}-{at}", *options) for at, model in enumerate(checkpoints)]
        segments.append(list(zip(runs, checkpoints, strict=True)))
        after = [run.folder for run in runs]
    return segments


LENGTHS = (0.3, 0.9)


def test_runs_of_segments_add_up_to_source(tmp_path: Path) -> None:
    how = ("curvature.kind=diagonal", "query.basis=standard", "fit.labels=dataset")
    segments = trained(tmp_path, [[exact.gpt2()], [moved(1)]], LENGTHS, *how)
    runs = [run for segment in segments for run, _ in segment]
    found = raylux.combine(runs)
    assert found.unit == "nats" and found.weights.tolist() == [1.0, 1.0]
    assert reference.difference(found.scores(), expected(segments, "diagonal", LENGTHS)) < 1e-9
    assert raylux.combine(runs, [1.0, 0.5]).unit == "weighted nats"
    alone = attribute(moved(1), tmp_path / "alone", *how, "curvature.segment=0.9")
    assert reference.difference(alone.scores(), runs[1].scores()) > 0.1, "its own queries are others"
    assert raylux.combine([runs[0], alone]).weights.tolist() == [0.5, 0.5], "two ends are no one training"


def test_checkpoints_of_a_segment_are_averaged(tmp_path: Path) -> None:
    """What each adds up and what each hands on; the earliest segment has one, in eigenbases of its own."""
    how = ("curvature.kind=ekfac", "query.basis=eigen", "fit.labels=dataset")
    segments = trained(tmp_path, [[exact.gpt2(), moved(2)], [moved(1)]], LENGTHS, *how)
    (last, _), (also, _) = segments[0]
    ((first, _),) = segments[1]
    found = raylux.combine([first, last, also])
    assert found.unit == "nats" and found.weights.tolist() == [1.0, 0.5, 0.5]
    assert reference.difference(found.scores(), expected(segments, "ekfac", LENGTHS)) < 1e-9
    for part in ([first, last], [first, last, last]):
        with pytest.raises(UserError, match="the others with it are not the whole of it") as error:
            raylux.combine(part)
        assert "\n" not in str(error.value)
    assert raylux.combine([first, last], [1.0, 1.0]).unit == "weighted nats"
    mixed = f"query.carried_from={json.dumps([last.folder, str(tmp_path / 'end')])}"
    with pytest.raises(UserError, match=r"curvature\.segment 0\.3 and None, so are not of one segment"):
        attribute(moved(1), tmp_path / "mixed", *how, "curvature.segment=0.9", mixed)


# ------------------------------------------------------------------------------------ bits, and what is refused


SHORT = ("fit.sequences=8", "score.token_top=0", "query.max_error=0")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def later(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> raylux.Run:
    return inputs.run(tmp_path_factory.mktemp("later") / "run", *SHORT, "curvature.segment=0.5")


def test_bits_over_workers_and_after_an_interruption(
    inputs: Inputs, later: raylux.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In process, query by query and interrupted; and with several workers and shards."""
    how = (*SHORT, "fit.seed=1", "curvature.segment=0.2", f"query.carried_from={later.folder}")
    usual = contents(inputs.run(tmp_path / "usual", *how).folder)
    more = ("engine.backend=ray", "engine.workers=2", "engine.shards=2")
    with processes():
        over = inputs.run(tmp_path / "processes", *how, *more)
    assert differing(contents(over.folder), usual) == []
    inputs.ask("a", "b")
    with monkeypatch.context() as patch:
        Interrupt(patch, FactorShard, "write_block", 1, False)
        with pytest.raises(KeyboardInterrupt):
            inputs.run(tmp_path / "run", *how)
    inputs.run(tmp_path / "run", *how)
    inputs.ask()
    assert differing(contents(inputs.run(tmp_path / "run", *how).folder), usual) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("curvature.segment=0.5", "curvature.kind=identity"), "kind=identity has no eigenvalues layer by layer"),
        (("curvature.segment=0.5", "curvature.kind=gauss_newton"), "kind=gauss_newton has no eigenvalues"),
        (("curvature.segment=0.5", "curvature.solver=pcg"), "which a segment does not take"),
        (("curvature.segment=0",), "greater than 0"),
        (("query.carried_from=LATER",), "segment of training and this one for none; set curvature.segment here too"),
        (("curvature.segment=0.5", "query.carried_from=nowhere"), "not a run folder"),
        (("curvature.segment=0.5", "query.carried_from=LATER", 'model.layers=["*up_proj"]'), "tracks other layers"),
    ],
)
def test_what_is_no_segment(
    inputs: Inputs, later: raylux.Run, tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        inputs.run(tmp_path / "run", *SHORT, *(one.replace("LATER", later.folder) for one in overrides))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_another_model_is_no_checkpoint_of_this_one(later: raylux.Run, tmp_path: Path) -> None:
    other = make_inputs(tmp_path / "other", "llama", num_hidden_layers=1, intermediate_size=20)
    with pytest.raises(UserError, match=r"'.*_proj' has the shape \(\d+, \d+\) there and .* checkpoints of one model"):
        other.run(tmp_path / "run", *SHORT, "curvature.segment=0.2", f"query.carried_from={later.folder}")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_carried(inputs: Inputs, tmp_path: Path) -> None:
    """A run without a segment, other queries, compressed ones, and those that were solved anew since."""
    how = ("curvature.segment=0.2", *SHORT)
    inputs.run(tmp_path / "plain", *SHORT)
    with pytest.raises(UserError, match="stands for no segment of training"):
        inputs.run(tmp_path / "run", *how, f"query.carried_from={tmp_path / 'plain'}")
    tight = ("query.max_error=0.3", "query.low_rank=always")
    inputs.run(tmp_path / "tight", *how, *tight)
    with pytest.raises(UserError, match=r"compressed; run it with query\.max_error=0"):
        inputs.run(tmp_path / "run", *how, f"query.carried_from={tmp_path / 'tight'}")
    inputs.ask("a")
    inputs.run(tmp_path / "later", *how)
    inputs.ask()
    with pytest.raises(UserError, match="has not solved the query 'b'"):
        inputs.run(tmp_path / "run", *how, f"query.carried_from={tmp_path / 'later'}")
    assert not (tmp_path / "run").exists()
    inputs.run(tmp_path / "later", *how)
    taken = inputs.run(tmp_path / "run", *how, f"query.carried_from={tmp_path / 'later'}")
    before = contents(taken.folder)
    inputs.run(tmp_path / "later", *how, "curvature.damping=0.1", restart="query")
    again = (*how, f"query.carried_from={tmp_path / 'later'}")
    with pytest.raises(UserError, match=r"has solved 'a' anew since.*add --restart query"):
        inputs.run(tmp_path / "run", *again)
    assert differing(contents(inputs.run(tmp_path / "run", *again, restart="query").folder), before)


def test_a_run_of_before_there_were_several_says_whence_it_carried() -> None:
    """Its ledger has one print of a query, where now there is a list."""
    metas: list[dict[str, Any]] = [{"carried": {"a": "one"}}, {"carried": {"b": ["one", "two"]}}, {}]
    units = {str(place): SimpleNamespace(meta=meta) for place, meta in enumerate(metas)}
    folder: Any = SimpleNamespace(units=lambda _: units)
    assert taken(folder) == {"a": ["one"], "b": ["one", "two"]}


def test_a_segment_is_no_proximal_step(later: raylux.Run) -> None:
    for command in (raylux.calibrate, raylux.verify):
        with pytest.raises(UserError, match=r"curvature.segment=0.5 predicts what a segment of training does"):
            command(later.folder, quiet=True)
    assert later.store.committed(QUERY) and not later.calibration
