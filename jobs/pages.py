"""What the studies' programs have in common: options from their settings, the command as a page shows it, the page.

A study named ``word-order`` is ``jobs/word_order.py``, and writes docs/results/word-order.md (and .png).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any

import torch

from raylux.errors import RayluxError, UserError

RESULTS = Path(__file__).parent.parent / "docs" / "results"
# What people have written below a page begins with this.
NOTES = "## What was missed, and why"


@dataclass(frozen=True)
class Page:
    """What a study found.

    Attributes:
        text: of its page.
        plot: draws its figure into a file; None: it has none.
        name: of its files; None: the study's.
    """

    text: str
    plot: Callable[[Path], None] | None = None
    name: str | None = None


def parser(
    doc: str | None, name: str, fields: Iterable[Field[Any]], folder: str | None = None
) -> argparse.ArgumentParser:
    """The options of a study.

    Args:
        doc: of the program.
        name: of the study.
        fields: of its settings, an option each.
        folder: what goes into ``--folder``, which must be given then; None: there is no such option.
    """
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields:
        found.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    if folder is not None:
        found.add_argument("--folder", type=Path, required=True, help=folder)
    found.add_argument("--write", action="store_true", help=f"write docs/results/{name}.md")
    return found


def run(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    name: str,
    study: Callable[[dict[str, Any], str], Page],
) -> int:
    """Run a study on one thread; print its page, write it where that was asked for. The exit code.

    Args:
        parser: from ``parser``.
        arguments: of the command line; None: the program's own.
        name: of the study.
        study: makes the page of the options and the command as the page shows it. A mistake of its user, which it
            raises, is one line.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = vars(parser.parse_args(given))
    write_it, folder = options.pop("write"), options.get("folder")
    if folder is not None:
        folder = options["folder"] = folder.absolute()
    torch.set_num_threads(1)
    try:
        page = study(options, command(f"{name.replace('-', '_')}.py", given, folder))
        print(page.text)
        if write_it:
            own = page.name or name
            write(page.text, f"{own}.md")
            if page.plot is not None:
                page.plot(RESULTS / f"{own}.png")
    except RayluxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def require(holds: bool, what: str) -> None:
    """Raises UserError with ``what`` where an option is out of its bounds."""
    if not holds:
        raise UserError(what)


def command(program: str, given: Sequence[str], folder: Path | None = None) -> str:
    """The command as the page shows it: where results are kept (``folder``) is nobody's business."""
    shown = ["RESULTS" if folder is not None and Path(part).absolute() == folder else part for part in given]
    return " ".join([f"python jobs/{program}", *map(shlex.quote, shown)])


def write(text: str, name: str) -> None:
    """Replace a page of docs/results, and keep what people have written below it (from ``NOTES`` on)."""
    path = RESULTS / name
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    _, heading, notes = before.partition(NOTES)
    path.write_text(f"{text.rstrip()}\n\n{heading}{notes}" if heading else text, encoding="utf-8")
