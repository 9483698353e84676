"""Sequences left out one by one: the proximal optimum is that of an independent search, gaps are what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from raylux.config import Config
from raylux.engine.records import damping_of
from raylux.errors import NumericsError, UserError
from raylux.evaluation import evaluate, optimum, retraining
from raylux.evaluation import inputs as reading
from raylux.evaluation.outcome import Outcome
from raylux.store import RunFolder
from tests import classifiers
from tests.interrupts import Interrupt
from tests.small import Inputs, make_inputs, write_lines
from tests.test_evaluation import figures

ESTIMATORS = {"ekfac": [], "dot": ["curvature.kind=identity"], "other": ['model.layers="*.0.mlp.*"'], "words": ["bm25"]}
SMALL = {
    "tests": ["loo", "pbrf"], "estimators": ESTIMATORS, "epochs": 2, "warm_epochs": 1, "batch_tokens": 512,
    "seeds": 2, "sequences": 3, "draws": 100, "scored": "trained",
}  # fmt: skip
CLASSIFIED = {"tests": ["pbrf"], "estimators": {"ekfac": []}, "sequences": 3, "draws": 100}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def config(base: Inputs, folder: Path, *overrides: str, **said: Any) -> Config:
    sections = base.sections(folder / "run", evaluate={**SMALL, "folder": str(folder), **said})
    return Config.parse(
        sections, ["corpus.limit=16", "curvature.damping=5.0", 'model.layers="*.1.mlp.up_proj"', *overrides]
    )


@pytest.fixture(scope="module")
def usual(base: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return evaluate(config(base, tmp_path_factory.mktemp("usual") / "evaluate"))


def values(outcome: Outcome, figure: str) -> dict[str, float]:
    (found,) = (verdict.found.lds for verdict in outcome.verdicts if (verdict.test, verdict.figure) == ("pbrf", figure))
    return {name: one.value for name, one in found.items()}


def run_of(outcome: Outcome, name: str) -> Path:
    (place,) = (Path(outcome.folder) / "runs").glob(f"{name}-*")
    return place


def removed_of(outcome: Outcome) -> tuple[np.ndarray, optimum.Removed]:
    """Rows that were left out, and what is in the ledger of them."""
    units = RunFolder(outcome.folder).units("proximal")
    arrays = [np.reshape(units[name].meta["values"], units[name].meta["shape"]) for name in sorted(units)]
    return np.array([int(name.rpartition("-")[2]) for name in sorted(units)]), optimum.Removed.of(arrays)


def answers_of(outcome: Outcome, way: str, seed: int) -> np.ndarray:
    """f [1 + n, Q] in the ledger: with all sequences, then in no certain order without each."""
    units = RunFolder(outcome.folder).units("trained")
    names = [name for count in (0, 1) for name in sorted(units) if name.startswith(f"{way}-{count}-")]
    return np.array([units[name].meta["values"] for name in names if name.endswith(f"-{seed}")])


def test_figures_are_those_of_the_ledger(usual: Outcome) -> None:
    import raylux

    rows, found = removed_of(usual)
    assert len(rows) == 3 and (found.noise < 1e-3 * np.abs(found.change).max()).all()
    names = [f"s{row}" for row in rows]
    for name in ("ekfac", "dot", "other"):
        scores = raylux.open_run(run_of(usual, name)).scores().sel(query=list("abcd"), sequence=names).to_numpy()
        told = -scores.T.astype(np.float64)
        rank = [spearmanr(told[:, query], found.change[:, query]).statistic for query in range(4)]
        line = [pearsonr(told[:, query], found.change[:, query]).statistic for query in range(4)]
        assert values(usual, "Spearman")[name] == pytest.approx(np.mean(rank), abs=1e-12)
        assert values(usual, "Pearson")[name] == pytest.approx(np.mean(line), abs=1e-9)
        if name == "dot":
            assert name not in values(usual, "slope")
            continue
        assert values(usual, "slope")[name] == pytest.approx((told * found.change).sum() / (told**2).sum(), rel=1e-9)
        gap = np.sqrt(np.mean((found.linear - told) ** 2))
        for figure in ("gaps", "gaps of effects"):
            assert values(usual, figure)[f"5: linearised to {name}"] == pytest.approx(gap, rel=1e-9)
            linearised = np.sqrt(np.mean((found.change - found.linear) ** 2))
            assert values(usual, figure)["4: PBRF to linearised"] == pytest.approx(linearised, rel=1e-6)
    note = usual.notes["pbrf"]
    assert "those of 'ekfac', for all estimators. What they predict is another optimum: other tracks other" in note


def test_an_order_of_truths_and_distances_between_them(usual: Outcome) -> None:
    truths, gaps = values(usual, "by truth"), values(usual, "gaps")
    assert list(truths) == ["proximal optimum", "warm", "cold, same seed", "cold, another seed"]
    assert truths["proximal optimum"] == values(usual, "Spearman")["ekfac"]
    assert [name[:1] for name in gaps] == list("123455")
    # Without a certain order, means over sequences are what can be compared.
    _, found = removed_of(usual)
    near = answers_of(usual, "proximal", 0)
    assert len(near) == 4 and not len(answers_of(usual, "proximal", 1)), "the first seed alone"
    between = (near[1:].mean(0) - found.before - found.change.mean(0)) ** 2
    assert gaps["3: proximal to PBRF"] >= np.sqrt(between.mean()) > 0
    page = (Path(usual.folder) / "report" / "index.html").read_text(encoding="utf-8")
    assert "<th>truth</th>" in page and "<th>gap</th>" in page and "above 3: proximal to PBRF" in page
    table = usual.frame()
    assert set(table.loc[table["figure"] == "by truth", "estimator"]) == set(truths)


def before_the_optima(usual: Outcome, place: Path) -> Path:
    """A copy of an evaluation whose models are trained, and nothing else of it done."""
    left_out = shutil.ignore_patterns("proximal", "report")
    return Path(shutil.copytree(usual.folder, place / "evaluate", ignore=left_out))


def test_interrupted_it_goes_on_to_the_same_bits(
    base: Inputs, usual: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = before_the_optima(usual, tmp_path)
    Interrupt(monkeypatch, retraining, "removed", 2, after=False)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(base, folder))
    assert len(RunFolder(str(folder)).committed("proximal")) == 1 and not optimum._made
    assert figures(evaluate(config(base, folder))) == figures(usual)
    monkeypatch.setattr(retraining, "removed", None)
    assert figures(evaluate(config(base, folder))) == figures(usual), "nothing is computed again"


def test_without_the_linear_solve_the_last_gaps_are_one(
    base: Inputs, usual: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given_up(*_: Any) -> None:
        raise NumericsError("an error is left")

    monkeypatch.setattr("raylux.evaluate.ProximalObjective.linearised", given_up)
    found = evaluate(config(base, before_the_optima(usual, tmp_path), estimators={"ekfac": []}, seeds=1))
    gaps = values(found, "gaps")
    assert [name.partition(":")[0] for name in gaps] == ["1", "2", "3", "4 + 5"]
    assert "(4) and (5) are one" in found.notes["pbrf, gaps"] and "for 3 of 3 sequences" in found.notes["pbrf, search"]


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Config]:
    """A classifier of which the last linear is tracked alone: what is searched is convex."""
    base = Inputs(tmp_path_factory.mktemp("classifier"))
    classifiers.classifier("bert", torch.float32).save_pretrained(base.model)
    classifiers.tokenizer().save_pretrained(base.model)
    rows = [
        {"id": f"t{place}", "text": text, "label": label} for place, (text, label) in enumerate(classifiers.texts(12))
    ]
    write_lines(base.corpus, rows)
    write_lines(base.queries, [{"id": f"q{place}", **row} for place, row in enumerate(rows[:2])])
    sections = base.sections(base.base / "run", evaluate=CLASSIFIED)
    sections["corpus"] |= {"keep": [], "max_length": 32, "id": "id"}
    sections["model"]["layers"] = ["classifier"]
    said = Config.parse(sections)
    return evaluate(said), said


def test_the_optimum_is_that_of_an_independent_search(classified: tuple[Outcome, Config]) -> None:
    """Features are computed once; the rest is a multinomial regression with a penalty, minimised by itself."""
    outcome, said = classified
    read = reading.read(said)
    model = classifiers.classifier("bert", torch.float32).double()
    kept: list[torch.Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))

    def features(tokens: np.ndarray) -> torch.Tensor:
        model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None])
        return torch.cat([kept.pop()[0], torch.ones(1, dtype=torch.float64)])

    rows = [read.sequences.row(place) for place in range(12)]
    x = torch.stack([features(row[0]) for row in rows])
    y = torch.tensor([int(row[1][0]) for row in rows])
    asked = torch.stack([features(query.parts[0].tokens) for query in read.queries])
    chosen = torch.tensor([int(query.parts[0].labels[0]) for query in read.queries])
    handle.remove()
    start = torch.cat([model.classifier.weight, model.classifier.bias[:, None]], 1).detach()
    (damping,) = damping_of(RunFolder(str(run_of(outcome, "ekfac")))).values()
    log_p = (x @ start.T).log_softmax(1)

    def f(weights: torch.Tensor) -> torch.Tensor:
        return (asked @ weights.T).log_softmax(1)[torch.arange(2), chosen]

    def objective(weights: torch.Tensor, row: int) -> torch.Tensor:
        now = (x @ weights.T).log_softmax(1)
        divergence = (log_p.exp() * (log_p - now)).sum(1).mean()
        return divergence + now[row, y[row]] / 12 + damping / 2 * (weights - start).square().sum()

    places, found = removed_of(outcome)
    for place, row in enumerate(places.tolist()):
        weights = start.clone().requires_grad_(True)
        search = torch.optim.LBFGS(
            [weights], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure(weights: torch.Tensor = weights, row: int = row) -> torch.Tensor:
            weights.grad = None
            value = objective(weights, row)
            value.backward()
            return value

        search.step(closure)
        assert found.change[place] == pytest.approx((f(weights) - f(start)).detach().numpy(), rel=1e-4, abs=1e-8)
        # The Hessian of the divergence at its own minimum is G.
        hessian = torch.autograd.functional.hessian(lambda w: objective(w.view_as(start), 0), start.flatten())
        own = torch.autograd.functional.hessian(
            lambda w: (x[0] @ w.view_as(start).T).log_softmax(0)[y[0]] / 12, start.flatten()
        )
        slope = torch.autograd.functional.jacobian(lambda w, row=row: objective(w.view_as(start), row), start.flatten())
        step = torch.linalg.solve(hessian - own, -slope)
        linear = torch.autograd.functional.jacobian(lambda w: f(w.view_as(start)), start.flatten()) @ step
        assert found.linear[place] == pytest.approx(linear.numpy(), rel=1e-4, abs=1e-7)
    assert np.abs(found.change).max() > 1e-3 and np.abs(found.change - found.linear).max() > 1e-5


@pytest.mark.parametrize(
    ("said", "override", "line"),
    [
        (
            {"against": "words"},
            "",
            "tracked layers of 'words' (evaluate.against, or the first), and 'bm25' has neither",
        ),
        (
            {"against": "dot"},
            "",
            "and curvature.kind=identity has no λ; set evaluate.against to one with a fitted kind",
        ),
        ({}, "curvature.segment=1.0", "predicts what a segment of training does, not a proximal step"),
        ({}, "model.device_map=auto", "takes the whole model in float64 on one device; set model.device_map=null"),
        ({"sequences": 17}, "", "evaluate.sequences = 17: the corpus has 16 sequences, 17 are needed"),
    ],
)
def test_what_has_no_proximal_optimum_is_said_before_anything_is_written(
    base: Inputs, tmp_path: Path, said: dict[str, Any], override: str, line: str
) -> None:
    given = {"tests": "pbrf", "scored": "given", **said}
    with pytest.raises(UserError) as error:
        evaluate(config(base, tmp_path / "evaluate", *([override] if override else []), **given))
    assert line in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "evaluate").exists()


def test_experts_have_none(tmp_path: Path) -> None:
    base = make_inputs(tmp_path / "inputs", "mixtral")
    with pytest.raises(UserError, match="belongs to an expert, whose proximal optimum is not defined here"):
        reading.read(config(base, tmp_path / "evaluate", "model.layers=null", tests="pbrf", scored="given"))


def test_a_record_of_it_is_plain_json(usual: Outcome) -> None:
    assert json.loads((Path(usual.folder) / "report" / "evaluate.json").read_text(encoding="utf-8")) == usual.record()
