from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.two_stage import Settings, study
from jobs.twostage import page
from jobs.twostage.cases import Case, prepare
from jobs.twostage.measured import measure
from raylux.errors import UserError
from raylux.influence.surveys import Cut, Survey
from tests.test_estimates import sees_most

# Several waves of a small corpus.
UNITS = ("score.unit_size=16",)


def sees_much_first(surveys: Mapping[str, Survey], *more: object) -> dict[str, Cut]:
    """Of the smallest blocks that have most of the variance, nine tenths: little says nothing of so small a model."""
    cuts = sees_most(surveys, *more)
    return {name: replace(cut, first=min(cut.seen.block) * 9 // 10) for name, cut in cuts.items()}


@pytest.mark.parametrize("choose", [sees_most, sees_much_first])
def test_both_ways_on_the_smallest_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choose: Callable) -> None:
    monkeypatch.setattr("raylux.engine.estimating.choose", choose)
    monkeypatch.setattr("raylux.cost.two_stage.PILOT_LEAST", 32)
    monkeypatch.setattr("raylux.engine.stages.two_stage.relative_cost", lambda *_, **__: 0.0)
    found = measure(prepare("tiny", 160, 40), tmp_path, 32, 5, UNITS)
    assert (found["queries"], found["sequences"], found["layers"]) == (40, 160, 4)
    assert found["off"] < 1e-3 and not found["plain"]
    assert 0 < found["share"] < 0.9 and found["recall"] > 0.9
    curve = found["curve"]
    assert [x["recall"] for x in curve] == sorted(x["recall"] for x in curve)
    assert curve[-1]["recall"] > 0.97 and all(0 < x["cost"] <= x["time"] for x in curve)
    assert (0.1 < found["opened"] < 0.9) if choose is sees_much_first else found["opened"] == 1
    assert found["seconds"]["every"]["contraction"] > 0 and found["seconds"]["two"]["contraction"] > 0
    # Every pair scored twice over costs more than once.
    assert curve[-1]["cost"] > curve[0]["cost"]
    said = page.text({"tiny": found}, "python jobs/two_stage.py")
    assert "the best 5 of 160, 40 queries" in said and "—" not in said
    # Gone on with, nothing is computed again.
    again = measure(prepare("tiny", 160, 40), tmp_path, 32, 5, UNITS)
    assert again["recall"] == found["recall"] and again["seconds"] == found["seconds"]


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curve = [{"cost": 0.1 * place, "recall": 0.5 + 0.1 * place} for place in range(1, 5)]
    page.plot({"A": {"curve": curve}, "demo": {"curve": curve}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_an_unknown_case_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown case 'B'; known: A, demo, tiny"):
        study({"folder": tmp_path, **vars(Settings(cases="A,B"))}, "")
    with pytest.raises(UserError, match="'A:many': after the colon stands the number of candidates, as in A:16384"):
        study({"folder": tmp_path, **vars(Settings(cases="A:many"))}, "")
    assert not list(tmp_path.iterdir())


def test_a_case_may_have_a_number_of_candidates_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def told(case: Case, place: Path, *_: object) -> dict[str, Any]:
        asked.append((place.name, len(case.documents), len(case.queries)))
        return {}

    monkeypatch.setattr("jobs.two_stage.measure", told)
    monkeypatch.setattr(page, "text", lambda found, _: ",".join(found))
    settings = Settings(cases="tiny,tiny:60", sequences=40, queries=8)
    assert study({"folder": tmp_path, **vars(settings)}, "").text == "tiny,tiny:60"
    assert asked == [("tiny-40-8", 40, 8), ("tiny-60-8", 60, 8)]
