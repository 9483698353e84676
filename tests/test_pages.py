"""Pages of results: what people wrote below one outlives the next run, and a folder's place is not told."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from jobs import pages


def test_what_people_wrote_below_a_page_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    pages.write("# one\n", "page.md")
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == "# one\n"
    notes = f"{pages.NOTES}\n\n- all\n"
    (tmp_path / "page.md").write_text(f"# one\n\n{notes}", encoding="utf-8")
    pages.write("# two\n", "page.md")
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == f"# two\n\n{notes}"


def test_a_command_hides_where_results_are_kept(tmp_path: Path) -> None:
    given = ["--folder", str(tmp_path), "--write"]
    assert pages.command("study.py", given, tmp_path) == "python jobs/study.py --folder RESULTS --write"
    assert pages.command("study.py", ["--seed", "1"]) == "python jobs/study.py --seed 1"


def test_settings_are_options_of_their_own_type() -> None:
    @dataclass(frozen=True)
    class Settings:
        steps: int = 4
        dose: float = 0.5

    parser = argparse.ArgumentParser()
    pages.add_settings(parser, fields(Settings))
    assert Settings(**vars(parser.parse_args([]))) == Settings()
    found = vars(parser.parse_args(["--steps", "7", "--dose", "2"]))
    assert found == {"steps": 7, "dose": 2.0} and isinstance(found["dose"], float)
