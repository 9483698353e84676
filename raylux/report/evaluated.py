"""One HTML page of an evaluation: figures of all estimators with intervals, and curves. Needs nothing beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raylux.report import charts
from raylux.report.html import templates
from raylux.report.tables import verdict_cells

if TYPE_CHECKING:
    from raylux.evaluation.outcome import Outcome


def render(outcome: Outcome) -> str:
    """The page as text; everything that comes from a config or a corpus is escaped."""
    tests = list(dict.fromkeys(verdict.test for verdict in outcome.verdicts))
    return (
        templates()
        .get_template("evaluated.html.j2")
        .render(
            folder=outcome.folder,
            about=dict(outcome.about),
            against=outcome.against,
            seconds=outcome.seconds,
            tests=[_test(outcome, test) for test in tests],
        )
    )


def _test(outcome: Outcome, test: str) -> dict[str, Any]:
    verdicts = [verdict for verdict in outcome.verdicts if verdict.test == test]
    return {
        "name": test,
        "notes": [text for name, text in outcome.notes.items() if name.partition(",")[0] == test],
        "figures": [
            {
                "name": verdict.figure,
                "what": verdict.what,
                "of": verdict.rows,
                "against": against,
                "chart": charts.intervals(verdict.found.lds, verdict.order(), against),
                "rows": [(name, *verdict_cells(verdict, name, against)) for name in verdict.order()],
            }
            for verdict in verdicts
            for against in [verdict.against or outcome.against]
        ],
        "curves": [
            {"title": curve.title, "x": curve.x, "y": curve.y, "chart": charts.lines(curve.lines, curve.log)}
            for curve in outcome.curves
            if curve.test == test
        ],
    }
