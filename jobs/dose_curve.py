"""What does a dose of chosen sequences do? Influence, a peer's, BM25 and dot products, judged by what is trained on.

For each held-out query every method chooses the sequences that matter most to it. A small language model is trained
with them left out, and with one and four copies more, from the start and on from the trained model; what that does to
the query is held against what was predicted and against the other methods. Models are Ray tasks, and what each says is
kept: interrupted, the same command goes on where it was.

    python jobs/dose_curve.py --folder RESULTS --write
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from jobs import pages
from jobs.dose import choose, page
from jobs.dose.judge import Outcome, Sets
from jobs.dose.plot import plot
from jobs.dose.retrain import measured
from jobs.dose.study import DOSES, Settings, Study
from raylux.errors import RayluxError, UserError


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pages.add_settings(found, fields(Settings))
    found.add_argument("--methods", nargs="+", choices=list(choose.KINDS), default=list(choose.KINDS))
    found.add_argument("--ways", nargs="+", choices=list(DOSES), default=list(DOSES), help="to measure")
    found.add_argument("--folder", type=Path, required=True, help="models' answers, scores and run folders go here")
    found.add_argument("--backend", choices=["ray", "local"], default="ray", help="local: models in this process")
    found.add_argument("--write", action="store_true", help="write docs/results/dose-curve.md and .png")
    return found


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; print the page, write it where that was asked for."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = vars(parser().parse_args(given))
    folder, write, methods = options.pop("folder").absolute(), options.pop("write"), options.pop("methods")
    backend, ways = options.pop("backend"), options.pop("ways")
    torch.set_num_threads(1)
    try:
        settings = Settings(**options)
        check(settings)
        found = outcome(settings, [name for name in choose.KINDS if name in methods], ways, folder, backend)
        text = page.page(settings, found, pages.command("dose_curve.py", given, folder))
        print(text)
        if write:
            pages.write(text, "dose-curve.md")
            plot(found, pages.RESULTS / "dose-curve.png")
    except RayluxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
