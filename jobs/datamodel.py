"""Which scores predict what other training sets would do? The linear datamodeling score of every kind of curvature.

Small language models are trained on random halves of some Wikipedia leads, as Ray tasks; a method's scores are summed
over each half and held against what the models of that half say of held-out texts. Interrupted, the same command goes
on where it was.

    python jobs/datamodel.py --folder RESULTS --write
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))


from jobs import pages
from jobs.lds import compared, page, retrain
from jobs.lds.methods import EKFAC
from jobs.lds.study import Settings, Study
from raylux.evaluate import judge

NAME = "datamodel"


def measured(options: dict[str, Any], command: str) -> pages.Page:
    """Train, score, judge."""
    folder, settings = options.pop("folder"), Settings(**options)
    pages.require(
        min(settings.queries, settings.train, settings.repeats) >= 1 and settings.subsets >= 4,
        "--train, --queries and --repeats are at least 1, --subsets at least 4",
    )
    study = Study.of(settings)
    place = folder / settings.name
    found = retrain.measured(study, place / "subsets")
    made = compared.all_methods(study, place / "runs")
    judged = judge({method.name: method.scores for method in made}, study.members, found.mean(1), against=EKFAC)
    return pages.Page(page.page(settings, made, judged, found, command), partial(page.plot, judged))


def main(arguments: Sequence[str] | None = None) -> int:
    """The study as a program."""
    kept = "trained models' answers and run folders go here"
    return pages.run(pages.parser(__doc__, NAME, fields(Settings), kept), arguments, NAME, measured)


if __name__ == "__main__":
    sys.exit(main())
