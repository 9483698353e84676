"""Several runs over the same corpus and queries read as one: checkpoints, seeds, stages of a training.

The combined influence of a sequence is Σ_k w_k · influence_k. With kind ``identity`` and w_k the learning rates of the
checkpoints that is TracIn (Pruthi et al. 2020, equation 3); with any kind and equal weights, the mean over models. Of
runs that stand for the segments of one training, each of whose queries were carried back from the next one's
(``query.carried_from``), the parts add up: that is SOURCE (Bae et al. 2024, equation 11). Where several checkpoints
stand for a segment, its part is their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd
import xarray as xr

from raylux import ranking
from raylux.engine.stages.carried import END, prints_of, taken
from raylux.errors import UserError
from raylux.evaluate.datamodel import spearman
from raylux.normalised import Normalise, unit
from raylux.results import Run
from raylux.shown import redacted

# What runs have to say alike before their scores are of one kind.
_ALIKE = ("unit", "train_size")


class Combined:
    """Runs whose scores are added up.

    Attributes:
        runs: at least one, in the order given.
        weights: [K] of each; default: 1/K, the mean; where they are the segments of one training 1, or one by the
            number of checkpoints that stand for its segment.

    Raises:
        UserError: other weights than runs, or none that counts; the runs differ in unit, N, sequences or queries;
            no weights, and checkpoints are missing that queries were carried from.
    """

    def __init__(self, runs: Sequence[Run], weights: Sequence[float] | None = None) -> None:
        if not runs:
            raise UserError("no run is named; name at least one run folder")
        self.runs = list(runs)
        for run in self.runs[1:]:
            self._check(run)
        self._whole, lacking = self._segments()
        if weights is None and lacking:
            raise UserError(lacking)
        default = np.full(len(runs), 1 / len(runs)) if self._whole is None else self._whole
        self.weights = default if weights is None else np.asarray(weights, np.float64)
        if len(self.weights) != len(runs):
            raise UserError(
                f"{len(self.weights)} weights for {len(runs)} runs; give one for each, or none for the mean"
            )
        if not np.isfinite(self.weights).all() or not self.weights.any():
            raise UserError(f"weights {self.weights.tolist()}: finite numbers are wanted, and one that is not 0")

    def _check(self, other: Run) -> None:
        first = self.runs[0]
        names = f"{redacted(first.folder)} and {redacted(other.folder)}"
        for name in _ALIKE:
            one, two = getattr(first, name), getattr(other, name)
            if one != two:
                raise UserError(f"{names} differ in {name} ({one}, {two}): their scores cannot be added up")
        columns = ["sequence", "text"]
        if not first.sequences[columns].equals(other.sequences[columns]):
            raise UserError(f"{names} differ in their sequences: only runs over the same corpus can be combined")
        for query, record in other.query_records.items():
            if query in first.query_records and record != first.query_records[query]:
                raise UserError(f"{names} ask different things as '{query}'; only the same queries can be combined")
        if not self._shared(first, other):
            raise UserError(f"{names} have no query in common")

    def _segments(self) -> tuple[np.ndarray | None, str]:
        """Weights [K] of runs that are all checkpoints of one training's segments, by which these add up.

        Runs of one segment have their queries from the same runs, those of the next one and all of these; of the last
        segment from none, or from the end of the training.

        Returns:
            None where the runs are no segments of one training; and what is wrong where some of them would be.
        """
        if len(self.runs) == 1 or not self.queries or any(run.segment is None for run in self.runs):
            return None, ""
        query = self.queries[0]
        after = [frozenset(taken(run.store).get(query, ())) for run in self.runs]
        if not any(after):
            return None, ""
        members = {group: [run for run, own in zip(self.runs, after, strict=True) if own == group] for group in after}
        prints = [{prints_of(run.store, [query]).get(query) for run in runs} for runs in members.values()]
        for group, runs in members.items():
            ends = len(runs) == 1 if not group else all(one.startswith(END) for one in group)
            if (not ends and group not in prints) or len({run.segment for run in runs}) > 1:
                return None, (
                    f"{redacted(runs[0].folder)} is of one segment of a training, and the others with it are not the "
                    "whole of it: name the runs of all checkpoints of all segments, as they are now, or give weights"
                )
        return np.array([1 / len(members[group]) for group in after]), ""

    @staticmethod
    def _shared(one: Run, other: Run) -> list[str]:
        return [query for query in one.queries if query in other.query_records]

    @cached_property
    def queries(self) -> list[str]:
        """Ids of the queries that all runs have, in the order of the first."""
        return [query for query in self.runs[0].queries if all(query in run.query_records for run in self.runs)]

    @property
    def folder(self) -> str:
        """The runs' folders, for messages."""
        return ", ".join(run.folder for run in self.runs)

    @property
    def unit(self) -> str:
        """That of the runs; weighted where the weights neither sum to 1 nor add up segments."""
        unit = self.runs[0].unit
        whole = math.isclose(self.weights.sum(), 1.0) if self._whole is None else np.allclose(self.weights, self._whole)
        return unit if whole else f"weighted {unit}"

    def top(
        self,
        query: str,
        k: int = 10,
        by: Literal["sequence", "document"] = "sequence",
        normalise: Normalise = "none",
    ) -> pd.DataFrame:
        """The k sequences (or documents) with the largest combined influence on a query, as ``Run.top``.

        With ``normalise`` each run's scores are divided by its own lengths before they are added up.

        Raises:
            UserError: a run lacks the query, or has not scored the same sequences for it.
            MissingStageError: a run has no scores of it yet.
        """
        table, values = self._values(query, by, normalise)
        found = ranking.best(table.assign(influence=self.weights @ values), k)
        found.attrs.update(self.runs[0].meaning() | {"unit": unit(normalise, self.unit)})
        return found

    def scores(self) -> xr.DataArray:
        """Combined influence: dims (query, sequence); NaN where a run has not scored a pair."""
        arrays = [run.scores().sel(query=self.queries) for run in self.runs]
        names = arrays[0]["sequence"].to_numpy()
        for array in arrays[1:]:
            names = names[np.isin(names, array["sequence"].to_numpy())]
        values = [float(w) * array.sel(sequence=names) for w, array in zip(self.weights, arrays, strict=True)]
        total = sum(values[1:], values[0])
        return total.rename("influence").assign_attrs(arrays[0].attrs | {"unit": self.unit})

    def agreement(self, query: str) -> float:
        """Spearman's ρ between two runs' scores of a query, the mean over all pairs of runs; NaN of a single run."""
        _, values = self._values(query)
        pairs = [(one, other) for place, one in enumerate(values) for other in values[:place]]
        return float(np.mean([spearman(x[:, None], y[:, None])[0] for x, y in pairs])) if pairs else math.nan

    def _values(
        self, query: str, by: Literal["sequence", "document"] = "sequence", normalise: Normalise = "none"
    ) -> tuple[pd.DataFrame, np.ndarray]:
        """The first run's table of a query, and each run's influence of its rows [K, n]."""
        tables = [run.scored(query, by, normalise) for run in self.runs]
        for run, table in zip(self.runs[1:], tables[1:], strict=True):
            if not table[by].equals(tables[0][by]):
                raise UserError(
                    f"{redacted(run.folder)}: '{query}' was scored against {len(table):,} {by}s that are not those "
                    f"of {redacted(self.runs[0].folder)} ({len(tables[0]):,}); give both the same prefilter, "
                    "and every pair a score (score.best=null)"
                )
        return tables[0], np.stack([table["influence"].to_numpy(np.float64) for table in tables])
