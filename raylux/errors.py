"""The errors that raylux raises on purpose.

Every mistake of a user ends in one line that says what is wrong, where, and what to do;
the command line prints that line alone and leaves with the error's exit code. A message quotes places and foreign
text: it loses secrets and whatever could steer a terminal as it is made, so that no caller has to think of it.
"""

from __future__ import annotations

from raylux.shown import redacted, visible

_LONGEST = 1_000


class RayluxError(Exception):
    """Base of every error raised on purpose; ``exit_code`` is what the command line returns.

    The message is one line whatever was put into it: texts of a user's file and of other libraries' errors may
    hold line breaks, control characters or a megabyte.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        # Cut before, for secrets are looked for slowly, and after, so that none is cut in two where it shows.
        super().__init__(visible(_cut(redacted(_cut(message, 4 * _LONGEST)), _LONGEST)))


class UserError(RayluxError):
    """The input cannot be served as it stands: config, corpus, queries, model, run folder, cluster."""

    exit_code = 2


class MissingStageError(UserError):
    """A stage was asked for whose earlier stage has not been run; the message holds the command."""


class NumericsError(RayluxError):
    """A NaN or an infinity where none may be; the message names layer and unit."""


def shown(value: object, longest: int = 60) -> str:
    """A foreign value for a message: as Python writes it, but never longer than ``longest`` characters.

    Containers are named by their kind, not spelled out: writing one may take as long as it is large.
    """
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)) and len(value) > longest:
        return f"{value[:longest]!r}…"
    return repr(value)


def _cut(text: str, longest: int) -> str:
    """``text`` without the middle of what is too long."""
    return text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 2 :]}"
