"""How a command ends: an exit code and, where something went wrong, one line on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import typer

from raylux.cli.codes import EXIT_DONE, EXIT_INTERNAL, EXIT_INTERRUPTED
from raylux.cli.commands import app
from raylux.cli.output import say
from raylux.errors import RayluxError
from raylux.shown import redacted, visible


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: the words after ``raylux``; default: those of the process. None at all ask for help.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=words or ["--help"], prog_name="raylux", standalone_mode=False)
        sys.stdout.flush()
    except RayluxError as error:
        return _fail(str(error), error.exit_code)
    except typer.TyperException as error:  # unknown command, missing argument, bad option
        return _fail(_usage(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough, as in `raylux top RUN | head -3`
        _close_stdout()
        code = EXIT_DONE
    except Exception as error:
        return _internal(error)
    if code == EXIT_INTERRUPTED:
        say("interrupted; run the same command again to continue")
    return code if isinstance(code, int) else EXIT_DONE


def _fail(message: str, code: int) -> int:
    say("error: " + " ".join(message.split()))
    return code


def _usage(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "raylux"
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    return f"{message} (see {command} --help)"


def _internal(error: Exception) -> int:
    """One line for an error that nobody foresaw; the traceback goes into a file unless it is asked for."""
    text = visible(redacted("".join(traceback.format_exception(error))), kept="\n")
    if os.environ.get("RAYLUX_DEBUG", "0") not in ("", "0"):
        print(text, file=sys.stderr)
        place = "traceback above"
    else:
        with tempfile.NamedTemporaryFile("w", prefix="raylux-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.write(text)
        place = f"traceback in {Path(file.name)}"
    first = (str(error).splitlines() or [""])[0][:300]
    return _fail(f"internal error: {type(error).__name__}: {first} ({place})", EXIT_INTERNAL)


def _close_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush has nobody to complain about."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
