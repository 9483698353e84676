"""Which scores predict what other training sets would do? The linear datamodeling score of every kind of curvature.

Small language models are trained on random halves of some Wikipedia leads, as Ray tasks; a method's scores are summed
over each half and held against what the models of that half say of held-out texts. Interrupted, the same command goes
on where it was.

    python jobs/datamodel.py --folder RESULTS --write
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
from jobs.lds import methods, page, retrain
from jobs.lds.study import Settings, Study
from raylux.errors import RayluxError
from raylux.evaluate import judge


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pages.add_settings(found, fields(Settings))
    found.add_argument("--folder", type=Path, required=True, help="trained models' answers and run folders go here")
    found.add_argument("--write", action="store_true", help="write docs/results/datamodel.md and .png")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, score, judge; print the page, write it where that was asked for."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = vars(parser().parse_args(given))
    if min(options["subsets"], options["queries"], options["train"], options["repeats"]) < 1 or options["subsets"] < 4:
        print("error: --train, --queries and --repeats are at least 1, --subsets at least 4", file=sys.stderr)
        return 2
    folder, write = options.pop("folder").absolute(), options.pop("write")
    torch.set_num_threads(1)
    try:
        study = Study.of(Settings(**options))
        place = folder / study.settings.name
        measured = retrain.measured(study, place / "subsets")
        found = methods.all_methods(study, place / "runs")
    except RayluxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    scores = {method.name: method.scores for method in found}
    judged = judge(scores, study.members, measured.mean(1), against=methods.EKFAC)
    text = page.page(study.settings, found, judged, measured, pages.command("datamodel.py", given, folder))
    print(text)
    if write:
        pages.write(text, "datamodel.md")
        page.plot(judged, pages.RESULTS / "datamodel.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
