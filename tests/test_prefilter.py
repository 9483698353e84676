"""The prefilter's formulas against plain loops, scikit-learn's own cosine, and any sharding against none."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from raylux.prefilter import TermCounts, count_terms, merge_counts, merge_top, score_shard

VOCABULARY = 40
KINDS = ("idf", "bm25", "tfidf")


def flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return np.array([token for row in rows for token in row], dtype=np.int32), offsets


def random_corpus(seed: int, sequences: int = 60) -> tuple[list[list[int]], list[np.ndarray]]:
    """Zipf-like tokens, so that some are in nearly every sequence and some in none; repeated rows give ties."""
    generator = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, VOCABULARY + 1)
    weights[-3:] = 0.0
    draw = lambda size: generator.choice(VOCABULARY, size=size, p=weights / weights.sum()).tolist()  # noqa: E731
    rows = [draw(int(generator.integers(2, 30))) for _ in range(sequences)]
    rows += rows[:7]
    queries = [np.array(draw(8), dtype=np.int32) for _ in range(4)]
    queries.append(np.array([VOCABULARY - 1, VOCABULARY - 2], dtype=np.int32))  # in no sequence
    queries.append(np.array([], dtype=np.int32))
    return rows, queries


def score(kind: str, rows: list[list[int]], queries: list[np.ndarray], top: int = 10**6) -> list[dict[int, float]]:
    tokens, offsets = flat(rows)
    found = score_shard(kind, tokens, offsets, count_terms(tokens, offsets, VOCABULARY), queries, top, 0)
    return [dict(zip(best.tolist(), scores.tolist(), strict=True)) for best, scores in found]


def loop_score(kind: str, rows: list[list[int]], query: np.ndarray) -> dict[int, float]:
    """The formulas of the module's docstring, term by term."""
    total, mean = len(rows), sum(map(len, rows)) / len(rows)
    result = {}
    for number, row in enumerate(rows):
        value = 0.0
        for token in set(query.tolist()):
            frequency = row.count(token)
            if frequency:
                n = sum(token in other for other in rows)
                idf = math.log((total - n + 0.5) / (n + 0.5) + 1)
                okapi = frequency * 2.5 / (frequency + 1.5 * (1 - 0.75 + 0.75 * len(row) / mean))
                value += idf * (okapi if kind == "bm25" else 1.0)
        if value > 0:
            result[number] = value
    return result


@pytest.mark.parametrize("kind", ["idf", "bm25"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_equal_a_plain_loop(kind: str, seed: int) -> None:
    rows, queries = random_corpus(seed)
    for query, found in zip(queries, score(kind, rows, queries), strict=True):
        expected = loop_score(kind, rows, query)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-12)


def test_idf_of_a_corpus_by_hand() -> None:
    # Token 1 is in 3 of 4 sequences, 2 in one; the query repeats 2, the first sequence repeats 1.
    found = score("idf", [[1, 1, 2], [1, 3], [1, 4], [3, 4]], [np.array([2, 2, 1])])[0]
    one, two = math.log(1.5 / 3.5 + 1), math.log(3.5 / 1.5 + 1)
    assert found == pytest.approx({0: one + two, 1: one, 2: one}, rel=1e-14)


@pytest.mark.parametrize("seed", [0, 1])
def test_tfidf_is_scikit_learns_cosine(seed: int) -> None:
    rows, queries = random_corpus(seed)
    vectorizer = TfidfVectorizer(analyzer=lambda row: row)
    vectors = vectorizer.fit_transform(rows)
    known = set(vectorizer.vocabulary_)
    for query, found in zip(queries, score("tfidf", rows, queries), strict=True):
        if not set(query.tolist()) <= known:
            assert found == {}
            continue
        expected = cosine_similarity(vectors, vectorizer.transform([query.tolist()]))[:, 0]
        assert found == pytest.approx({i: value for i, value in enumerate(expected) if value > 0}, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", [1, 5, 10**6])
@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_any_sharding_gives_the_same_bits(kind: str, top: int, shards: int) -> None:
    rows, queries = random_corpus(3)
    tokens, offsets = flat(rows)
    counts = count_terms(tokens, offsets, VOCABULARY)
    whole = score_shard(kind, tokens, offsets, counts, queries, top, 0)
    bounds = np.linspace(0, len(rows), shards + 1).astype(int)
    parts = [(int(begin), *flat(rows[begin:end])) for begin, end in pairwise(bounds)]
    merged = merge_counts([count_terms(t, o, VOCABULARY) for _, t, o in parts])
    np.testing.assert_array_equal(merged.documents, counts.documents)
    assert (merged.sequences, merged.tokens) == (counts.sequences, counts.tokens)
    found = [score_shard(kind, t, o, merged, queries, top, first) for first, t, o in parts]
    for number, (expected_rows, expected_scores) in enumerate(whole):
        got_rows, got_scores = merge_top([part[number] for part in found], top)
        np.testing.assert_array_equal(got_rows, expected_rows)
        np.testing.assert_array_equal(got_scores, expected_scores)
        assert got_rows.dtype == np.int64
        assert got_scores.dtype == np.float64


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_does_not_depend_on_the_other_queries(kind: str) -> None:
    rows, queries = random_corpus(4)
    together = score(kind, rows, queries)
    assert together == [score(kind, rows, [query])[0] for query in queries]


@pytest.mark.parametrize("kind", KINDS)
def test_best_first_and_ties_by_lower_row(kind: str) -> None:
    rows, queries = random_corpus(5)
    tokens, offsets = flat(rows)
    best, scores = score_shard(kind, tokens, offsets, count_terms(tokens, offsets, VOCABULARY), queries, 10**6, 100)[0]
    order = sorted(zip(-scores, best, strict=True))
    assert [row for _, row in order] == best.tolist()
    assert len(set(scores.tolist())) < len(scores), "the corpus repeats rows: ties were tried"
    assert best.min() >= 100


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=12),
    st.lists(st.integers(0, 9), max_size=5),
    st.integers(1, 4),
    st.sampled_from(KINDS),
)
def test_top_is_a_prefix_of_the_whole_order(rows: list[list[int]], query: list[int], top: int, kind: str) -> None:
    tokens, offsets = flat(rows)
    counts = count_terms(tokens, offsets, 10)
    asked = [np.array(query, dtype=np.int32)]
    whole = score_shard(kind, tokens, offsets, counts, asked, 10**6, 0)[0]
    best = score_shard(kind, tokens, offsets, counts, asked, top, 0)[0]
    np.testing.assert_array_equal(best[0], whole[0][:top])
    np.testing.assert_array_equal(best[1], whole[1][:top])
    assert set(whole[0].tolist()) == {i for i, row in enumerate(rows) if set(row) & set(query)}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_left_as_they_are(kind: str) -> None:
    tokens, offsets = flat([[1, 1, 2], [2, 2, 2]])
    score_shard(kind, tokens, offsets, count_terms(tokens, offsets, 5), [np.array([2])], 5, 0)
    assert tokens.tolist() == [1, 1, 2, 2, 2, 2]
    assert offsets.tolist() == [0, 3, 6]


def test_counts_of_terms() -> None:
    counts = count_terms(*flat([[1, 1, 2], [], [2, 3]]), 5)
    assert counts.documents.tolist() == [0, 1, 2, 1, 0]
    assert (counts.sequences, counts.tokens) == (3, 5)


def test_empty_shards_and_no_query() -> None:
    tokens, offsets = flat([])
    counts = TermCounts(np.array([1, 0, 2]), sequences=3, tokens=9)
    for kind in KINDS:
        ((rows, scores),) = score_shard(kind, tokens, offsets, counts, [np.array([0, 2])], 5, 0)
        assert len(rows) == len(scores) == 0
        assert score_shard(kind, *flat([[0, 2]]), counts, [], 5, 0) == []
    assert len(merge_top([], 5)[0]) == 0


def test_a_kind_without_score_is_refused() -> None:
    tokens, offsets = flat([[1, 2]])
    with pytest.raises(ValueError, match="'none' has no score"):
        score_shard("none", tokens, offsets, count_terms(tokens, offsets, 5), [], 5, 0)
