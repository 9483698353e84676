"""Foreign text steers neither a terminal nor a browser, and secrets stay where they belong."""

from __future__ import annotations

import html.parser
import io
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from raylux.calibrated import COLUMNS
from raylux.cli import main, output
from raylux.config import Config
from raylux.doctor import Finding
from raylux.errors import MissingStageError, NumericsError, UserError
from raylux.health import Quarantined
from raylux.layers import Coverage, SkippedLayer, TrackedLayer
from raylux.profiling import Spent
from raylux.queries import QueryPart
from raylux.report.html import render
from raylux.report.profile import StageTime
from raylux.report.tables import (
    comparison_table,
    coverage_table,
    profile_table,
    split_table,
    status_table,
    top_table,
    verification_table,
)
from raylux.shown import plain, redacted, redacted_values, visible

STEERING = {
    "colour": "\x1b[31mred",
    "cursor": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "link": "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "C1 CSI": "\x9b31m",
    "C1 OSC": "\x9d0;owned\x9c",
    "return": "harmless\rowned",
    "back": "abc\x08\x08\x08xyz",
    "bell": "\x07",
    "null": "a\x00b",
    "delete": "a\x7fb",
    "override": "\u202egnp.exe",
    "isolate": "\u2066abc\u2069\u2067",
    "zero width": "pass\u200bword\ufeff",
    "separators": "one\u2028two\u2029three\x85four\x0bfive",
    "surrogate": "\ud800",
    "tag characters": "\U000e0041\U000e0042",
}
MARKUP = "[red]r[/red] [link=https://evil.example]x[/link] [/nothing] :boom: [bold"
HOSTILE = MARKUP + "".join(STEERING.values())


def _printed(*renderables: Any) -> str:
    """What a terminal of 200 columns would get, colours and links switched on."""
    console = Console(
        width=200, file=io.StringIO(), force_terminal=True, color_system="truecolor", legacy_windows=False
    )
    for renderable in renderables:
        console.print(renderable)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


# Styles of our own: colours, bold, dim. No other escape sequence, no link.
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


def _steers(text: str) -> list[str]:
    """Characters that are left when our own styles are taken away."""
    return [c for c in _STYLE.sub("", text) if not c.isprintable() and c != "\n"]


def _whole(text: str) -> str:
    """A table's words without its lines: cells are folded."""
    return re.sub(r"\s+", "", _STYLE.sub("", text))


# ----------------------------------------------------------------------------------------------- terminal


@pytest.mark.parametrize("name", STEERING)
def test_nothing_that_steers_is_left_in_a_line(name: str) -> None:
    for shown in (plain(STEERING[name]), visible(STEERING[name]), str(UserError(STEERING[name]))):
        assert all(c.isprintable() or c == "\n" for c in shown), shown.encode("unicode_escape")
        assert "\\" in shown or name in ("separators", "return")  # escaped, or a blank


@given(st.text())
def test_no_text_steers_through_plain_or_an_error(text: str) -> None:
    assert plain(text).isprintable()
    assert str(UserError(text)).replace("\n", "").isprintable()


def _frame(text: str, kept: str = "") -> pd.DataFrame:
    # A corpus that holds lone surrogates does not get as far as a table.
    text, kept = text.replace("\ud800", ""), (kept or text).replace("\ud800", "")
    return pd.DataFrame(
        {"rank": [1], "sequence": [text], "influence": [0.5], "prefilter": [1.0], kept: [text], "text": [text]}
    )


def _verified(text: str) -> pd.DataFrame:
    """A measured pair of a query and a sequence of this name."""
    text = text.replace("\ud800", "")  # as in ``_frame``
    row: dict[str, Any] = dict.fromkeys(COLUMNS, 0.5)
    row |= {"query": text, "sequence": text, "chosen": "top", "linear": True, "resolved": True}
    frame = pd.DataFrame([row], columns=list(COLUMNS))
    frame.attrs.update(doses={"size": 0.1, "factor": 3.0, "whole": True}, train_size=7, sequences=7, asked=1)
    return frame


def _tables(text: str) -> list[Any]:
    layer = TrackedLayer(name=text, inputs=3, outputs=2, bias=True, conv1d=False)
    stage = SimpleNamespace(name=text, done=False, detail=text, command=text)
    return [
        top_table(_frame(text), text, unit=text),
        coverage_table(Coverage(tracked=(layer,), skipped=(), parameters=6)),
        status_table([stage]),
        split_table([(text, True, 0)]),
        comparison_table([{"method": text, text: text}], text),
        profile_table([StageTime(text, Spent({"dot": [1.0, 1.0]}, 1), Spent(), 1)]),
        verification_table(_verified(text)),
    ]


@pytest.mark.parametrize("place", range(7))
def test_tables_neither_steer_nor_read_markup(place: int) -> None:
    text = _printed(_tables(HOSTILE)[place])
    assert _steers(text) == []
    assert "\x1b]" not in text
    assert re.sub(r"\s+", "", MARKUP)[:20] in _whole(text)
    short = _printed(_tables(":boom:")[place])
    assert "💥" not in short and ":boom:" in _whole(short)


def test_every_line_of_the_command_line_is_harmless(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = [SimpleNamespace(name=HOSTILE, done=True, detail=HOSTILE, command=HOSTILE)]
    run: Any = SimpleNamespace(folder=HOSTILE, queries=[HOSTILE], status=lambda: status, quarantined=[1])
    output.say(HOSTILE)
    output.print_status(run)
    output.print_problems([HOSTILE])
    output.print_quarantine([Quarantined(HOSTILE, HOSTILE, (HOSTILE,), 3, HOSTILE)])
    output.print_numerics({HOSTILE: [HOSTILE, "b"]})
    output.print_finding(output.console(), Finding(HOSTILE, "ok", HOSTILE, HOSTILE))
    skipped = SkippedLayer(HOSTILE, HOSTILE, 3, HOSTILE)
    output.print_skipped(output.console(), Coverage((), (skipped,), 3))
    output.say(output.quarantine_summary(run))
    said = capsys.readouterr()
    assert [c for c in said.out + said.err if not c.isprintable() and c != "\n"] == []
    assert "💥" not in said.out and ":boom:" in said.out
    assert said.err.count("\n") == 2


def test_finding_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=90, file=io.StringIO(), force_terminal=True)
    output.print_finding(console, Finding("disk", "FAIL", HOSTILE, "s3://KEY:SECRETSECRET@host"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert _steers(text) == [] and "SECRETSECRET" not in text
    assert max(len(_STYLE.sub("", line)) for line in text.splitlines()) <= 90


@pytest.mark.parametrize("words", [["top", HOSTILE], ["run", f"{HOSTILE}.yaml"], [HOSTILE], ["inspect", "x", HOSTILE]])
def test_a_wrong_call_with_hostile_words_is_one_harmless_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # No system hands over the first two; what is behind a scheme is the store's to refuse.
    words = [word.replace("\x00", "").replace("\ud800", "").replace("://", "") for word in words]
    assert main(words) == 2
    line = capsys.readouterr().err
    assert line.endswith("\n") and line[:-1].isprintable()


def test_a_traceback_of_an_internal_error_is_harmless_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")

    def fail(*_: Any) -> Any:
        raise RuntimeError(f"token hf_0123456789abcdef {HOSTILE}")

    monkeypatch.setattr("raylux.config.Config.load", fail)
    for debug in ("0", "1"):
        monkeypatch.setenv("RAYLUX_DEBUG", debug)
        assert main(["run", "x.yaml"]) == 1
    said = capsys.readouterr()
    (log,) = tmp_path.glob("raylux-*.log")
    assert log.stat().st_mode & 0o077 == 0
    for text in (said.err, log.read_text(encoding="utf-8")):
        assert "RuntimeError" in text and "hf_0123456789" not in text
        assert [c for c in text if not c.isprintable() and c != "\n"] == []


# --------------------------------------------------------------------------------------------------- page


class _Page(html.parser.HTMLParser):
    """Tags with their attributes, as a browser would read them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, tuple(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def _run(text: str) -> Any:
    keys = {"run": "folder", "model": "path", "corpus": "path", "queries": "path"}
    config = Config.parse({section: {key: "harmless"} for section, key in keys.items()})
    # A config refuses control characters itself; the page is not to rely on it.
    hostile = {section: getattr(config, section).model_copy(update={key: text}) for section, key in keys.items()}
    record = {"id": text, "prompt": text, "completion": text, text + "key": text, "chat": [text, {text: text}]}
    return SimpleNamespace(
        queries=[text],
        query_records={text: record},
        config=config.model_copy(update=hostile),
        profile=lambda: [StageTime(text, Spent({"dot": [1.0, 1.0]}, 1), Spent(), 1)],
        unit="nats",
        train_size=7,
        quarantined=[],
        calibration=None,
        verification=lambda: _verified(text),
        agreements=dict,
        top=lambda query, k=10, by="sequence": _frame(text, kept=f"{text} kept"),
    )


SCRIPTS = (
    "<script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    '" style="background:url(javascript:alert(1))',
    "<a href='javascript:alert(1)'>x</a>",
    "<!-- <svg/onload=alert(1)>",
    "</style><style>*{display:none}",
    "<![CDATA[ ]]><iframe srcdoc='x'>",
    "{{ config }} {% raw %}",
    "&lt;script&gt; &#x3c;b&#x3e;",
    HOSTILE,
)


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_page_has_the_tags_of_a_page_whatever_its_texts_say(text: str) -> None:
    page = render(_run(text))
    parsed, harmless = _Page(page), _Page(render(_run("harmless")))
    assert parsed.seen == harmless.seen
    if text != HOSTILE:
        assert "".join(parsed.texts).count(text) >= 8  # title, places, id, prompt, completion, row, kept
    assert not [c for c in page if not c.isprintable() and c not in "\n\t"] or text == HOSTILE
    assert "\x1b" not in page and "\u202e" not in page


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1))
def test_no_text_changes_the_tags_of_a_page(text: str) -> None:
    text = text.replace("***", "")  # what stands for a secret
    assert _Page(render(_run(f"x{text}x"))).seen == _Page(render(_run("harmless"))).seen


def test_a_page_loads_and_runs_nothing() -> None:
    page = _Page(render(_run("harmless")))
    policy = [dict(attrs).get("content") for tag, attrs in page.seen if tag == "meta"]
    assert any(value and "default-src 'none'" in value for value in policy)
    names = {name for _, attrs in page.seen for name, _ in attrs}
    assert not {name for name in names if name.startswith("on")} | names & {"src", "srcset", "action", "srcdoc"}
    links = [value for _, attrs in page.seen for name, value in attrs if name == "href"]
    assert links and all(value and value.startswith("#q") for value in links)


# ------------------------------------------------------------------------------------------------ secrets

PASSWORD = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLE"
OPEN = [
    f"s3://AKIAEXAMPLE:{PASSWORD}@bucket/runs/a",
    f"simplecache::sftp://user:{PASSWORD}@host:22/runs/a",
    f"https://{PASSWORD.replace('/', '')}@host/file.jsonl",
    f"https://host/file?X-Amz-Expires=60&X-Amz-Signature={PASSWORD}&x=1",
    f"abfs://container@account.dfs.core.windows.net/a?sv=1&sig={PASSWORD}",
    f"smb://domain;user:{PASSWORD}@host/share",
    f"Authorization: Bearer {PASSWORD}",
    f"https://:{PASSWORD}@host",
]
HARMLESS = [
    "s3://bucket/runs/a@2.jsonl",
    "http://127.0.0.1:8080/v1/file@2?page=3",
    "abfs://container@account.dfs.core.windows.net/runs",
    "git@github.example:owner/name.git",
    "ssh://git@host/owner/name.git",
    "hf://datasets/owner/name@main/train.jsonl",
    "ray://10.0.0.1:10001",
    "memory://run/a:b",
    "anna@example.org wrote: see https://example.org/a?tokens=3",
    "C:\\runs\\a",
    "file:///runs/a",
    "tokens: 12; keyboard=3",
]


@pytest.mark.parametrize("text", OPEN)
def test_credentials_are_left_out_of_a_place(text: str) -> None:
    shown = redacted(text)
    assert PASSWORD[:12] not in shown and "EXAMPLE" not in shown.replace("AKIA", "")
    assert "***" in shown
    if text.startswith("s3:"):
        assert shown == "s3://***@bucket/runs/a"  # the place itself can still be told
    assert redacted(shown) == shown
    assert str(UserError(f"{text} is not there")) == f"{shown} is not there"


@pytest.mark.parametrize("text", HARMLESS)
def test_a_place_without_credentials_stays_as_it_is(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    "name",
    ["RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "HF_TOKEN", "DB_PASSWORD"],
)
def test_the_values_of_secret_variables_are_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0123456789-very-secret")
    assert redacted("401 for 0123456789-very-secret!") == "401 for ***!"
    for kind in (UserError, MissingStageError, NumericsError):
        error = pickle.loads(pickle.dumps(kind("401 for 0123456789-very-secret!")))
        assert "very-secret" not in str(error) + repr(error)


def test_paths_and_switches_in_variables_are_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/some/where/token")
    monkeypatch.setenv("SSL_KEY", str(tmp_path))
    monkeypatch.setenv("USE_TOKEN", "true")
    text = f"true: /some/where/token and {tmp_path} are there"
    assert redacted(text) == text


def test_a_config_loses_its_secrets_and_nothing_else() -> None:
    sections = {
        "run": {"folder": OPEN[0]},
        "model": {"path": "m", "layers": ["*.mlp.*"]},
        "corpus": {"path": OPEN[1], "keep": ["a"]},
        "queries": {"path": "q.yaml"},
    }
    data = Config.parse(sections).dump()
    shown = redacted_values(data)
    assert PASSWORD not in str(shown)
    assert shown["run"]["folder"] == "s3://***@bucket/runs/a"
    assert Config.model_validate(shown).dump() == shown
    for name in ("model", "queries", "fit", "engine"):
        assert shown[name] == data[name]


def test_secrets_stay_out_of_the_page_and_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    page = render(_run(OPEN[0]).__class__(**{**vars(_run("harmless")), "config": _run(OPEN[0]).config}))
    assert PASSWORD not in page and "s3://***@bucket/runs/a" in page
    run: Any = SimpleNamespace(folder=OPEN[0], queries=["q"], quarantined=[1], status=list)
    output.print_status(run)
    output.say(output.quarantine_summary(run))
    output.print_finding(output.console(), Finding("store", "FAIL", OPEN[0], OPEN[1]))
    output.print_problems([OPEN[0]])
    said = capsys.readouterr()
    assert PASSWORD not in said.out + said.err
    assert said.out.count("s3://***@bucket/runs/a") == 3


def test_a_query_is_split_into_harmless_tokens() -> None:
    """The type that ``raylux models`` shows: hostile token texts come from a tokenizer, which comes with a model."""
    assert QueryPart.__dataclass_fields__.keys() == {"tokens", "labels", "weight"}
    text = _printed(split_table([(part, bool(place % 2), place) for place, part in enumerate(STEERING.values())]))
    assert _steers(text) == []
