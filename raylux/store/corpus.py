"""The tokenized corpus in the run folder: flat token ids with offsets, and a table of where each came from."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raylux.store.folder import Manifest, RunFolder

if TYPE_CHECKING:
    import pandas as pd

    from raylux.batches import TokenRow


def write_corpus(
    folder: RunFolder,
    tokens: np.ndarray,
    offsets: np.ndarray,
    labels: np.ndarray | None,
    keys: np.ndarray,
    table: pd.DataFrame,
    classes: np.ndarray | None = None,
    **about: object,
) -> Manifest:
    """Store a corpus and commit it.

    Args:
        folder: where.
        tokens: [total] int32, flat.
        offsets: [n + 1] int64.
        labels: [total] int32 with -100 where no loss is taken, or None: every token but the first counts.
        keys: [n] int64, the sequences' keys.
        table: one row per sequence: sequence, document, text, kept columns.
        classes: [n] int32, the class of each sequence, which then has no other label.
        **about: what the manifest says beside it.
    """
    arrays = {"tokens": tokens, "offsets": offsets, "keys": keys}
    if labels is not None:
        arrays["labels"] = labels
    if classes is not None:
        arrays["classes"] = classes
    key, objects = folder.write("corpus/tokens", arrays)
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    table_key, more = folder.put("corpus/table", ".parquet", buffer.getvalue())
    total = int(offsets[-1])
    return folder.commit(
        "corpus", "corpus", objects | more, key=key, table=table_key, sequences=len(keys), tokens=total, **about
    )


def read_table(folder: RunFolder) -> pd.DataFrame:
    """The table of sequences, in corpus order. Raises DamagedError where it is not what was written."""
    manifest = folder.manifest("corpus", "corpus")
    import pandas as pd

    return pd.read_parquet(io.BytesIO(folder.read(manifest, manifest.meta["table"])))


class CorpusReader:
    """Sequences of the stored corpus by row."""

    def __init__(self, folder: RunFolder) -> None:
        self._group = folder.group(folder.manifest("corpus", "corpus").meta["key"], keep=True)
        self.offsets = self._group.read("offsets")
        self.keys = self._group.read("keys")
        self._has_labels = "labels" in self._group
        self._classes = self._group.read("classes") if "classes" in self._group else None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64 tokens of each sequence."""
        return np.diff(self.offsets)

    def rows(self, rows: Sequence[int] | np.ndarray) -> list[TokenRow]:
        """The sequences at ``rows``, in that order, reading the stretch that holds them once."""
        wanted = np.asarray(rows, np.int64)
        if not len(wanted):
            return []
        # One read for rows that lie close together; far apart ones are read by themselves.
        spread = self.offsets[wanted.max() + 1] - self.offsets[wanted.min()]
        if spread > 64 * int(self.lengths[wanted].sum()) + (1 << 20):
            return [self._rows(np.array([row]))[0] for row in wanted]
        return self._rows(wanted)

    def _rows(self, wanted: np.ndarray) -> list[TokenRow]:
        # They need torch, which whoever looks at a run's tables does without.
        from raylux.batches import IGNORED, TokenRow
        from raylux.classes import class_labels

        first = int(self.offsets[wanted.min()])
        stretch = slice(first, int(self.offsets[wanted.max() + 1]))
        tokens = self._group.read("tokens", stretch)
        labels = self._group.read("labels", stretch) if self._has_labels else None
        result = []
        for row in wanted:
            span = slice(int(self.offsets[row]) - first, int(self.offsets[row + 1]) - first)
            ids = tokens[span]
            if self._classes is not None:
                counted = class_labels(len(ids), int(self._classes[row]))
            else:
                counted = (ids if labels is None else labels[span]).astype(np.int32, copy=True)
                counted[0] = IGNORED
            result.append(TokenRow(ids, counted, int(self.keys[row])))
        return result
