"""matplotlib for the jobs' pages: no window, and a line where it is not there."""

from __future__ import annotations

from typing import Any

from raylux.errors import UserError


def pyplot() -> Any:
    """``matplotlib.pyplot``, drawing to files alone.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot
    except ImportError:
        raise UserError("the plot needs matplotlib; `make bench` installs it") from None
    return matplotlib.pyplot
