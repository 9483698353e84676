"""Run folders that are opened to look at: one, or several as one. Nothing here waits for torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raylux.combined import Combined
from raylux.results import Run


def open_run(path: str | Path) -> Run:
    """Open a run folder to look at. Raises UserError where there is none."""
    return Run(str(path))


def combine(runs: Sequence[str | Path | Run], weights: Sequence[float] | None = None) -> Combined:
    """Read several runs over the same corpus and queries as one: Σ_k w_k · influence_k, by default the mean.

    Args:
        runs: folders, or runs that are open: models of several checkpoints, seeds or stages of a training.
        weights: one for each; learning rates with kind ``identity`` are TracIn's.

    Raises:
        UserError: they cannot be added up, or there is no run at one of them.
    """
    return Combined([one if isinstance(one, Run) else open_run(one) for one in runs], weights)
