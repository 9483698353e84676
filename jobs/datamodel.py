"""Which scores predict what other training sets would do? The linear datamodeling score of every kind of curvature.

Small language models are trained on random halves of some Wikipedia leads, as Ray tasks; a method's scores are summed
over each half and held against what the models of that half say of held-out texts. A second study, of a model whose
head and word embedding are two matrices, compares choices of layers. Interrupted, the same command goes on where it
was.

    python jobs/datamodel.py --folder RESULTS --write
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
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
# Of the plot.
TITLES = ("head and word embedding one matrix", "head and word embedding apart")


def measured(options: dict[str, Any], command: str) -> pages.Page:
    """Train, score, judge."""
    folder, untied, repeats = (options.pop(name) for name in ("folder", "untied", "untied_repeats"))
    without, settings = options.pop("without"), Settings(**options)
    pages.require(
        min(settings.queries, settings.train, settings.repeats) >= 1
        and settings.subsets >= 4
        and (untied == 0 or untied >= 4),
        "--train, --queries and --repeats are at least 1, --subsets and --untied at least 4 (--untied 0: without it)",
    )
    tied = found(settings, folder, without)
    other = replace(settings, subsets=untied, repeats=repeats or settings.repeats, tied=False)
    apart = found(other, folder, without) if untied else None
    panels = {title: one.judged for title, one in zip(TITLES, (tied, apart), strict=True) if one is not None}
    return pages.Page(page.page(tied, apart, command), partial(page.plot, panels))


def found(settings: Settings, folder: Path, without: Sequence[str] = ()) -> page.Found:
    """Of one model, from its own part of the folder as far as it is there; some methods left out."""
    study, place = Study.of(settings), folder / settings.name
    answers = retrain.measured(study, place / "subsets")
    made = compared.all_methods(study, place / "runs", without)
    judged = judge({method.name: method.scores for method in made}, study.members, answers.mean(1), against=EKFAC)
    return page.Found(settings, made, judged, answers)


def main(arguments: Sequence[str] | None = None) -> int:
    """The study as a program."""
    kept = "trained models' answers and run folders go here"
    parser = pages.parser(__doc__, NAME, [field for field in fields(Settings) if field.name != "tied"], kept)
    parser.add_argument(
        "--untied", type=int, default=64, help="halves of the study of a model whose head has its own weights; 0: none"
    )
    parser.add_argument("--untied-repeats", type=int, default=0, help="seeds of that study; 0: as many as of the other")
    parser.add_argument("--without", nargs="*", default=[], help="names of methods that are left out")
    return pages.run(parser, arguments, NAME, measured)


if __name__ == "__main__":
    sys.exit(main())
