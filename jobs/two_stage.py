"""Two-stage scoring: how much of the best it finds, and at what cost, beside scores of all pairs by the same engine.

Writes docs/results/two-stage.md and .png: recall of each query's best 100 against the share of pairs that are scored,
multiplications, and seconds of CPU.

    python jobs/two_stage.py --folder FOLDER --write

The folder holds runs (A: 9 GB of preconditioned queries); the same command goes on with what is there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from jobs import pages
from jobs.twostage import page
from jobs.twostage.cases import CASES, prepare
from jobs.twostage.measured import measure
from raylux.errors import UserError

NAME = "two-stage"


@dataclass(frozen=True)
class Settings:
    """Of the study.

    Attributes:
        cases: names, with commas between them; after a colon a number of candidates of its own.
        sequences: candidates otherwise.
        queries: Q.
        fitted: sequences of the fit.
        best: K.
        contraction: precision of matrix products, as ``engine.contraction_dtype``.
    """

    cases: str = "A:16384,demo"
    sequences: int = 4096
    queries: int = 1000
    fitted: int = 512
    best: int = 100
    contraction: str = "auto"


def study(options: dict[str, Any], command: str) -> pages.Page:
    """Every case in turn.

    Raises:
        UserError: an unknown case.
    """
    folder: Path = options.pop("folder")
    settings = Settings(**options)
    found = {}
    for own, name, sequences in [(own, *_case(own, settings.sequences)) for own in settings.cases.split(",")]:
        place = folder / f"{name}-{sequences}-{settings.queries}"
        case, how = prepare(name, sequences, settings.queries), (f"engine.contraction_dtype={settings.contraction}",)
        found[own] = measure(case, place, settings.fitted, settings.best, how)
    return pages.Page(page.text(found, command), lambda path: page.plot(found, path))


def _case(text: str, sequences: int) -> tuple[str, int]:
    """Its name and the number of its candidates, by default ``sequences``."""
    name, _, count = text.partition(":")
    if name not in CASES:
        raise UserError(f"--cases: unknown case '{name}'; known: {', '.join(CASES)}")
    if count and not count.isdecimal():
        raise UserError(f"--cases: '{text}': after the colon stands the number of candidates, as in {name}:16384")
    return name, int(count or sequences)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the page, write it where that was asked for."""
    parser = pages.parser(__doc__, NAME, fields(Settings), "runs")
    return pages.run(parser, arguments, NAME, study)


if __name__ == "__main__":
    sys.exit(main())
