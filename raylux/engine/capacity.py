"""Whether what a run asks of its machines fits what a cluster has. Imports nothing heavy: it is asked before a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from raylux.cost.costs import Passes
from raylux.errors import UserError

GIB = 1 << 30


@dataclass(frozen=True)
class Demand:
    """Workers and shards (a number, or "auto"), what each takes, and memory in bytes.

    Attributes:
        passes: layer passes of the fit, by which the bytes were reckoned.
        most: passes that there may be; 1: no more than these.
        otherwise: the same run in other passes; None: these are settled.
    """

    workers: int | str
    shards: int | str
    threads: int
    gpu: bool
    worker_bytes: int
    shards_bytes: int
    passes: Passes = field(default_factory=Passes)
    most: int = 1
    otherwise: Callable[[Passes], Demand] | None = field(default=None, compare=False, repr=False)


def settle(demand: Demand, fits: Callable[[Demand], bool]) -> Demand:
    """The demand in as few layer passes as fit; in as many as may be, where none do."""
    if demand.otherwise is None or fits(demand):
        return demand
    ask, counts = demand.otherwise, range(1, demand.most + 1)
    both = next((count for count in counts if fits(ask(Passes(count, count)))), None)
    found = Passes(demand.most, demand.most)
    if both is not None:
        covariance = next(count for count in counts if fits(ask(Passes(count, both))))
        found = Passes(covariance, next(count for count in counts if fits(ask(Passes(covariance, count)))))
    return replace(ask(found), most=demand.most, otherwise=ask)


def settled(demand: Demand, supply: Mapping[str, float]) -> Demand:
    """The demand in the layer passes that a cluster of this supply wants."""

    def fits(one: Demand) -> bool:
        try:
            fit(one, supply)
        except UserError:
            return False
        return True

    return settle(demand, fits)


def fit(demand: Demand, supply: Mapping[str, float]) -> tuple[int, int]:
    """Workers and shards that fit a cluster.

    Args:
        demand: of the run, in the passes that it says.
        supply: Ray's names for what the whole cluster has: ``CPU``, ``GPU``, ``memory`` in bytes.

    Raises:
        UserError: what is asked for, or a single worker, does not fit; with demand and supply in numbers.
    """
    cpus, gpus, memory = supply.get("CPU", 0.0), supply.get("GPU", 0.0), supply.get("memory", 0.0)
    by_cpu = int(gpus) if demand.gpu else int(cpus // demand.threads)
    by_memory = int((memory - demand.shards_bytes) // demand.worker_bytes)
    workers = demand.workers if isinstance(demand.workers, int) else max(1, min(by_cpu, by_memory))
    if workers > by_cpu:
        kind, have = ("GPU", f"{gpus:g}") if demand.gpu else ("CPU", f"{cpus:g}")
        need = workers if demand.gpu else workers * demand.threads
        who = f"{workers} worker{'s' * (workers > 1)} need{'s' * (workers == 1)}"
        raise UserError(f"not enough {kind}s on the cluster: {who} {need}, it has {have}; {_way_out(demand, by_cpu)}")
    need_bytes = workers * demand.worker_bytes + demand.shards_bytes
    if need_bytes > memory:
        most = max(demand.passes.covariance, demand.passes.moments)
        way = f" in {most} layer passes" if most > 1 else ""
        raise UserError(
            f"not enough memory on the cluster: {workers} worker{'s' * (workers > 1)} and the factor shards need "
            f"{need_bytes / GIB:.1f} GiB{way}, it has {memory / GIB:.1f} GiB; use fewer engine.workers, a larger "
            f"cluster, fewer model.layers or fewer queries"
        )
    shards = demand.shards if isinstance(demand.shards, int) else workers
    return workers, shards


def _way_out(demand: Demand, by_cpu: int) -> str:
    if by_cpu:
        return f"set engine.workers to {by_cpu} or fewer" + ("" if demand.gpu else ", or engine.threads lower")
    if demand.gpu:
        return "set model.device to cpu, or use a cluster with GPUs"
    if demand.threads > 1:
        return "set engine.threads lower, then engine.workers to what fits"
    return "use a cluster with nodes that run workers"
