"""How many layer passes a GPU wants, by the cost model's reckoning of what it holds beside the model and a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psutil
import torch

from raylux import models
from raylux.config import Config, ModelSection
from raylux.cost.costs import Passes
from raylux.cost.fit import GPU_BASE, rooms
from raylux.cost.machine import USABLE
from raylux.cost.model import ModelShape
from raylux.cost.passes import Held, Rooms, covariance_held, cut, moments_held
from raylux.cost.workload import ITEMSIZE
from raylux.curvature import KINDS, Kind
from raylux.engine.capacity import Demand
from raylux.engine.plan import Plan
from raylux.errors import UserError
from raylux.layers import Coverage, TrackedLayer
from raylux.placement import Placement, placed


def placement_of(config: Config, files: models.ModelFiles, device: str) -> Placement | None:
    """Where a worker has the parts of a config's model; None: all on its one device.

    ``auto`` leaves half of each device's memory to sums, bases and a batch. The devices of any worker are taken to be
    like those here.

    Args:
        config: of the run.
        files: its model.
        device: of the run, "cpu" or "cuda".

    Raises:
        UserError: as ``placed``; the run cannot go over several devices, or there are too few here.
    """
    setting, engine = config.model, config.engine
    if setting.device_map is None and engine.gpus_per_worker == 1:
        return None
    structure = models.load_structure(files, setting.trust_remote_code, weights=False)
    found = placed(structure, setting, device, engine.gpus_per_worker, _half(config, device))
    if found is not None and found.reads and config.curvature.kind == "hessian":
        raise UserError(
            "curvature.kind=hessian takes derivatives by weights that are held, and model.device_map leaves "
            f"'{found.reads[0].name}' outside of the devices: keep the whole model on them"
        )
    if found is None or device != "cuda":
        return found
    if len(found.computing) > 1 and KINDS[config.curvature.kind].joint:
        raise UserError(
            f"curvature.kind={config.curvature.kind} keeps one matrix over all layers, on one device: set "
            "engine.gpus_per_worker=1"
        )
    if engine.backend == "local" and torch.cuda.device_count() < engine.gpus_per_worker:
        raise UserError(
            f"engine.gpus_per_worker={engine.gpus_per_worker}, but this machine has {torch.cuda.device_count()} GPUs: "
            "set it lower, or use engine.backend=ray on a cluster with such nodes"
        )
    return found


def _half(config: Config, device: str) -> dict[str, float] | None:
    """Parameters that half of the memory of each device holds."""
    itemsize, workers = ITEMSIZE[config.model.dtype], config.engine.workers
    if device == "cpu":
        beside = workers if isinstance(workers, int) and config.engine.backend == "ray" else 1
        return {"cpu": psutil.virtual_memory().available / 2 / itemsize / beside}
    if not torch.cuda.is_available():
        return None
    each = torch.cuda.get_device_properties(0).total_memory * USABLE / 2 / itemsize
    return {f"cuda:{number}": each for number in range(config.engine.gpus_per_worker)}


def room(
    files: models.ModelFiles,
    setting: ModelSection,
    coverage: Coverage,
    groups: Mapping[str, str],
    plan: Plan,
    placement: Placement | None = None,
) -> Rooms:
    """Bytes of a worker's GPUs, each taken to be like the first one here, that sums and bases may have."""
    structure = models.load_structure(files, setting.trust_remote_code)
    shape = ModelShape.of(structure, coverage, groups).run_by(setting.checkpointing, placement)
    memory = torch.cuda.get_device_properties(0).total_memory * USABLE
    return rooms(shape, ITEMSIZE[plan.dtype], max(plan.batch_tokens, plan.longest), memory, GPU_BASE)


def settled(
    demand: Demand,
    layers: Sequence[TrackedLayer],
    groups: Mapping[str, str],
    rooms: Rooms,
    plan: Plan,
    kind: Kind,
    blocks: int = 1,
) -> Demand:
    """The demand in at least as many passes as fit into what the worker's devices have room for.

    Raises:
        UserError: not even one input group does.
    """
    stored = 8 if plan.dtype == "float64" else 4
    covariance = covariance_held(groups, stored, blocks)
    moments = moments_held(groups, ITEMSIZE[plan.contraction] if kind.basis else 0, stored, blocks)

    def count(held: Held, least: int) -> int:
        blocks = cut(layers, groups, held, rooms, least)
        if blocks is None:
            left = max(0.0, min(rooms.of.values())) / 1e9
            raise UserError(
                f"the model, a batch and the sums of one layer do not fit the GPU: {left:,.1f} GB are left for them; "
                "set engine.batch_tokens lower, or take a GPU with more memory"
            )
        return len(blocks)

    wanted = demand.passes
    assert demand.otherwise is not None
    return demand.otherwise(
        Passes(
            count(covariance, wanted.covariance) if kind.basis else 1,
            count(moments, wanted.moments) if kind.moments else 1,
        )
    )
