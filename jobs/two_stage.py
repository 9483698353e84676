"""Two-stage scoring: how much of the best it finds, and at what cost, beside scores of all pairs by the same engine.

Writes docs/results/two-stage.md and .png: recall of each query's best 100 against the share of pairs that are scored,
multiplications, and seconds of CPU.

    python jobs/two_stage.py --cases A,demo --folder FOLDER --write

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
    """Of the study; ``cases``: names, with commas between them."""

    cases: str = "A,demo"
    sequences: int = 4096
    queries: int = 1000
    fitted: int = 512
    best: int = 100


def study(options: dict[str, Any], command: str) -> pages.Page:
    """Every case in turn.

    Raises:
        UserError: an unknown case.
    """
    folder: Path = options.pop("folder")
    settings = Settings(**options)
    names = settings.cases.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise UserError(f"--cases: unknown case '{unknown[0]}'; known: {', '.join(CASES)}")
    found = {}
    for name in names:
        case = prepare(name, settings.sequences, settings.queries)
        place = folder / f"{name}-{settings.sequences}-{settings.queries}"
        found[name] = measure(case, place, settings.fitted, settings.best)
    return pages.Page(page.text(found, command), lambda path: page.plot(found, path))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the page, write it where that was asked for."""
    parser = pages.parser(__doc__, NAME, fields(Settings), "runs")
    return pages.run(parser, arguments, NAME, study)


if __name__ == "__main__":
    sys.exit(main())
