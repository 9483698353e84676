"""Names of a package that are imported when they are first used: whoever uses others does not wait for torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def on_use(package: str, **modules: str) -> Callable[[str], Any]:
    """The package's ``__getattr__``; a type checker is told of the names by an import of its own.

    Args:
        package: its ``__name__``.
        **modules: module of the package -> the names that it has, between blanks.
    """
    homes = {name: module for module, names in modules.items() for name in names.split()}

    def found(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return found
