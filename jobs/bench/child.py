"""One measurement, in a process of its own: bare passes, one program's stages, bare passes again.

    python -m jobs.bench.child SPEC.json

The spec (``Spec``) names the workload and the program; the result (``Measured``) is written beside it as JSON, the
scores as ``scores.npz``. ``jobs.bench.rounds`` starts it and samples its memory from outside.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from jobs.bench import bare, ours, theirs
from jobs.bench.records import RAYLUX, Measured, Spec, Stopwatch
from jobs.bench.workloads import WORKLOADS
from raylux import memory
from raylux.engine import numerics


def measure(spec: Spec, folder: Path) -> tuple[Measured, dict[str, np.ndarray]]:
    """Run a spec in ``folder``; returns what was measured, and the scores [Q, N] by ``str(Q)``."""
    torch.set_num_threads(spec.threads)
    case = WORKLOADS[spec.workload].prepare()
    inputs = bare.read(case)
    found = Measured(spec, numerics=numerics.here("cpu"))
    watch = Stopwatch()
    # kronfluence collects garbage often: what a collection takes is not to grow with what others have imported.
    gc.collect()
    gc.freeze()
    _bare(found, case.batch, inputs)
    memory.give_back()  # the bare passes' own is not to count as the program's
    if spec.program == RAYLUX:
        overrides = [*spec.overrides, *(["fit.labels=dataset"] if spec.empirical else [])]
        scores, found.choices = ours.run(case, spec.sizes, spec.threads, overrides, folder, watch)
    else:
        scores = theirs.run(case, inputs, spec.sizes, spec.empirical, folder, watch)
    _bare(found, case.batch, inputs)
    found.stages = watch.stages
    return found, {str(size): array for size, array in scores.items()}


def _bare(found: Measured, batch: int, inputs: bare.Inputs) -> None:
    if found.spec.bare:
        wall, cpu = bare.passes(inputs, batch, found.spec.bare)
        found.bare_wall += wall
        found.bare_cpu += cpu


def main(arguments: Sequence[str]) -> int:
    """Run the spec in a file, and write result and scores beside it."""
    path = Path(arguments[0])
    spec = Spec(**{key: tuple(x) if isinstance(x, list) else x for key, x in json.loads(path.read_text()).items()})
    found, scores = measure(spec, path.parent)
    np.savez(path.parent / "scores.npz", **scores)
    (path.parent / "result.json").write_text(json.dumps(found.dump()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
