"""Stand-ins for the API, so that the command line is looked at alone, and what its tests share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import yaml

from raylux.health import Quarantined
from raylux.report.profile import StageTime

ROOT = Path(__file__).parent.parent.parent
STAGES = ("corpus", "fit", "prefilter", "query", "score", "report")
ESCAPES = "red \x1b[31m title \x1b]0;owned\x07 and \x9b2J"


@dataclass
class StubRun:
    """A run of two queries with three sequences each; the second text tries to steer the terminal."""

    folder: str = "runs/stub"
    unit: str = "nats"
    queries: list[str] = field(default_factory=lambda: ["boat", "piano"])
    missing: tuple[str, ...] = ()
    calibration: Any = None
    segment: float | None = None
    carried: bool = False
    quarantined: list[Quarantined] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    mixed: dict[str, list[str]] = field(default_factory=dict)
    times: list[StageTime] = field(default_factory=list)

    def profile(self) -> list[StageTime]:
        return self.times

    def problems(self, checksums: bool) -> list[str]:
        assert checksums
        return self.damaged

    def mixed_numerics(self) -> dict[str, list[str]]:
        return self.mixed

    def top(self, query: str, k: int = 10, by: str = "sequence", normalise: str = "none") -> pd.DataFrame:
        frame = pd.DataFrame(
            {
                "rank": [1, 2, 3],
                "sequence": ["a:0", "b:0", "c:0"],
                "influence": np.array([1 / 3, 1e-17, -2.5]),
                "prefilter": [7.25, np.nan, 0.1],
                "unit": ["kept", "by", "user"],
                "text": [f"{query} by {by}", ESCAPES, 'two\nlines, "quoted"'],
            }
        )
        frame.attrs["unit"] = self.unit if normalise == "none" else f"{self.unit} by {normalise}"
        return frame.head(k)

    def self_influence(self) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "sequence": ["a:0", "b:0"],
                "self_influence": [1 / 3, 2.0],
                "norm": [4.0, 5.0],
                "step": [0.25, 0.5],
                "shelf": ["low", "high"],
                "text": ["plain", ESCAPES],
            }
        )

    def status(self) -> list[Any]:
        return [
            SimpleNamespace(
                name=name, done=name not in self.missing, detail="2 units", command=f"raylux {name} stub.yaml"
            )
            for name in STAGES
        ]


@dataclass
class StubApi:
    """Stands in for ``raylux.api`` and ``raylux.opening``: records the stages asked for, and ends as it is told to."""

    run: Any = field(default_factory=StubRun)
    error: BaseException | None = None
    calls: list[Any] = field(default_factory=list)

    def run_stages(
        self, config: Any, stages: Any = None, config_path: str | None = None, restart: str | None = None
    ) -> Any:
        self.calls.append((config, stages, config_path, restart))
        if self.error is not None:
            raise self.error
        return self.run

    def open_run(self, path: str) -> Any:
        self.calls.append(path)
        if self.error is not None:
            raise self.error
        return self.run


def write(path: Path, content: Any) -> str:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def one_line(text: str) -> str:
    """The one line of stderr; no second one, no traceback."""
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text.rstrip("\n")
