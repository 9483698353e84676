"""Whether what a run asks of its machines fits what a cluster has. Imports nothing heavy: it is asked before a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from raylux.cost.costs import Passes
from raylux.errors import UserError

GIB = 1 << 30


@dataclass(frozen=True)
class Demand:
    """Workers and shards (a number, or "auto"), what each takes, memory in bytes, and labels of the nodes they need.

    Attributes:
        passes: layer passes of the fit, by which the bytes were reckoned.
        most: passes that there may be; 1: no more than these.
        otherwise: the same run in other passes; None: these are settled.
        gpus: of a worker, all on one node.
    """

    workers: int | str
    shards: int | str
    threads: int
    gpu: bool
    worker_bytes: int
    shards_bytes: int
    worker_labels: Mapping[str, str] = field(default_factory=dict)
    shard_labels: Mapping[str, str] = field(default_factory=dict)
    passes: Passes = field(default_factory=Passes)
    most: int = 1
    otherwise: Callable[[Passes], Demand] | None = field(default=None, compare=False, repr=False)
    gpus: int = 1


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


def settled(demand: Demand, size: Callable[[Demand], object]) -> Demand:
    """The demand in the layer passes that a cluster wants; ``size`` raises UserError of what does not fit it."""

    def fits(one: Demand) -> bool:
        try:
            size(one)
        except UserError:
            return False
        return True

    return settle(demand, fits)


@dataclass(frozen=True)
class Node:
    """A living node: Ray's names for what it has, and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


def fit_nodes(demand: Demand, nodes: Sequence[Node]) -> tuple[int, int]:
    """Workers and shards that fit the nodes of a cluster, each on those that have its labels.

    Raises:
        UserError: no node has them, or too little is there; with demand and supply in numbers.
    """
    workers_on = _with_labels(nodes, demand.worker_labels, "engine.worker_labels")
    shards_on = _with_labels(nodes, demand.shard_labels, "engine.shard_labels")
    _check_gpus(demand, workers_on)
    supply, beside = _total(workers_on, demand), _total(shards_on, demand)
    if not demand.worker_labels and not demand.shard_labels:
        return fit(demand, supply)
    if beside.get("memory", 0.0) < demand.shards_bytes:
        raise UserError(
            f"not enough memory for the factor shards: they need {demand.shards_bytes / GIB:.1f} GiB, the nodes with "
            f"{_text(demand.shard_labels)} have {beside.get('memory', 0.0) / GIB:.1f} GiB; change engine.shard_labels, "
            "or use a larger cluster"
        )
    where = f"the nodes with {_text(demand.worker_labels)}" if demand.worker_labels else "the cluster"
    workers, shards = fit(replace(demand, shards_bytes=0), supply, where)
    # Together they have the memory of the nodes that either may use.
    both = [node for node in nodes if node in workers_on or node in shards_on]
    together, _ = fit(demand, _total(both, demand), "the nodes for workers and shards")
    workers = min(workers, together)
    return workers, shards if isinstance(demand.shards, int) else workers


def _with_labels(nodes: Sequence[Node], labels: Mapping[str, str], key: str) -> list[Node]:
    """Raises UserError where there is none."""
    found = [node for node in nodes if labels.items() <= node.labels.items()]
    if labels and not found:
        seen = sorted({f"{name}={node.labels[name]}" for node in nodes for name in labels if name in node.labels})
        have = f"they have {', '.join(seen)}" if seen else "none has a label of that name"
        raise UserError(
            f"no node has the labels {_text(labels)} that {key} asks for: the cluster has {len(nodes)} "
            f"node{'s' * (len(nodes) != 1)}, {have}; give nodes the label (ray start --labels), or change {key}"
        )
    return found


def _text(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items()) or "any labels"


def _check_gpus(demand: Demand, nodes: Sequence[Node]) -> None:
    """Raises UserError where no node has the GPUs of one worker."""
    most = max((node.resources.get("GPU", 0.0) for node in nodes), default=0.0)
    if demand.gpu and demand.gpus > 1 and most < demand.gpus:
        raise UserError(
            f"a worker needs {demand.gpus} GPUs of one node (engine.gpus_per_worker), no node has more than {most:g}: "
            "set it lower, or use nodes with more GPUs"
        )


def _total(nodes: Sequence[Node], demand: Demand) -> dict[str, float]:
    """What nodes have together, of their GPUs those that make up whole workers."""
    total: dict[str, float] = {}
    for node in nodes:
        for name, size in node.resources.items():
            total[name] = total.get(name, 0.0) + float(size)
    if demand.gpu and demand.gpus > 1:
        total["GPU"] = float(sum(node.resources.get("GPU", 0.0) // demand.gpus * demand.gpus for node in nodes))
    return total


def fit(demand: Demand, supply: Mapping[str, float], where: str = "the cluster") -> tuple[int, int]:
    """Workers and shards that fit a cluster, or a part of it, whatever the labels of its nodes.

    Args:
        demand: of the run, in the passes that it says.
        supply: Ray's names for what it has together: ``CPU``, ``GPU``, ``memory`` in bytes.
        where: what an error calls it.

    Raises:
        UserError: what is asked for, or a single worker, does not fit; with demand and supply in numbers.
    """
    cpus, gpus, memory = supply.get("CPU", 0.0), supply.get("GPU", 0.0), supply.get("memory", 0.0)
    by_cpu = int(gpus // demand.gpus) if demand.gpu else int(cpus // demand.threads)
    by_memory = int((memory - demand.shards_bytes) // demand.worker_bytes)
    workers = demand.workers if isinstance(demand.workers, int) else max(1, min(by_cpu, by_memory))
    if workers > by_cpu:
        kind, have = ("GPU", f"{gpus:g}") if demand.gpu else ("CPU", f"{cpus:g}")
        need = workers * (demand.gpus if demand.gpu else demand.threads)
        who = f"{workers} worker{'s' * (workers > 1)} need{'s' * (workers == 1)}"
        raise UserError(
            f"not enough {kind}s on {where}: {who} {need}, {_has(where)} {have}; {_way_out(demand, by_cpu)}"
        )
    need_bytes = workers * demand.worker_bytes + demand.shards_bytes
    if need_bytes > memory:
        most = max(demand.passes.covariance, demand.passes.moments)
        way = f" in {most} layer passes" if most > 1 else ""
        raise UserError(
            f"not enough memory on {where}: {workers} worker{'s' * (workers > 1)} and the factor shards need "
            f"{need_bytes / GIB:.1f} GiB{way}, {_has(where)} {memory / GIB:.1f} GiB; use fewer engine.workers, a "
            f"larger cluster, curvature.blocks=2 or 4, fewer model.layers or fewer queries"
        )
    shards = demand.shards if isinstance(demand.shards, int) else workers
    return workers, shards


def _has(where: str) -> str:
    return "they have" if where.startswith("the nodes") else "it has"


def _way_out(demand: Demand, by_cpu: int) -> str:
    if by_cpu:
        lower = ", or engine.gpus_per_worker lower" if demand.gpus > 1 else ""
        return f"set engine.workers to {by_cpu} or fewer" + (lower if demand.gpu else ", or engine.threads lower")
    if demand.gpu:
        return "set model.device to cpu, or use a cluster with GPUs"
    if demand.threads > 1:
        return "set engine.threads lower, then engine.workers to what fits"
    return "use a cluster with nodes that run workers"
