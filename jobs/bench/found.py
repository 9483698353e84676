"""All that a benchmark found, as one record that goes through JSON: measurements, agreement of scores, settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench.figures import Agreement
from jobs.bench.records import KRONFLUENCE, RAYLUX, Measured
from jobs.bench.rounds import FLOAT32, Request
from raylux.errors import UserError

Taken = tuple[Request, Measured, dict[int, np.ndarray]]


@dataclass(frozen=True)
class Compared:
    """Scores of ``found`` held against those of ``exact``."""

    workload: str
    queries: int
    found: str
    exact: str
    labels: str
    agreement: Agreement


@dataclass(frozen=True)
class Found:
    """What a benchmark found.

    Attributes:
        command: that made it.
        machine: in words.
        runs: every measurement.
        compared: scores.
    """

    command: str
    machine: str
    runs: list[tuple[Request, Measured]]
    compared: list[Compared]

    def of(self, purpose: str, workload: str, variant: str) -> list[Measured]:
        """The measurements of a variant, one per round."""
        wanted = (purpose, workload, variant)
        return [
            run for request, run in self.runs if (request.purpose, request.spec.workload, request.variant) == wanted
        ]

    def variants(self, purpose: str, workload: str) -> list[str]:
        """Their names, raylux first."""
        names = {
            request.variant
            for request, _ in self.runs
            if (request.purpose, request.spec.workload) == (purpose, workload)
        }
        return sorted(names, key=lambda name: (not name.startswith(RAYLUX), name))

    def workloads(self, purpose: str) -> list[str]:
        """Those measured, in order."""
        return list(dict.fromkeys(request.spec.workload for request, _ in self.runs if request.purpose == purpose))

    def save(self, path: Path) -> None:
        """As JSON."""
        data = {
            "command": self.command,
            "machine": self.machine,
            "runs": [{**_plain(request), "measured": measured.dump()} for request, measured in self.runs],
            "compared": [asdict(entry) for entry in self.compared],
        }
        path.write_text(json.dumps(data), encoding="utf-8")

    @classmethod
    def open(cls, path: Path) -> Found:
        """What ``save`` wrote.

        Raises:
            UserError: it is not that.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            runs = []
            for entry in data["runs"]:
                measured = Measured.load(entry["measured"])
                runs.append((Request(entry["purpose"], entry["variant"], entry["round"], measured.spec), measured))
            compared = [Compared(**{**x, "agreement": Agreement(**x["agreement"])}) for x in data["compared"]]
            return cls(data["command"], data["machine"], runs, compared)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: holds no results of this benchmark ({error})") from None

    def joined(self, other: Found) -> Found:
        """Both; where both measured a purpose on a workload, the other's replaces this one's."""
        newer = {(request.purpose, request.spec.workload) for request, _ in other.runs}
        runs = [run for run in self.runs if (run[0].purpose, run[0].spec.workload) not in newer]
        again = {entry.workload for entry in other.compared}
        compared = [entry for entry in self.compared if entry.workload not in again]
        machine = other.machine if other.machine == self.machine else f"{self.machine}; {other.machine}"
        return Found(f"{self.command}\n    {other.command}", machine, runs + other.runs, compared + other.compared)


def _plain(request: Request) -> dict[str, Any]:
    return {"purpose": request.purpose, "variant": request.variant, "round": request.round}


def compare(taken: Sequence[Taken]) -> list[Compared]:
    """raylux against kronfluence where both took the labels of the data set, and against itself in float32."""
    found: list[Compared] = []
    for purpose, workload in dict.fromkeys((request.purpose, request.spec.workload) for request, _, _ in taken):
        first = {
            request.variant: (scores, request.spec.empirical)
            for request, _, scores in taken
            if (request.purpose, request.spec.workload, request.round) == (purpose, workload, 0)
        }
        if purpose == "ray":
            continue
        for variant, (scores, empirical) in first.items():
            if variant != KRONFLUENCE and empirical and KRONFLUENCE in first:
                found += _each(workload, variant, KRONFLUENCE, scores, first[KRONFLUENCE][0], "data set")
            if variant == RAYLUX and FLOAT32 in first:
                labels = "data set" if empirical else "sampled"
                found += _each(workload, RAYLUX, FLOAT32, scores, first[FLOAT32][0], labels)
    return found


def _each(
    workload: str, name: str, other: str, x: Mapping[int, np.ndarray], y: Mapping[int, np.ndarray], labels: str
) -> list[Compared]:
    return [Compared(workload, size, name, other, labels, Agreement.of(x[size], y[size])) for size in x if size in y]
