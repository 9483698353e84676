"""Tables and the HTML page: foreign text cannot steer a terminal or a browser, and numbers keep their sign."""

from __future__ import annotations

import html.parser
import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from raylux.config import Config
from raylux.errors import MissingStageError
from raylux.layers import Coverage, TrackedLayer
from raylux.report.html import render, write_html
from raylux.report.tables import (
    comparison_table,
    coverage_table,
    number,
    plain,
    split_table,
    status_table,
    top_table,
)

HOSTILE = "<script>alert(1)</script> & \"x\" 'y' [red]r[/red] \x1b]0;owned\x07 \u202egnp.exe {{ 7*7 }}"


def printed(table: Table, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def top_frame(text: str = HOSTILE) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "rank": [1, 2],
            "sequence": ["a:0", text],
            "influence": [0.5, -0.25],
            "prefilter": [12.0, math.nan],
            "kind": ["fact", text],
            "text": ["The bridge of Thorholt.", text],
        }
    )


def stub_run(unit: str = "nats", kind: str = "ekfac", frame: pd.DataFrame | None = None) -> Any:
    shown = top_frame() if frame is None else frame
    config = Config.parse(
        {
            "run": {"folder": "runs/<b>x</b>"},
            "model": {"path": "m"},
            "corpus": {"path": "c.jsonl"},
            "queries": {"path": "q.yaml"},
            "curvature": {"kind": kind},
        }
    )
    record = {
        "id": HOSTILE,
        "prompt": HOSTILE,
        "completion": HOSTILE,
        "measurement": "logprob",
        "note": HOSTILE + "\ud800",
    }
    return SimpleNamespace(
        queries=["bridge", HOSTILE],
        query_records={HOSTILE: record},
        config=config,
        unit=unit,
        train_size=1234,
        quarantined=[],
        profile=list,
        calibration=None,
        verification=list,
        top=lambda query, k=10, by="sequence": shown.head(k),
    )


class Tags(html.parser.HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@given(st.text())
def test_plain_is_one_printable_line(text: str) -> None:
    shown = plain(text)
    assert "\n" not in shown
    assert all(c.isprintable() for c in shown)


def test_plain_escapes_what_steers_a_terminal() -> None:
    assert plain("a \x1b[31m b\x9b2J \u202e \x00") == "a \\x1b[31m b\\x9b2J \\u202e \\x00"
    assert plain("  two\n\tlines ") == "two lines"


@pytest.mark.parametrize("width", [1, 5, 11, 12, 40])
def test_plain_cuts_at_the_width(width: int) -> None:
    shown = plain("twelve chars", width)
    assert len(shown) <= width
    assert (shown == "twelve chars") == (width >= 12)
    assert shown == "twelve chars" or shown.endswith("…")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.5, "+0.500"), (-0.01234, "-0.0123"), (1234.5, "+1234"), (3e-9, "+3.00e-09"), (0.0, "0"), (math.nan, "–")],
)
def test_number_has_three_digits_and_a_sign(value: float, shown: str) -> None:
    assert number(value) == shown


def test_top_table_shows_sign_unit_and_foreign_text_as_it_is() -> None:
    text = printed(top_table(top_frame("[red]r[/red] \x1b[31m"), "bridge [bold]", unit="nats"))
    assert "\x1b" not in text
    assert "[red]r[/red] \\x1b[31m" in text
    assert "nats" in text
    assert "+0.500" in text
    assert "-0.250" in text
    assert "bridge [bold]" in text


def test_top_table_stays_within_100_columns_and_loses_no_id() -> None:
    frame = top_frame("word " * 100).assign(sequence=["x" * 40, "y" * 40], more="kept", other="kept")
    text = printed(top_table(frame, "bridge", unit="nats"))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert text.count("x") >= 40


def test_top_table_by_document() -> None:
    text = printed(top_table(top_frame().rename(columns={"sequence": "document"}), "bridge"))
    assert "document" in text
    assert "a:0" in text


def test_coverage_table_names_shapes_and_the_share() -> None:
    layer = TrackedLayer(name="h.0.mlp.c_fc", inputs=33, outputs=128, bias=True, conv1d=True)
    text = printed(coverage_table(Coverage(tracked=(layer,), skipped=(), parameters=2 * 33 * 128)))
    for part in ("h.0.mlp.c_fc", "32", "128", "Conv1D, bias", "4,224", "50.0%"):
        assert part in text


def test_status_table_shows_the_command_of_what_is_missing() -> None:
    stages = [
        SimpleNamespace(name="fit", done=True, detail="16 layers", command="raylux fit c.yaml"),
        SimpleNamespace(name="score", done=False, detail="[b]", command="raylux score c.yaml"),
    ]
    text = printed(status_table(stages))
    assert "raylux score c.yaml" in text
    assert "raylux fit c.yaml" not in text
    assert "[b]" in text


def test_split_table_shows_blanks_and_marks_the_completion() -> None:
    text = printed(split_table([("<s>", False, 0), (" in\n", False, 1), (" [Kel]", True, 2)]))
    assert "' in\\n'" in text
    assert [line for line in text.splitlines() if "completion, measured" in line] == [
        line for line in text.splitlines() if "' [Kel]'" in line
    ]


def test_comparison_table_prints_a_dash_where_nothing_was_measured() -> None:
    text = printed(comparison_table([{"method": "EK-FAC", "share": 0.875, "decoys": math.nan}], "all"))
    assert "0.88" in text
    assert "–" in text


def test_page_escapes_everything_foreign() -> None:
    page = render(stub_run())
    parsed = Tags(page)
    assert "script" not in parsed.tags
    assert "b" in parsed.tags  # the page's own
    assert "alert(1)" in "".join(parsed.texts)
    assert "{{ 7*7 }}" in page
    for character in ("\x1b", "\x07", "\u202e", "\ud800"):
        assert character not in page


def test_page_needs_nothing_beside_it() -> None:
    names = {name for name, value in Tags(render(stub_run())).attributes if value and not value.startswith("#")}
    assert not names & {"src", "href", "srcset", "action"}


def test_page_tells_positive_from_negative() -> None:
    page = render(stub_run())
    assert '<td class="n up">+0.500' in page
    assert '<td class="n down">-0.250' in page


@pytest.mark.parametrize(
    ("unit", "kind", "there", "absent"),
    [
        ("nats", "ekfac", ["1,234 sequences", "two- to threefold"], ["without a unit"]),
        ("raw", "ekfac", ["only their order"], ["1,234 sequences", "without a unit"]),
        ("dot", "cosine", ["without a unit"], ["two- to threefold", "one more copy"]),
    ],
)
def test_page_says_how_to_read_its_unit(unit: str, kind: str, there: list[str], absent: list[str]) -> None:
    page = render(stub_run(unit, kind))
    assert all(part in page for part in there)
    assert not any(part in page for part in absent)


def test_page_shows_the_best_and_the_strongest_negative() -> None:
    values = [3.0, 2.0, 1.0, 0.5, -0.5, -1.0, -2.0]
    frame = pd.DataFrame({"rank": range(1, 8), "sequence": list("abcdefg"), "influence": values, "prefilter": 1.0})
    page = render(stub_run(frame=frame.assign(text="t")), k=2, negative=2)
    ids = [value for value in Tags(page).texts if value in set("abcdefg")]
    assert ids == list("abfg") * 2  # two queries
    assert "3 more, then the strongest negative" in page


def test_page_of_a_query_without_candidates() -> None:
    assert "No sequence was scored" in render(stub_run(frame=top_frame().head(0)))


def test_page_of_a_query_whose_units_were_given_up() -> None:
    def top(query: str, k: int = 10) -> pd.DataFrame:
        raise MissingStageError("no scores")

    run = stub_run()
    run.top, run.quarantined = top, [1, 2]
    page = render(run)
    assert page.count("No sequence was scored") == 2 and "2 units of work are quarantined" in page
    assert "quarantined" not in render(stub_run())


def test_write_html_replaces_the_page_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report" / "index.html"
    assert write_html(stub_run(), str(path)) == str(path)
    write_html(stub_run("raw"), str(path))
    assert "only their order" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_write_html_to_a_url() -> None:
    import fsspec

    write_html(stub_run(), "memory://raylux-report/index.html")
    with fsspec.open("memory://raylux-report/index.html", "r", encoding="utf-8") as file:
        assert "bridge" in file.read()
