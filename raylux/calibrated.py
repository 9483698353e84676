"""How far the sizes of a run's scores can be trusted: what its ledger holds of better solves and of measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from raylux.evaluate import Agreement, Doses, Effect, Measured, agreement, effect, whole
from raylux.ledger import ASKED, CALIBRATION, FREEDOM, LEVERAGE, VERIFIED, WHOLE, sequence_unit
from raylux.store import RunFolder

if TYPE_CHECKING:
    from raylux.results import Run

LEVEL = 0.9
# ‖v − (G + λ)x‖/‖v‖ beyond which a solve is no better one: the scores of 0 have a residual of 1.
RESIDUAL = 0.3


@dataclass(frozen=True)
class Calibration:
    """By how much a run's scores are to be multiplied, as better solves of some queries tell.

    Attributes:
        agreement: of the better solves' scores with the run's own: their slope and its 90 % interval.
        queries: per query its own slope, the residual ‖v − (G + λ)x‖/‖v‖ that was reached, products with G.
        freedom: Σ Λ/(Λ + λ) over all tracked layers, the effective degrees of freedom.
        share: those by N: how far one copy of an average sequence is from an infinitesimal one.
    """

    agreement: Agreement
    queries: pd.DataFrame
    freedom: float
    share: float

    @property
    def slope(self) -> float:
        """The number that a score is multiplied by."""
        return self.agreement.slope.value

    @property
    def residual(self) -> float:
        """The largest of the queries'."""
        return float(self.queries["residual"].max())

    @property
    def solved(self) -> bool:
        """Whether the solves are good enough for the slope to mean anything."""
        return self.residual <= RESIDUAL

    def __str__(self) -> str:
        slope = self.agreement.slope
        if not self.solved:
            return (
                f"not calibrated: solves came to residuals of up to {self.residual:.1g} in "
                f"{self.queries['products'].max()} products, {RESIDUAL:g} is wanted; take more, "
                "raylux calibrate RUN --products"
            )
        return (
            f"calibrated: multiply by {slope.value:.2f} (90 %: {slope.low:.2f} to {slope.high:.2f}; "
            f"{len(self.queries)} queries × {self.agreement.pairs // max(1, len(self.queries))} sequences, residual "
            f"at most {self.residual:.0e})"
        )


def calibration(store: RunFolder, train_size: int) -> Calibration | None:
    """What a run was calibrated to; None where it was not, or not to the end."""
    if WHOLE not in store.committed(FREEDOM):
        return None
    summary = store.manifest(FREEDOM, WHOLE).meta
    units = [store.manifest(CALIBRATION, query).meta for query in summary["queries"]]
    if any(unit["setting"] != summary["setting"] for unit in units):
        return None  # another calibration is under way
    direct, solved = (np.array([unit[name] for unit in units]) for name in ("direct", "solved"))
    own = [agreement(p[None], m[None], LEVEL) for p, m in zip(direct, solved, strict=True)]
    rows = {
        "query": summary["queries"],
        "slope": [one.slope.value for one in own],
        "r_squared": [one.r_squared for one in own],
        "residual": [unit["residual"] for unit in units],
        "products": [unit["products"] for unit in units],
        "nearest": [unit["slope"] for unit in units],
    }
    freedom = float(sum(summary["freedom"].values()))
    return Calibration(
        agreement(direct, solved, LEVEL), pd.DataFrame(rows).set_index("query"), freedom, freedom / train_size
    )


COLUMNS = (
    "query", "sequence", "chosen", "predicted", "calibrated", "solved", "measured", "low", "high", "noise", "linear",
    "resolved", "whole", "whole_predicted", "whole_leverage", "whole_rif", "leverage", "rif",
)  # fmt: skip


def verification(run: Run) -> pd.DataFrame:
    """One row per pair of query and sequence that ``raylux verify`` was last asked for and has measured.

    Columns, all changes of the query's measurement in nats:
        chosen: ``top`` of this query, ``random``, or ``cross``: the top of another query.
        predicted: by one more copy, to first order, as the run's scores say; NaN where it did not score the pair.
        calibrated: the same by the run's calibration; NaN without one that is ``solved``.
        solved: the same by a better solve of this very sequence; NaN without ``--products``, or with too few of
            them (a residual beyond ``RESIDUAL``).
        measured, low, high: per copy, by the smaller doses, and the interval that noise of the search and the part
        of second order leave. NaN where the dose is below the noise (``resolved`` is False).
        noise: of ``measured``, of the search alone. linear: in proportion to the dose up to the larger one.
        whole: measured for a whole copy. whole_predicted: ``solved``, or else ``calibrated``, or else ``predicted``.
        whole_leverage: that by the sequence's leverage h, divided by 1 + h; NaN without ``--products``.
        whole_rif: the same by RIF's leverage.
        leverage, rif: those two, see ``raylux.evaluate.sizes``.

    ``attrs``: ``doses``, ``train_size``, ``sequences`` that stood for the training set, ``asked`` sequences.
    """
    store = run.store
    if ASKED not in store.committed(VERIFIED):
        return pd.DataFrame({name: [] for name in COLUMNS})
    asked = store.manifest(VERIFIED, ASKED).meta
    doses = Doses(**asked["doses"])
    there = store.committed(VERIFIED)
    rows = [row for row in asked["rows"] if sequence_unit(asked["name"], row) in there]
    effects = {row: _effect(store.manifest(VERIFIED, sequence_unit(asked["name"], row)).meta, doses) for row in rows}
    solved = _solved(store, asked, rows)
    found = calibration(store, asked["train_size"])
    names = run.sequences["sequence"].to_numpy()
    frames = []
    for place, query in enumerate(asked["queries"]):
        for at, row in enumerate(asked["rows"]):
            if row in effects:
                predicted = float(asked["predicted"][place][at])
                frames.append(
                    {
                        "query": query,
                        "sequence": names[row],
                        "chosen": _chosen(asked, query, row),
                        "predicted": predicted,
                        "calibrated": predicted * found.slope if found and found.solved else float("nan"),
                        **_changes(effects[row], place),
                        **_leverage(solved.get(row), query, asked["train_size"]),
                    }
                )
    frame = pd.DataFrame(frames, columns=[name for name in COLUMNS if not name.startswith("whole_")])
    best = frame["solved"].fillna(frame["calibrated"]).fillna(frame["predicted"])
    frame["whole_predicted"] = best
    for name, leverage in (("whole_leverage", "leverage"), ("whole_rif", "rif")):
        frame[name] = whole(best.to_numpy(), frame[leverage].to_numpy())
    frame = frame[list(COLUMNS)]
    frame.attrs.update(
        doses=asked["doses"], train_size=asked["train_size"], sequences=asked["sequences"], asked=len(asked["rows"])
    )
    return frame


def agreements(frame: pd.DataFrame) -> dict[str, Agreement]:
    """How ``verification``'s measured changes follow each kind of prediction; those that are there at all."""
    pairs = {
        "predicted": ("predicted", "measured"),
        "calibrated": ("calibrated", "measured"),
        "solved": ("solved", "measured"),
        "whole copy": ("whole_predicted", "whole"),
        "whole copy, by leverage": ("whole_leverage", "whole"),
        "whole copy, by RIF's leverage": ("whole_rif", "whole"),
    }
    found = {}
    for name, columns in pairs.items():
        tables = [frame.pivot(index="query", columns="sequence", values=column) for column in columns]
        p, m = (table.to_numpy(np.float64) for table in tables)
        if (np.isfinite(p) & np.isfinite(m)).any():
            found[name] = agreement(p, m, LEVEL)
    return found


def _effect(meta: Mapping[str, Any], doses: Doses) -> Effect:
    return effect(doses, Measured(np.array(meta["change"]), np.array(meta["noise"]), int(meta["evaluations"])))


def _solved(store: RunFolder, asked: Mapping[str, Any], rows: list[int]) -> dict[int, Mapping[str, Any]]:
    """Corpus row -> what its better solve says, where there is one."""
    if asked["leverage"] is None:
        return {}
    names = {row: sequence_unit(asked["leverage"], row) for row in rows}
    there = store.committed(LEVERAGE)
    return {row: store.manifest(LEVERAGE, name).meta for row, name in names.items() if name in there}


def _chosen(asked: Mapping[str, Any], query: str, row: int) -> str:
    if row in asked["top"][query]:
        return "top"
    return "random" if row in asked["random"] else "cross"


def _changes(found: Effect, place: int) -> dict[str, Any]:
    """What was measured of one query; nothing where the dose is below the noise."""
    shown = found.resolved
    value, error = (float(x[place]) if shown else float("nan") for x in (found.value, found.error))
    return {
        "measured": value,
        "low": value - error,
        "high": value + error,
        "noise": float(found.noise[place]),
        "linear": bool(found.linear[place]) and shown,
        "resolved": shown,
        "whole": float(found.whole[place]) if shown else float("nan"),
    }


def _leverage(meta: Mapping[str, Any] | None, query: str, train_size: int) -> dict[str, float]:
    if meta is None or meta["residual"] > RESIDUAL:
        return dict.fromkeys(("solved", "leverage", "rif"), float("nan"))
    solved, square = meta["solved"][meta["queries"].index(query)], meta["square"]
    # Solved well enough, xᵀ(G + λ)x is ∇log pᵀx.
    return {
        "solved": solved / train_size,
        "leverage": meta["energy"] / (square * train_size) if square > 0 else 0.0,
        "rif": square / train_size,
    }
