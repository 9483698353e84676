"""EK-FAC, K-FAC, LiSSA, better solves and dot products against the proximal optimum, with what each takes.

Grosse et al. 2023 (5.1) found EK-FAC as good as LiSSA, both above the dot product, in an order of magnitude less time.
Here the three tasks are language models of three families. What is done is kept in --folder: the same command goes on.

    python jobs/proximal_methods.py --folder RESULTS --write
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from jobs import calibration, pages
from jobs.kept import Arrays, folder_name, kept
from jobs.proximal.page import page
from jobs.proximal.study import Outcome, Settings, outcome

NAME = "proximal-methods"


def found(settings: Settings, family: str, seed: int, folder: Path) -> Outcome:
    """The outcome of a family and seed, measured unless the folder has it."""
    # One seed's numbers know nothing of how many there are.
    place = folder / folder_name(settings, without="seeds")

    def measure() -> Arrays:
        # Half a run would go on where it was, with a profile that counts its time twice.
        with tempfile.TemporaryDirectory(prefix="raylux-methods-") as runs:
            return outcome(settings, family, seed, Path(runs)).arrays()

    return Outcome.of(kept(place / f"{family}-{seed}.npz", measure), family, seed)


def measured(options: dict[str, Any], command: str) -> pages.Page:
    """Measure what the folder lacks."""
    folder, families = options.pop("folder"), options.pop("families")
    settings = Settings(**options)
    pages.require(
        min(settings.queries, settings.seeds) >= 1 and 3 <= settings.added <= settings.train,
        "--queries and --seeds are at least 1, --added from 3 to --train",
    )
    outcomes = []
    for seed in range(settings.seeds):
        for family in families:
            outcomes.append(found(settings, family, seed, folder))
            figures = ", ".join(f"{name} {np.mean(outcomes[-1].pearson(name)):.3f}" for name in outcomes[-1].predicted)
            print(f"{family}, seed {seed}: {figures}", file=sys.stderr, flush=True)
    return pages.Page(page(settings, outcomes, command))


def main(arguments: Sequence[str] | None = None) -> int:
    """The study as a program."""
    parser = pages.parser(__doc__, NAME, fields(Settings), folder="what is measured is kept here")
    parser.add_argument("--families", nargs="+", choices=list(calibration.FAMILIES), default=list(calibration.FAMILIES))
    return pages.run(parser, arguments, NAME, measured)


if __name__ == "__main__":
    sys.exit(main())
