"""What every stage works with: the config, the run folder, the frozen plan, and the backend when it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from raylux import fingerprints
from raylux.config import Config
from raylux.cost.costs import Passes
from raylux.cost.passes import Layers, split
from raylux.curvature import KINDS, Kind
from raylux.engine import device
from raylux.engine.capacity import Demand
from raylux.engine.demand import check_memory_here, demand_of, has_memory_here, settled_here
from raylux.engine.kept import kept_bytes
from raylux.engine.local import LocalBackend
from raylux.engine.plan import Plan, assign
from raylux.engine.progress import Reporter
from raylux.engine.shard import ShardSpec
from raylux.engine.work import Backend
from raylux.engine.worker import WorkerSpec
from raylux.errors import UserError
from raylux.layers import Coverage, matrices
from raylux.models import ModelFiles
from raylux.placement import Placement
from raylux.queries import Query
from raylux.shown import redacted
from raylux.store import CorpusReader, RunFolder, read_table

if TYPE_CHECKING:
    from raylux.engine.metrics import Meter


@dataclass
class Context:
    """One run being worked on.

    Attributes:
        config, folder, files, coverage, groups, vocabulary, plan, reporter: of the run.
        queries: asked for now.
        stages: that this command runs.
        apart: ids of the queries that are answered as by a run of their own, each set with its own candidates alone,
            though all are scored in one pass; default: all queries are one set.
        placement: of the model's parts, where they do not all lie on the one device of a worker.
        holds: queries that workers are sized for; 0: those asked for when the first is started.
        keepers: fit unit -> the worker that ran it since this command began, and may keep its sequences.
    """

    config: Config
    folder: RunFolder
    files: ModelFiles
    coverage: Coverage
    groups: dict[str, str]
    vocabulary: int
    plan: Plan
    reporter: Reporter
    queries: list[Query] = field(default_factory=list)
    stages: tuple[str, ...] = ()
    keepers: dict[int, int] = field(default_factory=dict)
    apart: tuple[tuple[str, ...], ...] = ()
    holds: int = 0
    placement: Placement | None = None
    _started: bool = False
    _meter: Meter | None = None
    _backend: Backend | None = None
    _passes: Passes = field(default_factory=Passes)
    _assignment: list[list[str]] = field(default_factory=list)
    _reader: CorpusReader | None = None
    _ids: list[str] | None = None

    @property
    def kind(self) -> Kind:
        return KINDS[self.config.curvature.kind]

    @property
    def itemsize(self) -> int:
        """Bytes of a number in sums, factors and scores."""
        return 8 if self.plan.dtype == "float64" else 4

    @property
    def reader(self) -> CorpusReader:
        if self._reader is None:
            self._reader = CorpusReader(self.folder)
        return self._reader

    @property
    def ids(self) -> list[str]:
        """Sequence ids in corpus order."""
        if self._ids is None:
            self._ids = read_table(self.folder)["sequence"].tolist()
        return self._ids

    @property
    def assignment(self) -> list[list[str]]:
        """Layer names of each shard."""
        _ = self.backend
        return self._assignment

    @property
    def passes(self) -> Passes:
        """Layer passes of the fit."""
        _ = self.backend
        return self._passes

    def passes_of(self, count: int) -> list[Layers]:
        """The layers of each of so many layer passes, the last of the model first."""
        placed = self.placement
        devices = (
            None if placed is None else {layer.name: placed.runs_on(layer.name) for layer in self.coverage.tracked}
        )
        return split(self.coverage.tracked, self.groups, count, devices)

    @property
    def backend(self) -> Backend:
        """Workers and shards; started when first asked for."""
        if self._backend is None:
            self._backend = self._start()
        return self._backend

    def close(self) -> None:
        if self._meter is not None:
            self.reporter.unlisten(self._meter)
            self._meter.close()
            self._meter = None
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        elif self._started:
            from raylux.engine import session

            session.leave()
        self._started = False

    def room(self, most: int) -> int:
        """The largest number of queries, halved from ``most``, that workers can hold without there being fewer workers.

        0: not even one.
        """
        workers = self.fitting(1)
        counts = (most >> step for step in range(most.bit_length()))
        return next((count for count in counts if workers and self.fitting(count) == workers), 0)

    def fitting(self, queries: int) -> int:
        """Workers that could hold so many queries, by memory and cores; 0: none."""
        if self.config.engine.backend == "local":
            return int(has_memory_here(self._demand(queries)))
        from raylux.engine import session

        self._started = session.connect() or self._started
        return session.fitting(self._demand(queries))

    def _demand(self, queries: int) -> Demand:
        engine, layers = self.config.engine, matrices(self.coverage.tracked)
        return demand_of(
            engine, self.plan.dtype, self.plan.device, layers, self.groups, self.coverage.parameters, queries,
            self.config.curvature.solver != "direct", self.config.fit.passes, self.config.curvature.blocks,
            self.kind.joint, self.placement, self.config.curvature.projected,
        )  # fmt: skip

    def _on_device(self, demand: Demand) -> Demand:
        """The demand, settled, in as many passes as the workers' GPUs want; of other devices that is known already."""
        if demand.otherwise is None or self.plan.device != "cuda" or not self.kind.fitted:
            return replace(demand, otherwise=None)
        room = device.room(self.files, self.config.model, self.coverage, self.groups, self.plan, self.placement)
        return device.settled(
            demand, self.coverage.tracked, self.groups, room, self.plan, self.kind, self.config.curvature.blocks
        )

    def _start(self) -> Backend:
        engine, layers = self.config.engine, self.coverage.tracked
        keep = kept_bytes(engine.keep_captured, self.plan.device)
        worker = WorkerSpec(
            self.folder.files.place,
            self.files,
            self.plan,
            layers,
            self.groups,
            self.config.fit.seed,
            self.config.model.trust_remote_code,
            keep=keep,
            statistics=self.kind.statistics,
            checkpointing=self.config.model.checkpointing,
            blocks=self.config.curvature.blocks,
            placement=self.placement,
        )
        demand = self._demand(self.holds or len(self.queries))
        if engine.backend == "local":
            check_memory_here(demand)
            self._passes = self._on_device(settled_here(demand)).passes
            self._assignment = assign(layers, self.groups, 1)
            return LocalBackend(worker, self._shard_specs(), self.reporter.event)
        # Ray is imported where it is used: a run in process loads nothing of it.
        from raylux.engine import session
        from raylux.engine.metrics import Meter
        from raylux.engine.remote import RayBackend

        self._started = session.connect() or self._started
        workers, shards = session.size(demand, engine.timeout)
        demand = self._on_device(session.settled(demand))
        self._passes = demand.passes
        shards = min(shards, len(set(self.groups.values())))
        self._assignment = assign(layers, self.groups, shards)
        self._meter = Meter(redacted(self.folder.files.root.rpartition("/")[2]))
        self.reporter.listen(self._meter)
        return RayBackend(
            worker,
            self._shard_specs(),
            workers,
            engine.timeout,
            self._started,
            lambda: session.capacity(demand),
            self.reporter.event,
            self._welcome,
            worker_labels=engine.worker_labels,
            shard_labels=engine.shard_labels,
            gpus=engine.gpus_per_worker,
        )

    def _welcome(self, facts: Mapping[str, Any]) -> None:
        """Raises UserError where a worker's node has other weights under the same path."""
        here = fingerprints.of_weights(self.files.folder, self.files.adapter)
        if facts["weights"] != here:
            raise UserError(
                f"the model in {self.files.folder} on node {facts['host']} is not the driver's (weights "
                f"{facts['weights']} instead of {here}); bring the same files to every node, or use a folder "
                "that all nodes share"
            )

    def _shard_specs(self) -> list[ShardSpec]:
        by_name = {layer.name: layer for layer in self.coverage.tracked}
        return [
            ShardSpec(
                self.folder.files.place,
                tuple(by_name[name] for name in names),
                self.groups,
                self.config.curvature.kind,
                self.config.curvature.damping,
                self.plan.dtype,
                self.plan.threads,
                self.plan.device,
                self.config.curvature.blocks,
                {layer.name: layer.shape for layer in self.coverage.tracked},
            )
            for names in self._assignment
        ]
