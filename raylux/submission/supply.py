"""A run's demand against what a cluster has, from here, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from raylux.config import Config
from raylux.engine.capacity import Demand, Node, fit_nodes, settled
from raylux.errors import UserError
from raylux.sources import resolve


def check(
    config: Config, config_path: str, overrides: Sequence[str], nodes: Sequence[Node], say: Callable[[str], None]
) -> None:
    """Refuse what cannot run there.

    CPUs and GPUs are held against the config alone. Memory needs the model's structure, which is read where the model
    is a folder of this machine; elsewhere that is said, and the job itself checks it when it starts.

    Args:
        config: of the run; config_path, overrides: as it was made.
        nodes: the living ones of the cluster.
        say: told what was not checked.

    Raises:
        UserError: too little, with demand and supply in numbers.
    """
    engine = config.engine
    if engine.backend == "local":
        return
    gpu = config.model.device == "cuda"
    labels = engine.worker_labels, engine.shard_labels
    least = Demand(engine.workers, engine.shards, engine.threads, gpu, 1, 0, *labels, gpus=engine.gpus_per_worker)
    fit_nodes(least, nodes)
    if not _here(config.model.path):
        say(f"model.path = {config.model.path} is no folder of this machine: CPUs and GPUs are checked, memory is not")
        return

    def size(demand: Demand) -> tuple[int, int]:
        return fit_nodes(demand, nodes)

    # It loads torch: only once CPUs and GPUs are found to be enough.
    from raylux.doctor.case import Case

    size(settled(Case(config_path, overrides).demand_on("cuda" if gpu else "cpu"), size))


def _here(place: str) -> bool:
    """Whether a model's structure can be read at once: a hub or a GGUF file would have to be fetched or converted."""
    try:
        path = Path(resolve(place))
    except UserError:  # a package that only the cluster has
        return False
    return path.is_absolute() and path.is_dir()
