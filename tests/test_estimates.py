"""Two-stage scoring: exact scores of chosen pairs, and runs in two stages against runs of every pair."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import raylux
from raylux.api import run_stages
from raylux.engine import estimating
from raylux.engine.bars import Bars
from raylux.engine.captures import GIVEN, CapturedSequences
from raylux.engine.records import Contraction
from raylux.engine.stages import two_stage
from raylux.engine.stages.evidence import closing, trust_of_wave
from raylux.engine.stages.thresholds import Estimates, Trust
from raylux.errors import UserError
from raylux.influence.dots import Held
from raylux.influence.pairs import PairQueries
from raylux.influence.surveys import Cut, Survey
from raylux.ledger import SCORE, WAVES
from raylux.store import RunFolder
from tests.apart import processes
from tests.interrupts import Interrupt
from tests.small import Inputs, make_inputs

P, M, N, T, Q = 40, 21, 24, 8, 12


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def layer() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """V, a, g and the scores [N, Q] of all pairs."""
    v, a, g = list(drawn(Q, P, M)), drawn(N, T, M, seed=1), drawn(N, T, P, seed=2)
    return v, a, g, torch.einsum("ntp,ntm,qpm->nq", g, a, torch.stack(v))


@pytest.mark.parametrize("low", [False, True])
def test_chosen_pairs_have_the_scores_of_all_pairs(layer: tuple, low: bool) -> None:
    v, a, g, exact = layer
    given: list = list(v)
    for place in range(1, Q, 2) if low else ():
        u, s, right = torch.linalg.svd(v[place], full_matrices=False)
        given[place] = u * s, right.T
    held = PairQueries.build((P, M), given)
    batches = [(a[:10], g[:10]), (a[10:], g[10:])]
    torch.testing.assert_close(held.scores(batches, None, 8), exact, rtol=1e-10, atol=1e-9)
    chosen = drawn(N, Q, seed=5) > 1
    found = held.scores(batches, chosen, 8)
    torch.testing.assert_close(found, torch.where(chosen, exact, 0.0), rtol=1e-10, atol=1e-9)
    # Which other pairs are chosen makes no difference.
    more = chosen | (drawn(N, Q, seed=6) > 1)
    assert torch.equal(held.scores(batches, more, 8)[chosen], found[chosen])


def test_queries_of_low_rank_that_nobody_wants_are_not_read(layer: tuple) -> None:
    v, a, g, exact = layer
    read: list[int] = []

    def hold(x: torch.Tensor) -> Held:
        own = len(read)
        read.append(0)

        def lend() -> torch.Tensor:
            read[own] += 1
            return x

        return lend

    held = PairQueries.build((P, M), [(q, torch.eye(M, dtype=torch.float64)) for q in v], hold)
    chosen = torch.zeros(N, Q, dtype=torch.bool)
    chosen[3, 5] = chosen[20, 5] = chosen[7, 1] = True
    found = held.scores([(a[:10], g[:10]), (a[10:], g[10:])], chosen, 8)
    torch.testing.assert_close(found, torch.where(chosen, exact, 0.0), rtol=1e-10, atol=1e-9)
    assert read == [int(query in (1, 5)) for query in range(Q)]


# runs

BEST = 4
TWO = (f"score.best={BEST}", "score.layers=false", "score.token_top=2", "score.unit_size=10", "prefilter.kind=none")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("two"), "gpt2", hidden_size=24, intermediate_size=48)


def sees_most(surveys: Mapping[str, Survey], *_: object) -> dict[str, Cut]:
    """The smallest block of each layer that has this share of its scores' variance."""
    found = {}
    for name, survey in surveys.items():
        cuts = [survey.cut(*place) for place in np.argwhere(survey.held >= 0.999)]
        found[name] = min(cuts, key=lambda cut: math.prod(cut.seen.block))
    return found


def sees_little_first(surveys: Mapping[str, Survey], *_: object) -> dict[str, Cut]:
    """The same, a quarter of it first."""
    cuts = sees_most(surveys)
    assert any(min(cut.seen.block) > 4 for cut in cuts.values())
    return {name: replace(cut, first=max(1, min(cut.seen.block) // 4)) for name, cut in cuts.items()}


@pytest.fixture(autouse=True)
def small_pilots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small corpus has a pilot, is worth two stages, and is not seen whole."""
    monkeypatch.setattr(estimating, "choose", sees_little_first)
    monkeypatch.setattr("raylux.cost.two_stage.PILOT_LEAST", 15)
    monkeypatch.setattr(two_stage, "relative_cost", lambda *_, **__: 0.0)


def estimated(folder: Path) -> dict[str, list]:
    """Manifests of score blocks by their stage."""
    found: dict[str, list] = {}
    for manifest in RunFolder(str(folder)).units(SCORE).values():
        found.setdefault(manifest.meta.get("two_stage", ""), []).append(manifest)
    return found


@pytest.fixture(scope="module")
def every(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Scores of all pairs [Q, N]."""
    more = ("score.layers=false", "prefilter.kind=none")
    return inputs.run(tmp_path_factory.mktemp("every") / "run", *more).scores().to_numpy()


@pytest.mark.parametrize("choose", [sees_most, sees_little_first])
def test_the_best_have_their_scores_and_others_are_left_out(
    inputs: Inputs, tmp_path: Path, every: np.ndarray, monkeypatch: pytest.MonkeyPatch, choose: Callable
) -> None:
    monkeypatch.setattr(estimating, "choose", choose)
    run = inputs.run(tmp_path, *TWO)
    blocks = estimated(tmp_path)
    assert set(blocks) >= {"pilot", "estimated"}
    scores = run.scores().to_numpy()
    there = ~np.isnan(scores)
    assert 0.1 < there.mean() < 0.8, there.mean()
    np.testing.assert_allclose(scores[there], every[there], rtol=1e-3, atol=1e-4 * every.std())
    kth = np.sort(every, 1)[:, -BEST]
    assert there[every >= kth[:, None]].mean() >= 0.9
    # Whatever may reach the K-th best by its estimate and the margin is scored.
    (facts,) = (m.meta for name, m in run.store.units(WAVES).items() if name.startswith("found"))
    assert facts["share"] == pytest.approx(there.mean())
    looked_at: list[np.ndarray] = []
    for manifest in blocks["estimated"]:
        group = run.store.group(manifest.meta["key"])
        own_estimates = Estimates.read(group, range(len(manifest.meta["queries"])))
        assert ("refined" in group) == (choose is sees_little_first)
        looked_at.append(own_estimates.refined.reshape(-1))
        places = [run.queries.index(query) for query in manifest.meta["queries"]]
        own = scores[np.ix_(places, manifest.meta["rows"])]
        high = own_estimates.reach(closing(run.store, manifest.meta["queries"], BEST, 0.99).bars)
        assert there[np.ix_(places, manifest.meta["rows"])][high].all(), own
    assert 0.05 < np.concatenate(looked_at).mean() < 1 or choose is sees_most
    top = run.top("a", BEST)
    assert np.isfinite(top["influence"]).all() and len(top) == BEST
    assert "of the pairs scored" in next(x.detail for x in run.status() if x.name == "score")
    with pytest.raises(UserError, match=r"5 sequences are asked for and the best 4 .* score.best=null"):
        run.top("a", 5)
    with pytest.raises(UserError, match="documents sum up"):
        run.top("a", 2, by="document")


def test_what_waves_miss_is_found_in_the_end(
    inputs: Inputs, tmp_path: Path, every: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the pilot's best needed, of which such margins would allow little."""

    def narrow(*call: object) -> Trust:
        found = trust_of_wave(*call)  # type: ignore[arg-type]
        return replace(found, rooms=-np.abs(found.rooms))

    monkeypatch.setattr(two_stage, "trust_of_wave", narrow)
    scores = inputs.run(tmp_path, *TWO).scores().to_numpy()
    blocks, there = estimated(tmp_path), ~np.isnan(scores)
    kth = np.sort(every, 1)[:, -BEST]
    assert there[every >= kth[:, None]].mean() >= 0.9 and there.mean() < 0.9
    before = [x.meta["rows"] for stage in ("pilot", "estimated") for x in blocks[stage]]
    assert sum(map(len, before)) == every.shape[1] and blocks["chosen"]
    store = RunFolder(str(tmp_path))
    found = closing(store, list("abcd"), BEST, 0.99)
    assert found.recall is not None and found.recall >= 0.9
    # Units of before do not tell what they missed: what may be among the best is scored there, too.
    monkeypatch.setattr("raylux.engine.stages.evidence._has_bars", lambda _: False)
    assert np.isfinite(closing(store, list("abcd"), BEST, 0.99).bars.limits).all()


@pytest.mark.parametrize("single", [False, True], ids=["on a CPU", "as on a GPU"])
def test_products_in_bf16(
    inputs: Inputs, tmp_path: Path, every: np.ndarray, monkeypatch: pytest.MonkeyPatch, single: bool
) -> None:
    """What the fit has kept in bf16 serves both stages, unless they want float32."""
    how = ("engine.contraction_dtype=bfloat16", "prefilter.kind=none", "engine.batch_tokens=8")
    whole = inputs.run(tmp_path / "every", *how, "score.layers=false").scores().to_numpy()
    if single:
        monkeypatch.setattr(two_stage, "_contraction", lambda _: Contraction("float32"))
    served, usual = [], CapturedSequences.batch

    def watched(self: CapturedSequences, *call: object) -> object:
        found = usual(self, *call)  # type: ignore[arg-type]
        served.extend([call[2]] * (found is not None))
        return found

    monkeypatch.setattr(CapturedSequences, "batch", watched)
    scores = inputs.run(tmp_path / "two", *TWO, *how, "score.token_top=0").scores().to_numpy()
    assert {"pilot", "estimated"} <= set(estimated(tmp_path / "two")) and (GIVEN in served) != single
    there = ~np.isnan(scores)
    assert 0.1 < there.mean() < 0.8
    assert np.abs((scores - whole)[there]).max() < (0.05 if single else 0.02) * every.std()
    kth = np.sort(every, 1)[:, -BEST]
    assert there[every >= kth[:, None]].mean() >= 0.9


def test_what_was_left_out_is_scored_when_it_is_asked_for(inputs: Inputs, tmp_path: Path, every: np.ndarray) -> None:
    few = ~np.isnan(inputs.run(tmp_path, *TWO).scores().to_numpy())
    more = ~np.isnan(inputs.run(tmp_path, *TWO, f"score.best={8 * BEST}").scores().to_numpy())
    assert more[few].all() and more.sum() > few.sum()
    whole = inputs.run(tmp_path, *TWO, "score.best=null")
    np.testing.assert_allclose(whole.scores().to_numpy(), every, rtol=1e-3, atol=1e-4 * every.std())
    assert len(whole.top("a", 20)) == 20


def test_what_few_rows_of_each_unit_were_left_out_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        two_stage.Pairs(("a", "b"), np.array([7, 9]), np.array([[True, False], [False, True]])),
        two_stage.Pairs(("c",), np.array([3, 7]), np.array([[True, True]])),
        two_stage.Pairs(("b",), np.array([1]), np.array([[True]])),
    ]
    monkeypatch.setattr(two_stage, "_left", lambda *_: iter(parts))
    ctx: Any = SimpleNamespace(plan=SimpleNamespace(score_unit_size=4))
    (first, chosen), (second, rest) = two_stage._jobs(ctx, "abc", Bars.of("abc", {}))
    assert (first.queries, first.rows.tolist()) == (("a", "b", "c"), [3, 7, 9])
    assert chosen.tolist() == [[False, True, False], [False, False, True], [True, True, False]]
    assert (second.queries, second.rows.tolist(), rest.tolist()) == (("b",), [1], [[True]])


def test_more_queries_on_the_same_folder(inputs: Inputs, tmp_path: Path, every: np.ndarray) -> None:
    inputs.ask("a", "b")
    try:
        inputs.run(tmp_path, *TWO)
    finally:
        inputs.ask()
    run = inputs.run(tmp_path, *TWO)
    scores = run.scores().sel(query=list("abcd")).to_numpy()
    there = ~np.isnan(scores)
    assert there.any(1).all() and there.mean() < 0.9
    np.testing.assert_allclose(scores[there], every[there], rtol=1e-3, atol=1e-4 * every.std())


def test_waves_have_units_of_the_usual_size(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that leaves some for each worker; the same pairs are scored, with the same bits."""
    monkeypatch.setattr("raylux.cost.two_stage.PILOT_LEAST", 8)
    larger = (*TWO, "score.unit_size=16")
    inputs.run(tmp_path / "whole", *larger)
    monkeypatch.setattr(two_stage, "_EACH", 100)
    inputs.run(tmp_path / "small", *larger)
    whole, small = (estimated(tmp_path / name) for name in ("whole", "small"))
    assert len(whole["pilot"]) == len(small["pilot"]) and len(whole["estimated"]) < len(small["estimated"])
    assert max(len(x.meta["rows"]) for x in whole["estimated"]) <= 16
    assert same(tmp_path / "whole", tmp_path / "small")


def test_where_estimates_say_little_every_pair_is_scored(
    inputs: Inputs, tmp_path: Path, every: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_stage, "relative_cost", lambda *_, **__: 1.0)
    run = inputs.run(tmp_path, *TWO)
    assert set(estimated(tmp_path)) == {"pilot", ""}
    np.testing.assert_allclose(run.scores().to_numpy(), every, rtol=1e-3, atol=1e-4 * every.std())


def test_who_gave_up_goes_on_without_another_pilot(
    inputs: Inputs, tmp_path: Path, every: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in units of the usual size, which no wave has."""
    monkeypatch.setattr(two_stage, "relative_cost", lambda *_, **__: 1.0)
    monkeypatch.setattr("raylux.cost.two_stage.PILOT_LEAST", 8)
    usual = RunFolder.commit

    def until_plain(folder: RunFolder, stage: str, *args: object, **meta: object) -> object:
        done = usual(folder, stage, *args, **meta)  # type: ignore[arg-type]
        if stage == SCORE and "two_stage" not in meta:
            raise KeyboardInterrupt
        return done

    larger = (*TWO, "score.unit_size=16")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "commit", until_plain)
        with pytest.raises(KeyboardInterrupt):
            inputs.run(tmp_path / "two", *larger)
    pilots = len(estimated(tmp_path / "two")["pilot"])
    run = inputs.run(tmp_path / "two", *larger)
    np.testing.assert_allclose(run.scores().to_numpy(), every, rtol=1e-3, atol=1e-4 * every.std())
    blocks = estimated(tmp_path / "two")
    assert set(blocks) == {"pilot", ""} and len(blocks["pilot"]) == pilots
    inputs.run(tmp_path / "plain", *larger, "score.best=null")
    sizes = [max(len(x.meta["rows"]) for x in found[""]) for found in (blocks, estimated(tmp_path / "plain"))]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("score.layers=true",), "remove score.best or score.layers"),
        (("curvature.kind=cosine",), "curvature.kind=cosine has no estimates"),
        (("curvature.kind=gauss_newton",), "curvature.kind=gauss_newton has no estimates"),
        (("model.layers=[transformer.wte]",), "'transformer.wte' is a word embedding"),
    ],
)
def test_what_cannot_be_estimated_is_refused(
    inputs: Inputs, tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        inputs.run(tmp_path, *TWO, *overrides)


def same(one: Path, other: Path) -> bool:
    """Whether two runs have scored the same pairs, with the same bits."""
    found = [raylux.open_run(folder).scores().to_numpy() for folder in (one, other)]
    return bool(np.array_equal(found[0], found[1], equal_nan=True))


@pytest.mark.parametrize(
    "how",
    [
        ("query.basis=eigen",),
        ("query.low_rank=always", "query.max_error=0.3", "fit.sequences=40"),
        ("curvature.kind=identity",),
        ("curvature.blocks=2",),
        ("prefilter.kind=bm25", "prefilter.top=30"),
    ],
    ids=" ".join,
)
def test_ways_of_keeping_queries_make_no_difference(inputs: Inputs, tmp_path: Path, how: tuple[str, ...]) -> None:
    more = ("model.dtype=float64", *how)
    whole = inputs.run(tmp_path / "every", *TWO, *more, "score.best=null").scores().to_numpy()
    found = inputs.run(tmp_path / "two", *TWO, *more).scores().to_numpy()
    there = ~np.isnan(found)
    assert 0 < there.mean() < 1
    np.testing.assert_allclose(found[there], whole[there], rtol=1e-8, atol=1e-9 * np.nanstd(whole))


def test_workers_that_die_change_no_bit(inputs: Inputs, tmp_path: Path) -> None:
    inputs.run(tmp_path / "one", *TWO)
    with processes():
        inputs.run(tmp_path / "many", *TWO, "engine.backend=ray", "engine.workers=3", "engine.shards=2")
    assert same(tmp_path / "one", tmp_path / "many")


def test_a_run_that_is_cut_off_anywhere_goes_on_with_the_same(inputs: Inputs, tmp_path: Path) -> None:
    inputs.run(tmp_path / "whole", *TWO)
    shutil.copytree(tmp_path / "whole", tmp_path / "solved")
    run_stages(inputs.config(tmp_path / "solved", *TWO), ("corpus",), quiet=True, restart="score")
    stopped = 0
    for call in range(1, 40, 3):
        folder = tmp_path / f"cut {call}"
        shutil.copytree(tmp_path / "solved", folder)
        try:
            with pytest.MonkeyPatch.context() as patch:
                Interrupt(patch, RunFolder, "commit", call, after=bool(call % 2))
                inputs.run(folder, *TWO)
        except KeyboardInterrupt:
            stopped += 1
            inputs.run(folder, *TWO)
        assert same(tmp_path / "whole", folder), call
    assert stopped > 4
