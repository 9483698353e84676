"""EK-FAC, K-FAC, LiSSA, better solves and dot products against the proximal optimum, with what each takes.

Grosse et al. 2023 (5.1) found EK-FAC as good as LiSSA, both above the dot product, in an order of magnitude less time.
Here the three tasks are language models of three families. What is done is kept in --folder: the same command goes on.

    python jobs/proximal_methods.py --folder RESULTS --write
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from jobs import calibration, pages
from jobs.kept import Arrays, kept
from jobs.proximal.page import page
from jobs.proximal.study import Outcome, Settings, outcome
from raylux.errors import RayluxError


def found(settings: Settings, family: str, seed: int, folder: Path) -> Outcome:
    """The outcome of a family and seed, measured unless the folder has it."""
    # One seed's numbers know nothing of how many there are.
    own = {key: value for key, value in asdict(settings).items() if key != "seeds"}
    place = folder / hashlib.blake2b(json.dumps(own).encode(), digest_size=8).hexdigest()

    def measure() -> Arrays:
        # Half a run would go on where it was, with a profile that counts its time twice.
        with tempfile.TemporaryDirectory(prefix="raylux-methods-") as runs:
            return outcome(settings, family, seed, Path(runs)).arrays()

    return Outcome.of(kept(place / f"{family}-{seed}.npz", measure), family, seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the folder lacks; print the page, write it where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(calibration.FAMILIES), default=list(calibration.FAMILIES))
    pages.add_settings(parser, fields(Settings))
    parser.add_argument("--folder", type=Path, required=True, help="what is measured is kept here")
    parser.add_argument("--write", action="store_true", help="write docs/results/proximal-methods.md")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = vars(parser.parse_args(given))
    folder, write, families = options.pop("folder").absolute(), options.pop("write"), options.pop("families")
    settings = Settings(**options)
    if min(settings.queries, settings.seeds) < 1 or not 3 <= settings.added <= settings.train:
        print("error: --queries and --seeds are at least 1, --added from 3 to --train", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    outcomes = []
    try:
        for seed in range(settings.seeds):
            for family in families:
                outcomes.append(found(settings, family, seed, folder))
                figures = ", ".join(
                    f"{name} {np.mean(outcomes[-1].pearson(name)):.3f}" for name in outcomes[-1].predicted
                )
                print(f"{family}, seed {seed}: {figures}", file=sys.stderr, flush=True)
    except RayluxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    text = page(settings, outcomes, pages.command("proximal_methods.py", given, folder))
    print(text)
    if write:
        pages.write(text, "proximal-methods.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
