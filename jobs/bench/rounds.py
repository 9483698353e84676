"""Which measurements a benchmark takes, in which order, and how one is started and watched."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from jobs.bench.records import KRONFLUENCE, RAYLUX, Measured, Spec, Stage
from jobs.bench.workloads import WORKLOADS
from raylux.config import EngineSection
from raylux.engine.choices import has_bfloat16
from raylux.errors import RayluxError

ROOT = Path(__file__).parent.parent.parent
FLOAT32 = "raylux float32"
SIZES = {"A": (8, 32, 256), "B": (8, 32), "C": (8,), "S": (128,), "tiny": (2, 4)}
# A scoring pass alone cannot be told apart in kronfluence, and one pass over C takes a minute.
ALONE, ONCE = frozenset({"S"}), frozenset({"C"})
_EVERY, _PRIVATE_EVERY = 0.1, 0.5
_LIMIT = 7200.0
# Enough units for every worker, the same ones however many there are.
_UNITS = ("fit.unit_tokens=2048", "score.unit_size=16")


@dataclass(frozen=True)
class Request:
    """A measurement that is to be taken.

    Attributes:
        purpose: ``speed``; ``agreement`` (labels of the data set, to compare scores); ``ray``.
        variant: how the tables call it.
        round: from 0.
        spec: for the child.
    """

    purpose: str
    variant: str
    round: int
    spec: Spec

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.spec.sizes))
        return f"{self.purpose}, round {self.round + 1}: {self.variant} on {self.spec.workload}, Q = {sizes}"


@dataclass(frozen=True)
class Choice:
    """What is asked of a benchmark; see ``jobs/benchmark.py`` for the options."""

    workloads: tuple[str, ...]
    programs: tuple[str, ...] = (RAYLUX, KRONFLUENCE)
    sizes: tuple[int, ...] = ()
    rounds: int = 3
    threads: int = 2
    bare: int = 2
    overrides: tuple[str, ...] = ()
    quick: bool = False
    ray: bool = False

    def sizes_of(self, workload: str) -> tuple[int, ...]:
        return self.sizes or SIZES[workload]


def precisions() -> dict[str, tuple[str, ...]]:
    """Variants of raylux -> overrides: as it is by default, and, where that differs, in float32 throughout."""
    if "contraction_dtype" not in EngineSection.model_fields or not has_bfloat16("cpu"):
        return {FLOAT32: ()}
    return {RAYLUX: (), FLOAT32: ("engine.contraction_dtype=float32",)}


def plan(choice: Choice) -> list[Request]:
    """Every measurement, in order; within a round the programs follow one another, each round begins with another."""
    found = []
    for workload in choice.workloads:
        sizes = choice.sizes_of(workload)
        variants = _variants(choice, workload)
        for turn in range(1 if workload in ONCE else choice.rounds):
            first = turn % len(variants)
            for name, program, overrides in variants[first:] + variants[:first]:
                spec = Spec(program, workload, sizes, choice.threads, overrides, bare=choice.bare)
                found.append(Request("speed", name, turn, spec))
        if not choice.quick and KRONFLUENCE in choice.programs and workload not in ALONE | ONCE:
            for name, program, overrides in variants:
                spec = Spec(program, workload, sizes[:1], choice.threads, overrides, empirical=True, bare=0)
                found.append(Request("agreement", name, 0, spec))
    return found + (_ray(choice) if choice.ray else [])


def _variants(choice: Choice, workload: str) -> list[tuple[str, str, tuple[str, ...]]]:
    found = []
    if RAYLUX in choice.programs:
        ours = list(precisions().items())[: 1 if choice.quick else None]
        found += [(name, RAYLUX, (*more, *choice.overrides)) for name, more in ours]
    if KRONFLUENCE in choice.programs and workload not in ALONE:
        found.append((KRONFLUENCE, KRONFLUENCE, ()))
    return found


def _ray(choice: Choice) -> list[Request]:
    workload = choice.workloads[0]
    found = []
    for turn in range(choice.rounds):
        for precision, more in precisions().items():
            for backend, workers in (("local", 1), ("ray", 1), ("ray", 2)):
                engine = (f"engine.backend={backend}", f"engine.workers={workers}", "engine.shards=auto")
                overrides = (*_UNITS, *more, *choice.overrides, *engine)
                spec = Spec(RAYLUX, workload, choice.sizes_of(workload)[:1], 1, overrides, bare=0)
                found.append(Request("ray", f"{precision}, {backend} {workers}", turn, spec))
    return found


def take(request: Request, folder: Path) -> tuple[Measured, dict[int, np.ndarray]]:
    """Run a measurement in a process of its own; returns it with its memory, and the scores [Q, N] by Q.

    Raises:
        RayluxError: the process failed; with the last line that it said.
    """
    # Made here once: a child that trains first would be measured on a warmer machine than the next.
    WORKLOADS[request.spec.workload].prepare()
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(asdict(request.spec)), encoding="utf-8")
    threads = str(request.spec.threads)
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-W", "ignore", "-m", "jobs.bench.child", str(folder / "spec.json")]
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            samples = watch(child)
        finally:
            child.kill()
            child.wait()
    if child.returncode:
        lines = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RayluxError(f"{request}: {lines[-1] if lines else f'ended with {child.returncode}'}")
    found = Measured.load(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    found.stages = [with_memory(stage, samples) for stage in found.stages]
    with np.load(folder / "scores.npz") as scores:
        return found, {int(size): scores[size] for size in scores.files}


Sample = tuple[float, int, int]
"""Seconds since the epoch; resident and private bytes (0: not looked at)."""


def watch(child: subprocess.Popen[bytes]) -> list[Sample]:
    """Memory of a process until it ends.

    Raises:
        RayluxError: it takes more than two hours.
    """
    samples: list[Sample] = []
    process, began = psutil.Process(child.pid), time.monotonic()
    most, looked = 0, -math.inf
    while child.poll() is None:
        try:
            rss, uss = process.memory_info().rss, 0
            # Counting private pages takes the kernel tens of milliseconds, and the process its lock meanwhile.
            if rss > 1.02 * most or time.monotonic() - looked > _PRIVATE_EVERY:
                memory = process.memory_full_info()
                rss, uss = memory.rss, memory.uss
                most, looked = max(most, rss), time.monotonic()
            samples.append((time.time(), rss, uss))
        except psutil.Error:  # it ended between the two
            break
        if time.monotonic() - began > _LIMIT:
            raise RayluxError(f"a measurement took more than {_LIMIT:.0f} s")
        time.sleep(_EVERY)
    child.wait()
    return samples


def with_memory(stage: Stage, samples: Sequence[Sample]) -> Stage:
    """The stage with the peaks of the samples that fall into it, and of the last one before."""
    inside = [sample for sample in samples if stage.began <= sample[0] <= stage.ended]
    before = [sample for sample in samples if sample[0] < stage.began and sample[2]][-1:]
    rss, uss = (max((sample[place] for sample in (*before, *inside)), default=0) for place in (1, 2))
    return replace(stage, rss=rss, uss=uss)


def take_all(
    requests: Sequence[Request], base: Path, say: Callable[[str], None]
) -> list[tuple[Request, Measured, dict[int, np.ndarray]]]:
    """Every request in order."""
    found = []
    for place, request in enumerate(requests):
        began = time.monotonic()
        measured, scores = take(request, base / f"{place:03d}")
        load = os.getloadavg()[0]
        say(f"{request}: {time.monotonic() - began:.0f} s, load {load:.1f}")
        found.append((request, measured, scores))
    return found
