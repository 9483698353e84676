"""A pass of sums on a simulated cluster: real pool, real shards, real run folder; the units' sums are drawn."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylux.blocks import triangle_entries
from raylux.engine.pace import Pace
from raylux.engine.progress import Reporter
from raylux.engine.shard import FactorShard, ShardSpec
from raylux.engine.simulate import Behaviour, Fate, Node, SimulatedCluster
from raylux.engine.simulate_backend import ShardBehaviour, ShardFate, SimulatedBackend
from raylux.engine.sums import Finished, SumPass, Units
from raylux.layers import TrackedLayer
from raylux.ledger import COVARIANCE, SNAPSHOT
from raylux.store import RunFolder
from raylux.triangles import unpack

LAYERS = tuple(TrackedLayer(f"l{place}", 3, 2, False, False) for place in range(2))
# Rows of A and of S.
SIZES = {"A": 3, "S": 2}


class DriverKilled(BaseException):
    """The driver's process is gone: nothing in the program catches it."""


def part(unit: int, layers: list[TrackedLayer]) -> dict[str, Any]:
    """Sums of a unit for the shard of some layers, of sizes that make the order of addition count."""
    sums: dict[str, Any] = {"inputs": {}, "grads": {}, "rows": {}, "sequences": 1 + unit % 3}
    for layer in layers:
        draw = np.random.default_rng([unit, int(layer.name[1:])])
        scale = 10.0 ** draw.integers(-6, 6)
        sums["inputs"][layer.name] = (scale * draw.standard_normal(triangle_entries([SIZES["A"]]))).astype(np.float32)
        sums["grads"][layer.name] = (scale * draw.standard_normal(triangle_entries([SIZES["S"]]))).astype(np.float32)
        sums["rows"][layer.name] = 10 + unit
    return sums


def head(unit: int) -> np.ndarray:
    return np.arange(unit, unit + 3, dtype=np.int32)


@dataclass
class Scene:
    """What a pass runs on, and what happened: ``run`` may be called again on the same folder, as a new driver.

    Attributes:
        path: of the run folder.
        places: workers per node.
        seconds: of (method of a shard); adding and writing takes time, in which things happen.
        begun: unit -> how often a worker began it.
    """

    path: Path
    units: int = 16
    places: tuple[int, ...] = (1, 1)
    shards: int = 2
    snapshot: float | str = 0.0
    fate: Callable[[int, int], Fate | None] = lambda unit, run: None
    shard_fate: Callable[[int, str], ShardFate | None] = lambda shard, method: None
    spread: bool = False
    leave_out: frozenset[str] = frozenset()
    seed: int = 0
    elastic: bool = True
    size: int = 0
    seconds: Callable[[str, tuple[Any, ...]], float] = lambda method, args: {"add": 0.1}.get(method, 2.0)
    folder: RunFolder | None = None
    begun: Counter[int] = field(default_factory=Counter)
    events: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    cluster: SimulatedCluster = field(init=False)
    backend: SimulatedBackend = field(init=False)
    sums: SumPass = field(init=False)

    def start(self) -> None:
        """A new driver, on a cluster with nothing on it."""
        self.folder = self.folder or RunFolder(str(self.path))
        owned = [list(LAYERS[shard :: self.shards]) for shard in range(self.shards)]

        def compute(method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (head(args[0]), *(part(args[0], layers) for layers in owned))

        def fate(method: str, args: tuple[Any, ...]) -> Fate | None:
            if method == "prepare":
                return None
            assert args[0] >= self.sums.low, "every shard has it"
            self.begun[args[0]] += 1
            return self.fate(args[0], self.begun[args[0]])

        behaviour = Behaviour(
            lambda draw, method, args: draw.uniform(30, 90), lambda draw: draw.uniform(20, 60), compute, fate
        )
        self.cluster = SimulatedCluster(self.places, behaviour, self.seed, self.elastic)
        groups = {layer.name: layer.name for layer in LAYERS}

        def make(shard: int) -> FactorShard:
            spec = ShardSpec(str(self.path), tuple(owned[shard]), groups, "ekfac", "auto", "float32", 1, "cpu")
            return FactorShard(spec)

        shard = ShardBehaviour(make, self.seconds, self.shard_fate, self.spread)
        self.backend = SimulatedBackend(
            self.cluster, sum(self.places), self.shards, shard, notify=lambda kind, **facts: self.events.append(facts)
        )
        names = [f"f{unit:03d}" for unit in range(self.units)]
        units = Units(
            COVARIANCE, "covariance_unit", "write_covariances", names, lambda unit: (unit,),
            lambda unit: [f"s{unit}"], self.leave_out,
        )  # fmt: skip
        pace = Pace(self.snapshot, self.size, self.cluster.now)
        self.sums = SumPass(self.backend, self.folder, units, pace, _Said(self.folder, self.said))

    def run(self) -> Finished:
        """A driver from start to end."""
        self.start()
        return self.go_on()

    def go_on(self) -> Finished:
        assert self.folder is not None
        with Reporter(self.folder, quiet=True).task("covariance", self.units, "units") as task:
            return self.sums.run(task)

    # what is known of it

    @property
    def cursor(self) -> int:
        """Of the committed snapshot."""
        assert self.folder is not None
        if COVARIANCE not in self.folder.committed(SNAPSHOT):
            return 0
        return int(self.folder.manifest(SNAPSHOT, COVARIANCE).meta["cursor"])

    def begun_from(self, cursor: int) -> int:
        """How many units from this one on were begun."""
        return sum(unit >= cursor for unit in self.begun)

    @property
    def again(self) -> int:
        """How often a unit was begun that had been begun before."""
        return sum(self.begun.values()) - len(self.begun)

    def node(self, place: int) -> Node | None:
        nodes = list(self.cluster.nodes.values())
        return nodes[place % len(nodes)] if nodes else None

    def bits(self, finished: Finished) -> dict[str, Any]:
        """All that a pass gives: matrices, counts and heads, in bytes."""
        assert self.folder is not None
        found: dict[str, Any] = {f"head {unit}": array.tobytes() for unit, array in finished.heads.items()}
        for name, (key, _, counts) in finished.written.items():
            found[name] = self.folder.group(key).read("matrix").tobytes()
            found[f"counts {name}"] = counts
        return found


class _Said(Reporter):
    """A reporter that keeps its lines."""

    def __init__(self, folder: RunFolder, lines: list[str]) -> None:
        super().__init__(folder, quiet=True)
        self._lines = lines

    def say(self, text: str) -> None:
        self._lines.append(text)


def expected(units: int, out: tuple[int, ...] = ()) -> dict[str, Any]:
    """What a pass gives where every unit but those left out counts once, in order, without a cluster."""
    found: dict[str, Any] = {f"head {unit}": head(unit).tobytes() for unit in range(units) if unit not in out}
    sums: dict[str, np.ndarray] = {}
    counted = [part(unit, list(LAYERS)) for unit in range(units) if unit not in out]
    sequences = sum(sums_["sequences"] for sums_ in counted)
    for layer, (side, name) in itertools.product(LAYERS, (("inputs", "A"), ("grads", "S"))):
        total = counted[0][side][layer.name].astype(np.float64)
        for more in counted[1:]:
            total = total + more[side][layer.name]
        rows = sum(more["rows"][layer.name] for more in counted)
        sums[f"{name}:{layer.name}"] = total
        mean = unpack(torch.from_numpy((total / rows).astype(np.float32)), SIZES[name]).numpy()
        found[f"{name}:{layer.name}"] = mean.tobytes()
        eigenvalue = float(np.trace(mean, dtype=np.float64)) / len(mean)
        found[f"counts {name}:{layer.name}"] = {"rows": rows, "sequences": sequences, "mean": eigenvalue}
    return found
