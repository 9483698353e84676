"""Corpus: documents to token sequences with ids that never change, stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from raylux.corpus import Sequences
from raylux.errors import UserError
from raylux.sampling import sequence_key
from raylux.store import RunFolder, write_corpus


def run(folder: RunFolder, load: Callable[[], Sequences], source: dict[str, object]) -> None:
    """Tokenize and store the corpus, unless the folder has it.

    Args:
        folder: the run.
        load: reads the documents and tokenizes them.
        source: what tells one state of the corpus's files from another.

    Raises:
        UserError: the folder holds the corpus of other files.
    """
    if "corpus" in folder.committed("corpus"):
        known = folder.manifest("corpus", "corpus").meta["source"]
        if known != source:
            raise UserError(
                f"{folder.path}: its corpus was made from {_told(known)}, which is now {_told(source)}; "
                "choose another run.folder"
            )
        return
    corpus = load()
    names = corpus.table["sequence"].tolist()
    keys = np.array([sequence_key(name) for name in names], np.int64)
    digest = hashlib.blake2b(digest_size=16)
    for array in (corpus.tokens, corpus.offsets, keys):
        digest.update(array.tobytes())
    if corpus.labels is not None:
        digest.update(corpus.labels.tobytes())
    write_corpus(
        folder,
        corpus.tokens,
        corpus.offsets,
        corpus.labels,
        keys,
        corpus.table,
        source=source,
        dropped=corpus.dropped,
        digest=digest.hexdigest(),
    )


def _told(source: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in source.items())
