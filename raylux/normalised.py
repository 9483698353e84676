"""Scores divided by how long a sequence's gradient is: RelatIF (Barshan et al. 2020), and self-influence itself.

Influence favours sequences whose gradients are large whatever is asked, outliers and rare strings. What a score is
divided by, v = ∇log p of the sequence, all of it by the run's own kind of curvature, whichever solver the queries had:

| by | divided by | asks |
|---|---|---|
| ``norm`` | ‖v‖ | which sequences point the query's way |
| ``step`` | ‖(G + λ)⁻¹ v‖ / N, the step of the weights: θ-RelatIF | which raise f most for so large a step |
| ``self-influence`` | √(vᵀ (G + λ)⁻¹ v / N): ℓ-RelatIF | which raise f most for so much change of themselves |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd

from raylux.errors import MissingStageError, UserError
from raylux.ledger import SQUARES
from raylux.store import RunFolder

if TYPE_CHECKING:
    from raylux.results import Run

Normalise = Literal["none", "norm", "self-influence", "step"]


def squares(store: RunFolder) -> tuple[np.ndarray, np.ndarray]:
    """Corpus rows [n] whose gradients were measured, ascending, and ‖v‖², vᵀ(G + λ)⁻¹v, ‖(G + λ)⁻¹v‖² of each [3, n].

    None is divided by N.
    """
    parts = [
        (np.asarray(manifest.meta["rows"], np.int64), store.group(manifest.meta["key"]).read("squares"))
        for manifest in store.units(SQUARES).values()
    ]
    rows = np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in parts)])
    values = np.concatenate([np.zeros((3, 0)), *(values for _, values in parts)], 1)
    # A row may stand in two units, with the same bits.
    rows, first = np.unique(rows, return_index=True)
    return rows, values[:, first]


def divisor(run: Run, by: Normalise, rows: np.ndarray) -> np.ndarray | None:
    """What the scores of some corpus rows (a corpus row each) are divided by [n]; None: nothing.

    Raises:
        UserError: there is no such way, or the run's scores are cosines already.
        MissingStageError: the gradients of some rows were not measured.
    """
    if by == "none":
        return None
    if by not in get_args(Normalise):
        raise UserError(f"no such way to normalise scores, '{by}'; one of {', '.join(get_args(Normalise))}")
    if run.unit == "cosine":
        raise UserError(f"{run.folder}: cosines are normalised as they are; nothing else divides them")
    known, values = run.squares
    if not np.isin(rows, known).all():
        raise MissingStageError(
            f"{run.folder}: self-influences of {int((~np.isin(rows, known)).sum()):,} scored sequences were not "
            f"measured; run `{run.command('score')} score.self_influence=true`"
        )
    norm, own, step = values[:, np.searchsorted(known, rows)]
    found = {"norm": norm, "self-influence": own * run.scale, "step": step * run.scale**2}
    return np.sqrt(found[by])


def unit(by: Normalise, plain: str) -> str:
    """Of a score that is divided so, ``plain`` without."""
    named = {"none": plain, "norm": f"{plain} per ‖∇log p‖", "step": f"{plain} per ‖step‖"}
    return named.get(by, f"√{plain}")


def table(run: Run) -> pd.DataFrame:
    """As ``Run.self_influence``."""
    rows, (norm, own, step) = run.squares
    if not len(rows):
        raise MissingStageError(
            f"{run.folder}: no self-influences were measured; run `{run.command('score')} score.self_influence=true`"
        )
    found = run.sequences.iloc[rows]
    kept = [name for name in found.columns if name not in ("sequence", "document", "text")]
    columns = {
        "sequence": found["sequence"],
        "self_influence": own * run.scale,
        "norm": np.sqrt(norm),
        "step": np.sqrt(step) * run.scale,
    }
    # A field of the corpus may bear one of these names.
    columns |= {f"kept.{name}" if name in columns else name: found[name] for name in kept} | {"text": found["text"]}
    frame = pd.DataFrame({name: np.asarray(column) for name, column in columns.items()})
    frame.attrs.update(run.meaning() | {"sign": "never negative"})
    return frame
