"""What the tables of malformed inputs share: a case, and the proof that it is refused in one clear line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from raylux.errors import UserError


@dataclass(frozen=True)
class Case:
    """One malformed input.

    Attributes:
        name: unique within its table.
        content: what is written: bytes or text of a file, or whatever the table's test takes.
        says: words that the one line must hold: the place and the fault.
        options: of the reader, or the file's name.
    """

    name: str
    content: Any
    says: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


def case(name: str, content: Any, *says: str, **options: Any) -> Case:
    assert says, name
    return Case(name, content, says, options)


def table(*cases: Case) -> Any:
    """The parametrization of a test over cases; a name that comes twice would hide a case."""
    names = [item.name for item in cases]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"cases of one name: {twice}"
    return pytest.mark.parametrize("case", cases, ids=names)


def refused(call: Callable[[], object], *says: str) -> str:
    """The line with which ``call`` refuses its input; anything but one clear line fails the test."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    clear(line, *says)
    assert caught.value.exit_code == 2
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "the cause would be printed"
    return line


def clear(line: str, *says: str) -> None:
    assert line.isprintable(), f"more than one line, or characters that steer a terminal: {line!r}"
    assert "Traceback" not in line and len(line) <= 1_010, line
    for word in says:
        assert word in line, f"{word!r} not in {line!r}"


def valid_or_refused(call: Callable[[], object]) -> object | None:
    """What ``call`` returns, or None where it refuses its input in one line; any other end fails the test."""
    try:
        return call()
    except UserError as error:
        clear(str(error))
        return None
