"""Ctrl-C at a chosen moment."""

from __future__ import annotations

from typing import Any

import pytest


class Interrupt:
    """Raises KeyboardInterrupt at the n-th call of a method or a module's function, before or after what it does."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, method: str, call: int, after: bool) -> None:
        self.left, usual = call, getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not after:
                raise KeyboardInterrupt
            result = usual(*args, **kwargs)
            if self.left == 0:
                raise KeyboardInterrupt
            return result

        patch.setattr(owner, method, counted)
