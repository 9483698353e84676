"""A command line on a stand-in API, and a config for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import raylux
from tests.cli.stubs import StubApi, write


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> StubApi:
    stub = StubApi()
    for name in ("api", "opening"):
        monkeypatch.setitem(sys.modules, f"raylux.{name}", stub)
        monkeypatch.setattr(raylux, name, stub, raising=False)
    monkeypatch.delenv("RAYLUX_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    return stub


@pytest.fixture
def config(tmp_path: Path) -> str:
    return write(
        tmp_path / "config.yaml",
        {
            "run": {"folder": str(tmp_path / "run")},
            "model": {"path": str(tmp_path / "model")},
            "corpus": {"path": str(tmp_path / "corpus.jsonl")},
            "queries": {"path": str(tmp_path / "queries.yaml")},
        },
    )
