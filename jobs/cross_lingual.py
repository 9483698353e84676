"""Does influence cross from one language to another, and more in larger models? English, French and Spanish leads.

Grosse et al. 2023 found that English sequences have next to no influence on a query's translation in a model of
0.8 billion weights, and more in larger ones. Here small Llamas are trained on a mix of three languages; leads about the
same subject are found by equal titles, and names are told from the rest of the text.

    python jobs/cross_lingual.py --folder RESULTS --write
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
from jobs.lds import methods
from jobs.lingual import page
from jobs.lingual.study import FILTERS, Settings, outcomes, prepared

NAME = "cross-lingual"


def measured(options: dict[str, Any], command: str) -> pages.Page:
    """Draw, train and score each size, compare."""
    folder, settings = options.pop("folder"), Settings(**options)
    pages.require(
        settings.held >= 1 and settings.apart >= 2 and settings.epochs >= 1 and settings.characters >= 40,
        "--held and --epochs are at least 1, --apart at least 2, --characters at least 40",
    )
    drawn = settings.drawn()
    study = prepared(settings, drawn)
    found = outcomes(settings, drawn, study, folder)
    filters = {kind: methods.prefiltered(study, kind) for kind in FILTERS}
    return pages.Page(page.page(settings, drawn, found, filters, command), partial(page.plot, drawn, found, filters))


def main(arguments: Sequence[str] | None = None) -> int:
    """The study as a program."""
    kept = "each size's scores go here"
    return pages.run(pages.parser(__doc__, NAME, fields(Settings), kept), arguments, NAME, measured)


if __name__ == "__main__":
    sys.exit(main())
