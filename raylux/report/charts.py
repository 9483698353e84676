"""Two plots for a page, as the numbers that an inline SVG is drawn by: figures with intervals, and lines.

Nothing but text and paths, so a page needs neither scripts nor images, and goes with the reader's light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raylux.evaluate import Estimate
from raylux.report.profile import COLOURS

# In units of the drawing: of the whole, of what stands left of the plot, of a row, of the axis below.
WIDTH, LEFT, ROW, AXIS = 640.0, 170.0, 22.0, 34.0
_RIGHT, _HEIGHT = 20.0, 260.0


def intervals(found: Mapping[str, Estimate], order: Sequence[str], marked: str) -> dict[str, Any]:
    """A row for each name: a dot, and a line over its interval.

    Args:
        found: name -> figure.
        order: of the rows, from above.
        marked: the name that others are compared with.
    """
    values = [x for one in found.values() for x in (one.value, one.low, one.high) if math.isfinite(x)]
    low, high = min([0.0, *values]), max([0.0, *values])
    room = 0.03 * (high - low)
    scale = _Scale(low - room * (low < 0), high + room * (high > 0), LEFT, WIDTH - _RIGHT)
    height = ROW * len(order)
    rows = [
        {
            "name": name,
            "y": ROW * (place + 0.5),
            "x": scale(found[name].value),
            "low": scale(found[name].low),
            "high": scale(found[name].high),
            "marked": name == marked,
            "said": f"{found[name]}",
        }
        for place, name in enumerate(order)
        if all(math.isfinite(x) for x in (found[name].value, found[name].low, found[name].high))
    ]
    return {
        "width": WIDTH,
        "height": height + AXIS,
        "left": LEFT,
        "bottom": height,
        "zero": scale(0.0),
        "ticks": [(scale(tick), f"{tick:.6g}") for tick in scale.ticks],
        "rows": rows,
    }


def lines(found: Mapping[str, tuple[np.ndarray, np.ndarray]], log: bool) -> dict[str, Any]:
    """A line for each name, y from 0 to 1.

    Args:
        found: name -> (x, y), x above 0 and at most 1.
        log: x on a logarithmic scale.
    """
    least = min(float(x.min()) for x, _ in found.values())
    across = _Log(least, 1.0, 50.0, WIDTH - _RIGHT) if log else _Scale(0.0, 1.0, 50.0, WIDTH - _RIGHT)
    up = _Scale(0.0, 1.0, _HEIGHT - AXIS, 10.0)
    return {
        "width": WIDTH,
        "height": _HEIGHT,
        "left": 50.0,
        "right": WIDTH - _RIGHT,
        "bottom": _HEIGHT - AXIS,
        "ticks": [(across(tick), f"{tick:.6g}") for tick in across.ticks],
        "levels": [(up(tick), f"{tick:.6g}") for tick in up.ticks],
        "lines": [
            {
                "name": name,
                "colour": COLOURS[(2 * place + 2) % len(COLOURS)],
                "points": " ".join(f"{across(float(a)):.1f},{up(float(b)):.1f}" for a, b in zip(x, y, strict=True)),
            }
            for place, (name, (x, y)) in enumerate(found.items())
        ],
    }


class _Scale:
    """Numbers from ``low`` to ``high`` as places from ``first`` to ``last``."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self._low, self._span = low, (high - low) or 1.0
        self._first, self._length = first, last - first

    def __call__(self, value: float) -> float:
        return round(self._first + (value - self._low) / self._span * self._length, 1)

    @property
    def ticks(self) -> list[float]:
        """Round numbers, four to ten of them."""
        rough = self._span / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first, last = math.ceil(self._low / step - 1e-9), math.floor((self._low + self._span) / step + 1e-9)
        return [place * step for place in range(first, last + 1)]


class _Log(_Scale):
    """The same by logarithms."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        super().__init__(math.log10(low), math.log10(high), first, last)

    def __call__(self, value: float) -> float:
        return super().__call__(math.log10(value))

    @property
    def ticks(self) -> list[float]:
        """Powers of ten."""
        last = self._low + self._span
        return [10.0**power for power in range(math.ceil(self._low - 1e-9), math.floor(last + 1e-9) + 1)]
