"""The page of plans against runs: one factor for all workloads, and what it says of what misses a bound."""

from __future__ import annotations

from pathlib import Path

from jobs.plan_check import Row, cpu_seconds, page


def _rows(run: str, score: float, query: float, peak: float) -> list[Row]:
    stages = [Row(run, "lambda", 50.0, 100.0), Row(run, "score", score, 100.0), Row(run, "query", query, 2.0)]
    return [*stages, Row(run, "all stages", 50.0 + score + query, 202.0), Row(run, "peak bytes", peak, 1e9)]


def _said(rows: list[Row]) -> str:
    return " ".join(page(rows).split())


def test_one_factor_is_taken_for_all_rows_and_bytes_have_none() -> None:
    text = _said(_rows("A", 50.0, 1.0, 1.2e9) + _rows("B", 50.0, 1.0, 0.8e9))
    assert "One factor for all rows, 2.00," in text and "Everything keeps within them." in text
    assert "| A | peak bytes | 1.20 GB | 1.00 GB | 1.20 | 1.20 | yes |" in text


def test_what_misses_a_bound_is_named_unless_it_takes_little_time() -> None:
    text = _said(_rows("A", 20.0, 9.0, 1.4e9) + _rows("B", 80.0, 1.0, 1e9))
    assert "Missed: A: score (0.38); A: peak bytes (1.40); B: score (1.54)." in text
    assert "no, small |" in text and "query (" not in text
    assert "earlier" in page(_rows("A", 50.0, 1.0, 1e9), ["A"]) and "earlier" not in text


def test_what_the_driver_waits_for_is_the_workers_time(tmp_path: Path) -> None:
    events = (
        '{"task": "moments", "kinds": {"rotate": [3.0, 2.0]}, "event": "unit"}',
        '{"task": "moments", "who": "driver", "kinds": {"wait": [3.0, 2.0], "other": [0.5, 0.25]}}',
    )
    (tmp_path / "progress.jsonl").write_text("\n".join(events), encoding="utf-8")
    assert cpu_seconds(tmp_path / "progress.jsonl") == {"lambda": 2.25}
