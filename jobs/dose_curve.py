"""What does a dose of chosen sequences do? Influence, a peer's, BM25 and dot products, judged by what is trained on.

For each held-out query every method chooses the sequences that matter most to it. A small language model is trained
with them left out, and with one and four copies more, from the start and on from the trained model; what that does to
the query is held against what was predicted and against the other methods. Models are Ray tasks, and what each says is
kept: interrupted, the same command goes on where it was. The proximal optimum alone, which trains nothing but the
model that is scored, has a page of its own.

    python jobs/dose_curve.py --folder RESULTS --write
    python jobs/dose_curve.py --ways proximal --folder RESULTS --write
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
from jobs.dose import choose, page, short
from jobs.dose.judge import Outcome, Sets
from jobs.dose.plot import plot
from jobs.dose.retrain import measured
from jobs.dose.study import DOSES, PROXIMAL, Settings, Study
from raylux.errors import UserError

NAME = "dose-curve"


def check(settings: Settings) -> None:
    """Raise UserError where the settings make no study."""
    for name in ("train", "queries", "size", "epochs", "warm_epochs", "products"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name} {getattr(settings, name)}: at least 1")
    for name in ("random", "proximal"):
        if getattr(settings, name) < 0:
            raise UserError(f"--{name} {getattr(settings, name)}: 0, or more")
    if settings.size >= settings.train:
        raise UserError(f"--size {settings.size}: a set is smaller than the {settings.train} texts of --train")


def outcome(settings: Settings, methods: Sequence[str], ways: Sequence[str], folder: Path, backend: str) -> Outcome:
    """Train, score, choose, train with doses; what is in the folder is not made again."""
    study = Study.of(settings)
    place = folder / settings.name
    base = choose.base(study, place)
    found = choose.scores(study, base, place, methods)
    sets = Sets.of(study, found)
    what = measured(study, base, sets.members, sets.proximal(settings), place, ways, backend)
    return Outcome(found, sets, what)


def made(options: dict[str, Any], command: str) -> pages.Page:
    """The study's page and plot."""
    folder, methods, ways, backend = (options.pop(name) for name in ("folder", "methods", "ways", "backend"))
    settings = Settings(**options)
    check(settings)
    alone = list(ways) == [PROXIMAL]
    pages.require(not alone or settings.proximal > 1, f"--proximal {settings.proximal}: two queries at least")
    found = outcome(settings, [name for name in choose.KINDS if name in methods], ways, folder, backend)
    if alone:
        return pages.Page(short.page(settings, found, command), name="dose-proximal")
    return pages.Page(page.page(settings, found, command), partial(plot, found))


def main(arguments: Sequence[str] | None = None) -> int:
    """The study as a program."""
    parser = pages.parser(__doc__, NAME, fields(Settings), "models' answers, scores and run folders go here")
    parser.add_argument("--methods", nargs="+", choices=list(choose.KINDS), default=list(choose.KINDS))
    parser.add_argument("--ways", nargs="+", choices=list(DOSES), default=list(DOSES), help="to measure")
    parser.add_argument("--backend", choices=["ray", "local"], default="ray", help="local: models in this process")
    return pages.run(parser, arguments, NAME, made)


if __name__ == "__main__":
    sys.exit(main())
