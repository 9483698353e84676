"""The blocks of a run's scores read as one lazy array; apart from them, since xarray and pandas take long to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from raylux.store.folder import RunFolder
from raylux.store.scores import ScoreBlock, score_blocks


class _Scores(BackendArray):
    """[Q, n] over the queries and corpus rows asked for; NaN where no block holds a pair."""

    def __init__(
        self,
        folder: RunFolder,
        blocks: Sequence[ScoreBlock],
        queries: Sequence[str],
        rows: np.ndarray,
        scale: float,
        query_norms: Mapping[str, float] | None,
        dtype: np.dtype,
        keep: object,
        divisor: np.ndarray | None = None,
    ) -> None:
        self._keep, self._divisor = keep, divisor
        self._folder, self._blocks, self._scale, self._norms = folder, blocks, scale, query_norms
        self._queries, self._rows = list(queries), rows
        self.shape = (len(queries), len(rows))
        self.dtype = dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._outer)

    def _outer(self, key: tuple[Any, Any]) -> np.ndarray:
        places = [np.atleast_1d(np.arange(size)[part]) for part, size in zip(key, self.shape, strict=True)]
        # An index may name a place twice: each is read once, then all are laid out as asked.
        once, where = zip(*(np.unique(part, return_inverse=True) for part in places), strict=True)
        found = np.full([len(part) for part in once], np.nan, self.dtype)
        wanted = {self._queries[place]: at for at, place in enumerate(once[0])}
        rows = self._rows[once[1]]
        order = np.argsort(rows, kind="stable")
        for block in self._blocks:
            self._fill(found, block, wanted, rows, order)
        if self._divisor is not None:
            lengths = self._divisor[once[1]]
            # A gradient of no length has no influence either.
            found = np.divide(found, lengths, out=np.where(np.isnan(found), found, 0.0), where=lengths > 0)
        result = found[np.ix_(*where)]
        # A plain integer drops its axis, as NumPy does.
        dropped = tuple(0 if isinstance(part, (int, np.integer)) else slice(None) for part in key)
        return result[dropped]

    def _fill(
        self, result: np.ndarray, block: ScoreBlock, wanted: Mapping[str, int], rows: np.ndarray, order: np.ndarray
    ) -> None:
        here = [place for place, query in enumerate(block.queries) if query in wanted]
        if not here or not len(rows):
            return
        found = np.searchsorted(rows, block.rows, sorter=order)
        at = order[np.minimum(found, len(rows) - 1)]
        hit = rows[at] == block.rows
        if not hit.any():
            return
        group = self._folder.group(block.key)
        total = group.read("total")[here][:, hit] * self._scale
        if self._norms is not None:
            norms = np.array([self._norms[block.queries[place]] for place in here])
            total = total / (norms[:, None] * group.read("norms")[hit])
        where = np.ix_([wanted[block.queries[place]] for place in here], at[hit])
        # Of two stages a block has NaN where it left a pair to another, or to nobody.
        result[where] = np.where(np.isnan(total), result[where], total)


def lazy_scores(
    folder: RunFolder,
    queries: Sequence[str],
    rows: np.ndarray,
    names: Sequence[str],
    scale: float,
    attrs: Mapping[str, Any],
    query_norms: Mapping[str, float] | None = None,
    dtype: str = "float32",
    keep: object = None,
    blocks: Sequence[ScoreBlock] | None = None,
    divisor: np.ndarray | None = None,
) -> xr.DataArray:
    """(query, sequence) scores that are read when they are looked at.

    Args:
        folder: the run.
        queries: query ids, in the order wanted.
        rows: [n] corpus rows, in the order wanted.
        names: their sequence ids.
        scale: what a stored score is multiplied by.
        attrs: sign and unit.
        query_norms: for cosine: each query's gradient norm.
        dtype: of the result.
        keep: what has to live as long as the array (the owner of a temporary folder).
        blocks: where they are; default: those of the score stage.
        divisor: [n] what the scores of each row are divided by; default: nothing.
    """
    found = score_blocks(folder) if blocks is None else blocks
    array = _Scores(folder, found, queries, rows, scale, query_norms, np.dtype(dtype), keep, divisor)
    variable = xr.Variable(("query", "sequence"), indexing.LazilyIndexedArray(array), dict(attrs))
    coords = {"query": np.asarray(queries, object), "sequence": np.asarray(names, object)}
    return xr.DataArray(variable, coords=coords, name="influence")
