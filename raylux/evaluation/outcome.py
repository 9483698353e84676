"""What an evaluation found: figures of each estimator with intervals, curves, and what was compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from raylux.evaluate import Estimate, Judgement

COLUMNS = ("test", "figure", "estimator", "value", "low", "high", "above", "above_low", "above_high")


@dataclass(frozen=True)
class Verdict:
    """A figure of all estimators.

    Attributes:
        test: as ``evaluate.tests`` names it.
        figure: its name.
        what: what it says, in a sentence.
        found: of each estimator, and how far it is above the one they are compared with.
        rows: what it is of each of, where not of estimators.
        against: what its differences are taken from, where not from the estimator that all others are.
    """

    test: str
    figure: str
    what: str
    found: Judgement
    rows: str = "estimator"
    against: str = ""

    def order(self) -> list[str]:
        """Estimators, the largest figure first, those without one last; of anything else as it comes."""
        if self.rows != "estimator":
            return list(self.found.lds)
        return sorted(self.found.lds, key=lambda name: -_known(self.found.lds[name].value))


@dataclass(frozen=True)
class Curve:
    """A figure that grows with how much is looked at.

    Attributes:
        test: as of ``Verdict``.
        title: what is drawn.
        x, y: what the axes say.
        lines: estimator -> (x, y) arrays of one length.
        log: x is drawn on a logarithmic scale.
    """

    test: str
    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]]
    log: bool = False


@dataclass(frozen=True)
class Outcome:
    """All that was found.

    Attributes:
        folder: where it lies.
        against: the estimator that differences are taken from.
        about: what was compared, as pairs of a name and a text.
        verdicts: figures, in the order of the tests.
        curves: likewise.
        notes: what there is to know of a test, by its name.
        seconds: that each estimator's run took, of all workers and shards; NaN where it is none.
    """

    folder: str
    against: str
    about: Mapping[str, str]
    verdicts: tuple[Verdict, ...]
    curves: tuple[Curve, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def frame(self) -> pd.DataFrame:
        """A row per figure and estimator (or ``Verdict.rows``): value, interval, difference on the same draws."""
        rows = [
            (verdict.test, verdict.figure, name, *_triple(verdict.found.lds[name]), *_triple(verdict.found.above[name]))
            for verdict in self.verdicts
            for name in verdict.found.lds
        ]
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def record(self) -> dict[str, Any]:
        """All of it as plain values, None for NaN."""
        return {
            "about": dict(self.about),
            "against": self.against,
            "figures": [
                {name: _plain(value) for name, value in row.items()} for row in self.frame().to_dict("records")
            ],
            "curves": [
                {
                    "test": curve.test,
                    "title": curve.title,
                    "x": curve.x,
                    "y": curve.y,
                    "lines": {name: [x.tolist(), y.tolist()] for name, (x, y) in curve.lines.items()},
                }
                for curve in self.curves
            ],
            "notes": dict(self.notes),
            "seconds": {name: _plain(value) for name, value in self.seconds.items()},
        }


def _triple(found: Estimate) -> tuple[float, float, float]:
    return found.value, found.low, found.high


def _known(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
