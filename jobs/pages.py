"""What the studies' programs have in common: options from their settings, the command as a page shows it, the page."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "docs" / "results"
# What people have written below a page begins with this.
NOTES = "## What was missed, and why"


def add_settings(parser: argparse.ArgumentParser, fields: Iterable[Field[Any]]) -> None:
    """An option for each field of a study's settings, with its default."""
    for field in fields:
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)


def command(program: str, given: Sequence[str], folder: Path | None = None) -> str:
    """The command as the page shows it: where results are kept (``folder``) is nobody's business."""
    shown = ["RESULTS" if folder is not None and Path(part).absolute() == folder else part for part in given]
    return " ".join([f"python jobs/{program}", *shown])


def write(text: str, name: str) -> None:
    """Replace a page of docs/results, and keep what people have written below it (from ``NOTES`` on)."""
    path = RESULTS / name
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    _, heading, notes = before.partition(NOTES)
    path.write_text(f"{text.rstrip()}\n\n{heading}{notes}" if heading else text, encoding="utf-8")
