"""raylux: tracing what a language model says back to the training sequences that made it say so.

Example::

    import raylux

    config = raylux.Config.load("configs/quickstart.yaml", ["prefilter.top=100"])
    run = raylux.run(config)
    print(run.top(run.queries[0], k=10))
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from raylux.config import Config
from raylux.errors import MissingStageError, NumericsError, RayluxError, UserError
from raylux.lazily import on_use

if TYPE_CHECKING:
    from raylux.api import attribute, run
    from raylux.opening import combine, open_run
    from raylux.perturbing import Perturbation, perturb
    from raylux.results import Run
    from raylux.verification import CalibrationOptions, VerifyOptions, calibrate, verify
else:
    # ``raylux --help`` answers at once.
    __getattr__ = on_use(
        __name__,
        api="attribute run",
        opening="combine open_run",
        perturbing="Perturbation perturb",
        results="Run",
        verification="CalibrationOptions VerifyOptions calibrate verify",
    )

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
