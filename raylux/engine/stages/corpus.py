"""Corpus: documents to token sequences with ids that never change, stored once."""

from __future__ import annotations

import hashlib

import numpy as np

from raylux.corpus import Sequences
from raylux.sampling import sequence_key
from raylux.store import RunFolder, write_corpus


def run(folder: RunFolder, corpus: Sequences | None, source: dict[str, object]) -> None:
    """Store the corpus, unless the folder has it.

    Args:
        folder: the run.
        corpus: the tokenized documents.
        source: what tells one state of the corpus's files from another.
    """
    if corpus is None or folder.committed("corpus"):
        return
    names = corpus.table["sequence"].tolist()
    keys = np.array([sequence_key(name) for name in names], np.int64)
    digest = hashlib.blake2b(digest_size=16)
    for array in (corpus.tokens, corpus.offsets, keys):
        digest.update(array.tobytes())
    for more in (corpus.labels, corpus.classes):
        if more is not None:
            digest.update(more.tobytes())
    write_corpus(
        folder,
        corpus.tokens,
        corpus.offsets,
        corpus.labels,
        keys,
        corpus.table,
        corpus.classes,
        source=source,
        dropped=corpus.dropped,
        digest=digest.hexdigest(),
    )
