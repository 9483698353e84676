"""Narrow a corpus to candidates by the tokens it shares with a query: pure functions over shards of the corpus.

Two passes: ``count_terms`` on every shard, merged; then ``score_shard`` with the merged counts. A sequence's
score depends on its own tokens and the merged counts alone, so any sharding gives the same bits.

All scores sum over the query's *distinct* tokens t, with C sequences of which n_t contain t, and
IDF(t) = log((C − n_t + 0.5) / (n_t + 0.5) + 1):

==========  ========================================================================================
``idf``     Σ IDF(t) over t in the sequence: TF-IDF of Grosse et al. 2023, arXiv 2308.03296
``bm25``    Σ IDF(t) · tf (k₁ + 1) / (tf + k₁ (1 − b + b · length / mean length)): Okapi, k₁ 1.5, b 0.75
``tfidf``   cosine of the TF-IDF vectors of sequence and query as scikit-learn weighs them (here the
            query's tokens count as often as they occur)
==========  ========================================================================================

Sequences that share no token with a query (score 0) are no candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_array

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfTransformer

KINDS = ("idf", "tfidf", "bm25")
K1 = 1.5
B = 0.75


@dataclass(frozen=True, eq=False)
class TermCounts:
    """How often tokens occur in (a shard of) the corpus.

    Attributes:
        documents: int64 [vocabulary], the number of sequences that contain each token.
        sequences: number of sequences.
        tokens: number of tokens.
    """

    documents: np.ndarray
    sequences: int
    tokens: int

    def idf(self) -> np.ndarray:
        """IDF of each token, float64 [vocabulary]; never negative."""
        count = self.documents.astype(np.float64)
        return np.log((self.sequences - count + 0.5) / (count + 0.5) + 1.0)


def count_terms(tokens: np.ndarray, offsets: np.ndarray, vocab_size: int) -> TermCounts:
    """Count the tokens of a shard; sequence i is ``tokens[offsets[i]:offsets[i + 1]]``, ``offsets[0]`` is 0."""
    matrix = _matrix(tokens, offsets, vocab_size)
    documents = np.bincount(matrix.indices, minlength=vocab_size).astype(np.int64)
    return TermCounts(documents, sequences=len(offsets) - 1, tokens=len(tokens))


def merge_counts(counts: Sequence[TermCounts]) -> TermCounts:
    """The counts of all shards together."""
    documents = np.stack([part.documents for part in counts]).sum(axis=0)
    return TermCounts(documents, sum(part.sequences for part in counts), sum(part.tokens for part in counts))


def score_shard(
    kind: str,
    tokens: np.ndarray,
    offsets: np.ndarray,
    counts: TermCounts,
    queries: Sequence[np.ndarray],
    top: int,
    first_row: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The best sequences of a shard for each query.

    Args:
        kind: ``idf``, ``tfidf`` or ``bm25``.
        tokens: the shard's tokens, flat.
        offsets: int64 [sequences + 1], ``offsets[0]`` is 0.
        counts: of the whole corpus.
        queries: the tokens of each query.
        top: rows per query, at most.
        first_row: the corpus row of the shard's first sequence.

    Returns:
        For each query its rows in the corpus (int64) and scores (float64), best first, ties by lower row.
    """
    weigh = _WEIGHTS.get(kind)
    if weigh is None:
        raise ValueError(f"prefilter kind '{kind}' has no score; known: {', '.join(_WEIGHTS)}")
    vocab_size = len(counts.documents)
    used = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *queries]))
    # Only columns that a query asks for matter; they stay in token order, so a row's sum is always the same sum.
    matrix = weigh(_matrix(tokens, offsets, vocab_size), np.diff(offsets), counts)[:, used]
    results = []
    for query in queries:
        scores = matrix @ _query_weights(kind, query, counts)[used]
        rows = np.flatnonzero(scores > 0.0)
        results.append(_best(rows + first_row, scores[rows], top))
    return results


def score_all(
    kind: str, tokens: np.ndarray, offsets: np.ndarray, vocab_size: int, queries: Sequence[np.ndarray]
) -> np.ndarray:
    """Scores of every sequence of a small corpus for each query, float64 [Q, sequences]; 0 where no token is shared."""
    counts, rows = count_terms(tokens, offsets, vocab_size), len(offsets) - 1
    found = np.zeros((len(queries), rows))
    for place, (best, values) in enumerate(score_shard(kind, tokens, offsets, counts, queries, rows, 0)):
        found[place, best] = values
    return found


def merge_top(parts: Sequence[tuple[np.ndarray, np.ndarray]], top: int) -> tuple[np.ndarray, np.ndarray]:
    """The best rows of one query from its best rows of each shard; order and ties as in ``score_shard``."""
    rows = np.concatenate([part[0] for part in parts] or [np.empty(0, dtype=np.int64)])
    scores = np.concatenate([part[1] for part in parts] or [np.empty(0, dtype=np.float64)])
    return _best(rows, scores, top)


def _best(rows: np.ndarray, scores: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((rows, -scores))[:top]
    return rows[order].astype(np.int64), scores[order].astype(np.float64)


def _matrix(tokens: np.ndarray, offsets: np.ndarray, vocab_size: int) -> csr_array:
    """Token counts, float64 [sequences, vocabulary], columns of a row in ascending order."""
    shape = (len(offsets) - 1, vocab_size)
    # Copies: sum_duplicates works in place, also on the offsets.
    counts = csr_array((np.ones(len(tokens)), tokens.astype(np.int64), offsets.astype(np.int64)), shape=shape)
    counts.sum_duplicates()
    return counts


def _query_weights(kind: str, query: np.ndarray, counts: TermCounts) -> np.ndarray:
    """What a sequence's weighed row is multiplied with, float64 [vocabulary]."""
    times = np.bincount(np.asarray(query, dtype=np.int64), minlength=len(counts.documents)).astype(np.float64)
    if kind == "tfidf":
        return _cosine_vectors(counts).transform(csr_array(times[None, :])).toarray()[0]
    return (times > 0).astype(np.float64)


def _weigh_idf(matrix: csr_array, lengths: np.ndarray, counts: TermCounts) -> csr_array:
    matrix.data = counts.idf()[matrix.indices]
    return matrix


def _weigh_bm25(matrix: csr_array, lengths: np.ndarray, counts: TermCounts) -> csr_array:
    mean = counts.tokens / max(counts.sequences, 1)
    saturation = np.repeat(K1 * (1.0 - B + B * lengths / mean), np.diff(matrix.indptr))
    matrix.data = counts.idf()[matrix.indices] * matrix.data * (K1 + 1.0) / (matrix.data + saturation)
    return matrix


def _weigh_tfidf(matrix: csr_array, lengths: np.ndarray, counts: TermCounts) -> csr_array:
    if matrix.shape[0] == 0:
        return matrix  # scikit-learn refuses an empty shard
    return _cosine_vectors(counts).transform(matrix)


def _cosine_vectors(counts: TermCounts) -> TfidfTransformer:
    """scikit-learn's transformer with the IDF of the whole corpus, which no single shard could fit."""
    from sklearn.feature_extraction.text import TfidfTransformer  # a second of everybody who reads a run

    transformer = TfidfTransformer()
    transformer.idf_ = np.log((1.0 + counts.sequences) / (1.0 + counts.documents)) + 1.0
    return transformer


_WEIGHTS = {"idf": _weigh_idf, "tfidf": _weigh_tfidf, "bm25": _weigh_bm25}
