"""raylux: tracing what a language model says back to the training sequences that made it say so.

Example::

    import raylux

    config = raylux.Config.load("configs/quickstart.yaml", ["prefilter.top=100"])
    run = raylux.run(config)
    print(run.top(run.queries[0], k=10))
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from raylux.config import Config
from raylux.errors import MissingStageError, NumericsError, RayluxError, UserError

if TYPE_CHECKING:
    from raylux.api import Run, attribute, combine, open_run, run
    from raylux.perturbing import Perturbation, perturb
    from raylux.verification import CalibrationOptions, VerifyOptions, calibrate, verify

__all__ = [
    "CalibrationOptions",
    "Config",
    "MissingStageError",
    "NumericsError",
    "Perturbation",
    "RayluxError",
    "Run",
    "UserError",
    "VerifyOptions",
    "attribute",
    "calibrate",
    "combine",
    "open_run",
    "perturb",
    "run",
    "verify",
]

# torch takes its large tensors in huge pages then, where Linux gives them on demand: it reads this once, at the first
# of them. Without, the kernel hands out and clears 4 KiB at a time: a copy of 64 MiB took 48 ms of CPU in place of 13
# on a virtual machine, a whole run an eighth more. Who has set it keeps it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> Any:
    """The names that need torch are imported when they are first used: ``raylux --help`` answers at once."""
    if name in ("Run", "attribute", "combine", "open_run", "run"):
        from raylux import api

        return getattr(api, name)
    if name in ("Perturbation", "perturb"):
        from raylux import perturbing

        return getattr(perturbing, name)
    if name in ("CalibrationOptions", "VerifyOptions", "calibrate", "verify"):
        from raylux import verification

        return getattr(verification, name)
    raise AttributeError(f"module 'raylux' has no attribute '{name}'")
