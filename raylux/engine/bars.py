"""What an estimate must come to, so that its pair may be among the best of its query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FINE, FIRST = 0, 1
"""Estimates by all that is seen, and by what comes first."""


@dataclass(frozen=True)
class Bars:
    """An estimate reaches where it and its room, in proportion to the size of the sequence, come to a limit.

    Attributes:
        limits: [Q, 2] of either step; −∞: all reach.
        rooms: [Q, 2] of a sequence of size 1.
    """

    limits: np.ndarray
    rooms: np.ndarray

    def reached(self, values: np.ndarray, sizes: np.ndarray, step: int) -> np.ndarray:
        """Which estimates [Q, n] of sequences of these sizes [n] reach."""
        return values + self.rooms[:, step, None] * sizes >= self.limits[:, step, None]

    def of_some(self, places: Sequence[int]) -> Bars:
        """Of some of the queries."""
        return Bars(self.limits[places], self.rooms[places])

    def named(self, queries: Sequence[str]) -> dict[str, list[list[float]]]:
        """Query -> limit and room of each step, as JSON has them; what all reach is not named."""
        found = {}
        for query, limits, rooms in zip(queries, self.limits, self.rooms, strict=True):
            own = [[float(limit), float(room)] for limit, room in zip(limits, rooms, strict=True)]
            known = [step for step in own if np.isfinite(step[0])]
            if known:
                found[query] = known
        return found

    @classmethod
    def of(cls, queries: Sequence[str], named: dict[str, list[list[float]]]) -> Bars:
        """What ``named`` has told, of any queries."""
        told = [named.get(query, []) for query in queries]
        limits, rooms = np.full((len(told), 2), -np.inf), np.zeros((len(told), 2))
        for place, own in enumerate(told):
            for step, (limit, room) in enumerate(own):
                limits[place, step], rooms[place, step] = limit, room
        return cls(limits, rooms)
