"""What a check found, and how a check that breaks becomes a finding too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from raylux.errors import RayluxError

OK, WARN, FAIL = "ok", "warn", "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        name: of the check, nine letters at most.
        state: ``OK``, ``WARN`` (a run may work) or ``FAIL`` (it will not, or nobody should let it).
        detail: what was found.
        advice: what to do; empty where nothing is to be done.
    """

    name: str
    state: str
    detail: str
    advice: str = ""


class NotChecked(Exception):
    """A check needs what another one failed to find; the message names that one."""


def guarded(name: str, check: Callable[[], Finding]) -> Iterator[Finding]:
    """The finding of a check, whatever happens in it."""
    try:
        yield check()
    except NotChecked as reason:
        yield Finding(name, WARN, f"not checked: it needs the {reason}, see above")
    except RayluxError as error:  # says itself what to do
        yield Finding(name, FAIL, str(error))
    except Exception as error:
        said = (str(error).strip().splitlines() or ["no message"])[0][:300]
        yield Finding(name, FAIL, f"the check broke: {type(error).__name__}: {said}")
