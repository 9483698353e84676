"""Batches: every sequence once, shapes that depend on the sequence's own length only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylux.batches import (
    IGNORED,
    KEPT_PADDING,
    MOST_ROWS,
    Batch,
    TokenRow,
    bucket,
    collate,
    fit_batches,
    is_scored_so,
    longest,
    query_batches,
    query_shape,
    score_batches,
)
from raylux.engine import choices

lengths_of = st.lists(st.integers(1, 70), min_size=1, max_size=40)


def rows_of(lengths: Sequence[int]) -> list[TokenRow]:
    """Rows whose tokens name their place, so that nothing can be swapped unseen."""
    rows = []
    for place, length in enumerate(lengths):
        tokens = (1000 * (place + 1) + np.arange(length)).astype(np.int32)
        labels = tokens.copy()
        labels[0] = IGNORED
        rows.append(TokenRow(tokens, labels, key=7 * place + 1))
    return rows


def check_holds(batches: Sequence[Batch], rows: Sequence[TokenRow]) -> None:
    """Every row once, with its tokens, labels and key, and nothing else under the mask."""
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(rows)))
    for batch in batches:
        for place, row in enumerate(batch.rows):
            mask = batch.mask[place]
            assert batch.input_ids[place][mask].tolist() == rows[row].tokens.tolist()
            assert batch.labels[place][mask].tolist() == rows[row].labels.tolist()
            assert (batch.labels[place][~mask] == IGNORED).all()
            assert int(batch.keys[place]) == rows[row].key
        assert batch.tokens == sum(len(rows[row].tokens) for row in batch.rows)


@settings(max_examples=40, deadline=None)
@given(lengths_of, st.integers(1, 200), st.booleans())
def test_fit_batches_hold_every_sequence_once(lengths: list[int], batch_tokens: int, pad_left: bool) -> None:
    rows = rows_of(lengths)
    batches = fit_batches(rows, batch_tokens, pad_left)
    check_holds(batches, rows)
    for batch in batches:
        longest = max(lengths[row] for row in batch.rows)
        assert len(batch.input_ids) == len(batch.rows)
        assert batch.input_ids.numel() <= batch_tokens or len(batch.rows) == 1
        if batch.input_ids.shape[1] != longest:
            assert is_scored_so(batch, batch_tokens)
            assert batch.input_ids.numel() <= 1.05 * batch.tokens


def test_fit_batches_pad_little() -> None:
    """Texts of all lengths in a unit of some thousand tokens."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4.3, 0.5, 48), 12, 256).astype(int)
    for batch_tokens, limit in ((128, 0.03), (1024, 0.08)):
        batches = fit_batches(rows_of(lengths), batch_tokens, most=longest(lengths, None))
        assert sum(batch.input_ids.numel() for batch in batches) <= (1 + limit) * lengths.sum()
    # What is kept for the scores takes a little more, and most batches are theirs.
    most = longest(lengths, None)
    batches = fit_batches(rows_of(lengths), 128, most=most, padding=KEPT_PADDING)
    assert sum(batch.input_ids.numel() for batch in batches) <= 1.05 * lengths.sum()
    assert sum(batch.tokens for batch in batches if is_scored_so(batch, 128, most)) > 0.8 * lengths.sum()


@settings(max_examples=60, deadline=None)
@given(lengths_of, st.integers(1, 2000), st.integers(0, 2))
def test_a_fit_batch_that_says_so_has_the_shape_of_the_scores(lengths: list[int], batch_tokens: int, more: int) -> None:
    """Its rows get the same padding, company size and use of the mask as when they are scored."""
    rows = rows_of(lengths * 4)
    most = longest(np.array(lengths), None) + 8 * more
    shapes = {
        row: (batch.input_ids.shape, bool(batch.mask[place].all()))
        for batch in score_batches(rows, batch_tokens, most)
        for place, row in enumerate(batch.rows)
    }
    for batch in fit_batches(rows, batch_tokens, most=most):
        if is_scored_so(batch, batch_tokens, most):
            for place, row in enumerate(batch.rows):
                assert shapes[row] == (batch.input_ids.shape, bool(batch.mask[place].all()))


@settings(max_examples=40, deadline=None)
@given(lengths_of, st.integers(1, 400), st.one_of(st.none(), st.just(70)))
def test_score_batches_hold_every_sequence_once(lengths: list[int], batch_tokens: int, most: int | None) -> None:
    rows = rows_of(lengths)
    batches = score_batches(rows, batch_tokens, most)
    check_holds(batches, rows)
    for batch in batches:
        assert batch.input_ids.numel() <= batch_tokens or len(batch.input_ids) == 1
        assert len(batch.input_ids) <= MOST_ROWS
        # A batch without padding takes another path through attention: all of its rows have some, or none.
        full = batch.mask.all(1)
        assert full.all() or not full.any()
        # Filler repeats the batch's first sequence.
        for place in range(len(batch.rows), len(batch.input_ids)):
            assert batch.input_ids[place].equal(batch.input_ids[0])


@settings(max_examples=40, deadline=None)
@given(lengths_of, lengths_of, st.integers(1, 400))
def test_the_shape_of_a_score_batch_does_not_depend_on_company(one: list[int], other: list[int], size: int) -> None:
    def shapes(lengths: Sequence[int]) -> dict[int, tuple[int, ...]]:
        batches = score_batches(rows_of(lengths), size, 70)
        return {lengths[row]: tuple(batch.input_ids.shape) for batch in batches for row in batch.rows}

    together = shapes([*one, *other])
    assert together == {**shapes(one), **shapes(other)}


def test_buckets_grow_and_waste_little() -> None:
    padded = [bucket(length) for length in range(1, 5000)]
    assert padded == sorted(padded)
    for length, size in enumerate(padded, start=1):
        # At least one token, and at most a step: an eighth of the length, or 8 tokens where that is more.
        assert 1 <= size - length <= max(8, length / 8)
    assert len(set(padded)) < 80


@pytest.mark.parametrize("most", [64, 100, 1024])
def test_padding_does_not_exceed_the_context(most: int) -> None:
    assert all(length <= bucket(length, most) <= most for length in range(1, most + 1))
    # A sequence longer than the context is not cut here.
    assert bucket(most + 5, most) == most + 5


def test_padding_stands_on_the_side_asked_for() -> None:
    rows = rows_of([2, 4])
    right, left = collate(rows, [5, 3], 5), collate(rows, [5, 3], 5, pad_left=True)
    assert right.rows == left.rows == (5, 3)
    assert right.mask.int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert left.mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]


def test_the_longest_come_first_in_a_fit_unit() -> None:
    batches = fit_batches(rows_of([30, 90, 50, 90, 10]), 180)
    # 50 tokens are enough to be busy with: what follows goes without padding to 50.
    assert [batch.rows for batch in batches] == [(1, 3), (2,), (0, 4)]


def test_queries_fill_batches_of_a_shape_that_follows_from_their_length() -> None:
    """Rows that would be alone in a batch are run without padding; others in batches of whole rows."""
    lengths = (5, 7, 40, 6, 33, 8, 16, 3, 31, 41, 5)
    rows = [TokenRow(np.arange(length, dtype=np.int32), np.arange(length, dtype=np.int32)) for length in lengths]
    alone = query_batches(rows, 0)
    assert [tuple(batch.mask.shape) for batch in alone] == [(1, length) for length in lengths]
    found = query_batches(rows, 64, 40)
    assert sorted(place for batch in found for place in batch.rows) == list(range(len(rows)))
    for batch in found:
        for at, place in enumerate(batch.rows):
            length = len(rows[place].tokens)
            assert batch.input_ids[at, :length].tolist() == rows[place].tokens.tolist()
            assert batch.mask[at].sum() == length and tuple(batch.mask.shape) == query_shape(length, 64, 40)
            (own,) = query_batches([rows[place]], 64, 40)
            assert own.mask.shape == batch.mask.shape


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        ([[7]] * 64, 512),  # four full batches
        ([[7, 7]] * 32, 512),
        ([[7]] * 31, 0),  # few
        ([[7]] * 33, 0),  # a third batch for one
        ([[place] for place in range(8, 520, 8)], 0),  # all of different lengths
        ([[600]] * 64, 0),  # a batch would have one row
        ([[7]] * 64 + [[600]], 512),
    ],
)
def test_queries_run_together_where_they_are_many_and_alike(asked: list[list[int]], tokens: int) -> None:
    assert choices.query_tokens("cpu", 128, asked, 600) == tokens
