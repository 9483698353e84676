"""What is said across queries: sequences that matter to many, and queries that share their influences."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from raylux.report import across as module
from raylux.report.across import across
from raylux.report.html import render
from raylux.report.tables import across_table, cluster_table
from tests.test_report import HOSTILE, Tags, stub_run


def best(**queries: dict[str, float]) -> pd.DataFrame:
    rows = [(query, sequence, value) for query, of in queries.items() for sequence, value in of.items()]
    return pd.DataFrame(rows, columns=["query", "sequence", "influence"])


FOUND = best(
    a={"s1": 8.0, "s2": 4.0, "s3": 1.0, "s4": -9.0},
    b={"s2": 0.2, "s1": 0.1, "s5": 0.02},
    c={"s6": 5.0, "s7": 5.0, "s1": 0.5},
    d={"s7": 1.0, "s6": 0.5},
    e={"s9": 3.0},
)


def test_sequences_among_the_best_of_many_stand_first() -> None:
    found = across(FOUND, k=2)
    assert found.queries == 5
    table = found.sequences.set_index("sequence")
    assert found.sequences["sequence"].tolist() == ["s7", "s1", "s2", "s6", "s9"], "s1 is third of c; s3, s5 as well"
    assert table.loc["s1"].to_dict() == {"queries": 2, "share": 0.4, "weight": (1 + 0.5) / 2, "strongest": "a"}
    assert table.loc["s7", "weight"] == 1.0 and table.loc["s6", "weight"] == 0.75
    assert table.loc["s2", "strongest"] == "b"
    assert "s4" not in table.index, "what lowers the measurement is not looked at"


def test_queries_that_share_their_influences_are_put_together() -> None:
    """Against the cosine of each pair, by hand."""
    table = across(FOUND).clusters
    assert [(set(part["query"]), size) for size, part in table.groupby("cluster")] == [
        ({"a", "b"}, 1),
        ({"c", "d"}, 2),
        ({"e"}, 3),
    ]
    vectors = {"a": [1, 0.5, 0.125, 0], "b": [0.5, 1, 0, 0.1]}
    x, y = (np.array(v) / np.linalg.norm(v) for v in vectors.values())
    alike = table.set_index("query")["alike"]
    assert alike["a"] == pytest.approx(x @ y) == pytest.approx(alike["b"]) and np.isnan(alike["e"])
    assert table.set_index("query")["shared"].to_dict() == {"a": "s1", "b": "s1", "c": "s7", "d": "s7", "e": "s9"}
    # Neither the scale of a query nor the order of the rows tells.
    scaled = FOUND.assign(influence=FOUND["influence"] * FOUND["query"].map({"a": 1e-6}).fillna(3.0))
    pd.testing.assert_frame_equal(across(scaled.iloc[::-1].sort_values("query", kind="stable")).clusters, table)


def test_planted_clusters_are_found() -> None:
    """Thirty queries of three kinds, each of its own sequences and some at random."""
    draw = np.random.default_rng(0)
    kinds = {f"q{place}": place % 3 for place in range(30)}
    queries: dict[str, dict[str, float]] = {}
    for query, kind in kinds.items():
        own = {f"k{kind}-{place}": float(draw.uniform(1, 2)) for place in draw.choice(20, 12, replace=False)}
        queries[query] = own | {f"r{place}": float(draw.uniform(0, 1)) for place in draw.choice(500, 20)}
    table = across(best(**queries)).clusters
    found = {frozenset(part["query"]) for _, part in table.groupby("cluster")}
    assert found == {frozenset(query for query in kinds if kinds[query] == kind) for kind in range(3)}


@pytest.mark.parametrize("frame", [best(), best(a={"s1": -1.0}), best(a={"s1": 2.0}), best(a={}, b={"s": 1.0})])
def test_few_queries_or_none_above_zero(frame: pd.DataFrame) -> None:
    found = across(frame)
    assert found.queries == frame["query"].nunique() == len(found.clusters)
    assert (found.sequences["queries"] == 1).all()
    _printed(across_table(found), cluster_table(found))


def test_the_latest_queries_are_clustered_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    found = across(FOUND)
    assert found.queries == 5 and sorted(found.clusters["query"]) == ["d", "e"]


def _printed(*tables: Any) -> str:
    console = Console(width=100, file=io.StringIO())
    for table in tables:
        console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_tables_and_page_show_it_and_nothing_of_it_steers() -> None:
    found = across(best(**{HOSTILE: {HOSTILE: 1.0, "s1": 0.5}, "b": {HOSTILE: 2.0}, "c": {"s9": 1.0}}))
    text = _printed(across_table(found), cluster_table(found))
    assert "\x1b" not in text and "\u202e" not in text
    assert "sequences among the best of several of 3 queries" in text and "1 share little with any other" in text
    run = stub_run()
    run.sequences = pd.DataFrame({"sequence": [HOSTILE], "text": [HOSTILE]})
    page = render(run, across=found)
    parsed = Tags(page)
    assert "script" not in parsed.tags and "Across 3 queries" in page and "1 share little with any other" in page
    for character in ("\x1b", "\x07", "\u202e"):
        assert character not in page
    assert "Across" not in render(stub_run())


def test_a_page_of_many_queries_shows_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylux.report.html.MOST_QUERIES", 1)
    page = render(stub_run())
    assert "1 more queries are not shown here" in page and 'id="q2"' not in page
    assert 'id="q1"' in render(stub_run(), queries=[HOSTILE])
