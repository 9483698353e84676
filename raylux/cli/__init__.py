"""The ``raylux`` command: ``main`` is the console script, ``app`` the typer application behind it."""

from raylux.cli.commands import app
from raylux.cli.ending import main

__all__ = ["app", "main"]
