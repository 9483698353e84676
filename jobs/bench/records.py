"""What a measurement is asked, and what it found: plain records that go through JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

RAYLUX, KRONFLUENCE = "raylux", "kronfluence"


@dataclass(frozen=True)
class Spec:
    """What to measure.

    Attributes:
        program: ``raylux`` or ``kronfluence``.
        workload: its name.
        sizes: numbers of queries; a job for each. kronfluence fits once for all of them.
        threads: CPU threads.
        overrides: ``section.key=value`` for raylux.
        empirical: labels of the data set instead of sampled ones, in both programs.
        bare: bare passes before the stages, and as many after; 0: none.
    """

    program: str
    workload: str
    sizes: tuple[int, ...]
    threads: int = 2
    overrides: tuple[str, ...] = ()
    empirical: bool = False
    bare: int = 2


@dataclass(frozen=True)
class Stage:
    """A stretch of the measurement.

    Attributes:
        name: covariance, eigenbases, lambda, query, score, rest (what raylux does in and between them beside
            their work: choices, ledger), load (the model), call (a whole command).
        queries: Q of the job it is a part of; None: of every job, as kronfluence's fit.
        wall: seconds.
        cpu: seconds of this process, all threads; of Ray's workers nothing is known.
        began: seconds since the epoch.
        rss: peak resident memory meanwhile, in bytes, as sampled from outside; 0: not sampled.
        uss: peak private memory, likewise.
    """

    name: str
    queries: int | None
    wall: float
    cpu: float
    began: float
    rss: int = 0
    uss: int = 0

    @property
    def ended(self) -> float:
        return self.began + self.wall


@dataclass
class Measured:
    """What a measurement found; ``numerics``: library, hardware, threads; ``choices``: raylux's frozen plan."""

    spec: Spec
    stages: list[Stage] = field(default_factory=list)
    bare_wall: list[float] = field(default_factory=list)
    bare_cpu: list[float] = field(default_factory=list)
    numerics: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, data: dict[str, Any]) -> Measured:
        spec = {key: tuple(x) if isinstance(x, list) else x for key, x in data["spec"].items()}
        rest = {key: data[key] for key in ("bare_wall", "bare_cpu", "numerics", "choices")}
        return cls(
            Spec(**spec),
            [Stage(**stage) for stage in data["stages"]],
            **rest,
        )


class Stopwatch:
    """Stages as they end."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    @contextmanager
    def on(self, name: str, queries: int | None = None) -> Iterator[None]:
        began, wall, cpu = time.time(), time.perf_counter(), time.process_time()
        yield
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.stages.append(Stage(name, queries, wall, cpu, began))

    def add(self, name: str, queries: int | None, wall: float, cpu: float, ended: float) -> None:
        self.stages.append(Stage(name, queries, wall, cpu, ended - wall))
