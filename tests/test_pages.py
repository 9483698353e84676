"""Pages of results: what people wrote below one outlives the next run, and a folder's place is not told."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Settings:
    steps: int = 4
    dose: float = 0.5


def study(options: dict[str, Any], command: str) -> pages.Page:
    folder = options.pop("folder")
    settings = Settings(**options)
    pages.require(settings.steps > 0, "--steps is at least 1")
    assert folder.is_absolute()
    return pages.Page(f"# {settings.steps} {settings.dose}\n\n    {command}\n", lambda path: path.write_bytes(b"drawn"))


def run(*given: str) -> int:
    return pages.run(pages.parser("What.", "some-study", fields(Settings), "kept here"), given, "some-study", study)


def test_a_study_is_run_and_its_page_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    place = str(tmp_path / "kept")
    assert run("--folder", place, "--steps", "7") == 0
    text = "# 7 0.5\n\n    python jobs/some_study.py --folder RESULTS --steps 7\n"
    assert capsys.readouterr().out == f"{text}\n" and not list(tmp_path.iterdir())
    assert run("--folder", place, "--dose", "2", "--write") == 0
    assert (tmp_path / "some-study.md").read_text(encoding="utf-8").startswith("# 4 2.0\n")
    assert (tmp_path / "some-study.png").read_bytes() == b"drawn"


def test_a_mistake_is_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert run("--folder", str(tmp_path), "--steps", "0", "--write") == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: --steps is at least 1\n") and not list(tmp_path.iterdir())
