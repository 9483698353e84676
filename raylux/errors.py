"""The errors that raylux raises on purpose.

Every mistake of a user ends in one line that says what is wrong, where, and what to do;
the command line prints that line alone and leaves with the error's exit code. A message quotes places and foreign
text: it loses secrets and whatever could steer a terminal as it is made, so that no caller has to think of it.
"""

from __future__ import annotations

from raylux.shown import redacted, visible


class RayluxError(Exception):
    """Base of every error raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(visible(redacted(arg), kept="\n") if isinstance(arg, str) else arg for arg in args))


class UserError(RayluxError):
    """The input cannot be served as it stands: config, corpus, queries, model, run folder, cluster."""

    exit_code = 2


class MissingStageError(UserError):
    """A stage was asked for whose earlier stage has not been run; the message holds the command."""


class NumericsError(RayluxError):
    """A NaN or an infinity where none may be; the message names layer and unit."""
