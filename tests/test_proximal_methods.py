"""Methods against the proximal optimum: better solves come nearer, outcomes are kept, s is found by trying."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import raylux
from jobs import proximal_methods
from jobs.proximal import page, study
from jobs.proximal.study import DOT, EKFAC, METHODS, Outcome, Predicted, Settings
from raylux.errors import UserError


def drawn(family: str, seed: int, noise: dict[str, float]) -> Outcome:
    """Methods that are the truth with more or less noise."""
    random = np.random.default_rng(seed)
    measured = random.normal(size=(3, 40))
    predicted = {
        method: Predicted(
            measured + noise.get(method, 0.1) * random.normal(size=(3, 40)), 2.0, 1.0 + place, float("nan")
        )
        for place, method in enumerate(METHODS)
    }
    return Outcome(family, seed, predicted, measured, 1e-3)


def test_better_solves_come_nearer_to_the_optimum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = "EK-FAC, then 30 products (`pcg`)"
    monkeypatch.setattr(study, "METHODS", {name: METHODS[name] for name in (DOT, EKFAC, solved)})
    small = Settings(train=40, queries=2, added=6, steps=60, width=8, layers=1, seeds=1)
    found = study.outcome(small, "gpt2", 0, tmp_path / "runs")
    assert found.pearson(solved).min() > 0.9 > found.pearson(EKFAC).mean()
    assert found.left < 0.1
    assert found.predicted[DOT].fit == 0 < found.predicted[EKFAC].fit
    assert found.predicted[solved].solve > found.predicted[EKFAC].solve
    again = Outcome.of(found.arrays(), "gpt2", 0)
    assert (again.measured == found.measured).all() and again.left == found.left
    for method, one in found.predicted.items():
        its = again.predicted[method]
        assert (its.scores == one.scores).all() and (its.fit, its.solve) == (one.fit, one.solve)


def test_the_scale_is_the_first_that_does_not_diverge(tmp_path: Path) -> None:
    asked: list[str] = []

    def run(place: Path, overrides: Sequence[str]) -> raylux.Run:
        asked.append(overrides[-1])
        if float(overrides[-1].split("=")[1]) < 8:
            raise UserError("curvature.solver=lissa diverges: after 3 products …")
        return "a run"  # type: ignore[return-value]

    assert study._converged(run, tmp_path, ["curvature.solver=lissa"], 1.0) == ("a run", 8.0)
    assert asked == [f"curvature.scale={scale}" for scale in (1.0, 2.0, 4.0, 8.0)]

    def broken(place: Path, overrides: Sequence[str]) -> raylux.Run:
        raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"):
        study._converged(broken, tmp_path, [], 1.0)


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def outcome(settings: Settings, family: str, seed: int, folder: Path) -> Outcome:
        calls.append((family, seed))
        return drawn(family, seed, {})

    monkeypatch.setattr(proximal_methods, "outcome", outcome)
    given = ["--folder", str(tmp_path), "--seeds", "2", "--families", "gpt2"]
    assert proximal_methods.main(given) == 0 and calls == [("gpt2", 0), ("gpt2", 1)]
    assert proximal_methods.main(given) == 0 and len(calls) == 2
    assert proximal_methods.main([*given, "--steps", "5"]) == 0 and len(calls) == 4, "other settings, other results"


def test_the_page_says_what_is_met() -> None:
    outcomes = [drawn("gpt2", seed, {DOT: 3.0, EKFAC: 0.01}) for seed in range(3)]
    text = page.page(Settings(), outcomes, "python jobs/proximal_methods.py")
    assert "gpt2, EK-FAC above the dot product: met" in text
    place, ekfac = list(METHODS).index(page.LISSA[0]), list(METHODS).index(EKFAC)
    ratio = (1.0 + place) / (2.0 + 1.0 + ekfac)
    assert f"against {page.LISSA[0]}: {ratio:.0f} times faster, wanted 10: **missed**; correlation as good: met" in text
    worse = page.page(Settings(), [drawn("neox", 0, {EKFAC: 5.0})], "python jobs/proximal_methods.py")
    assert "neox, EK-FAC above the dot product: **missed**" in worse


def test_bad_sizes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert proximal_methods.main(["--folder", str(tmp_path), "--added", "2"]) == 2
    assert capsys.readouterr().err == "error: --queries and --seeds are at least 1, --added from 3 to --train\n"
