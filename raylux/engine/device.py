"""How many layer passes a GPU wants, by the cost model's reckoning of what it holds beside the model and a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from raylux import models
from raylux.config import ModelSection
from raylux.cost.costs import Passes
from raylux.cost.fit import GPU_BASE
from raylux.cost.machine import USABLE
from raylux.cost.model import ModelShape
from raylux.cost.passes import Held, covariance_held, cut, moments_held
from raylux.cost.workload import ITEMSIZE
from raylux.curvature import Kind
from raylux.engine.capacity import Demand
from raylux.engine.plan import Plan
from raylux.errors import UserError
from raylux.layers import Coverage, TrackedLayer


def room(
    files: models.ModelFiles, setting: ModelSection, coverage: Coverage, groups: Mapping[str, str], plan: Plan
) -> float:
    """Bytes of the GPU here, taken for that of any worker, that sums and bases may have."""
    structure = models.load_structure(files, setting.trust_remote_code)
    shape = replace(ModelShape.of(structure, coverage, groups), checkpointing=setting.checkpointing)
    itemsize = ITEMSIZE[plan.dtype]
    whole = torch.cuda.get_device_properties(0).total_memory * USABLE
    batch = max(plan.batch_tokens, plan.longest)
    taken = GPU_BASE + shape.parameters * itemsize + batch * shape.activation_bytes(itemsize, shape.tracked)
    return float(whole - taken)


def settled(
    demand: Demand,
    layers: Sequence[TrackedLayer],
    groups: Mapping[str, str],
    room: float,
    plan: Plan,
    kind: Kind,
    blocks: int = 1,
) -> Demand:
    """The demand in at least as many passes as fit into ``room`` bytes.

    Raises:
        UserError: not even one input group does.
    """
    stored = 8 if plan.dtype == "float64" else 4
    covariance = covariance_held(groups, stored, blocks)
    moments = moments_held(groups, ITEMSIZE[plan.contraction] if kind.basis else 0, stored, blocks)

    def count(held: Held, least: int) -> int:
        blocks = cut(layers, groups, held, room, least)
        if blocks is None:
            raise UserError(
                f"the model, a batch and the sums of one layer do not fit the GPU: {max(0.0, room) / 1e9:,.1f} GB are "
                "left for them; set engine.batch_tokens lower, or take a GPU with more memory"
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
