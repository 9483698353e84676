"""The exact solve of a block of queries, for the kind that has one matrix over all layers: one shard does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raylux.engine.carrying import Later
from raylux.engine.context import Context
from raylux.engine.stages.fit import fitted
from raylux.engine.stages.solving import Solution
from raylux.engine.work import one_shard


def solve(
    ctx: Context, block: str, parts: Sequence[Sequence[Any]], later: Sequence[Later]
) -> tuple[Solution, list[str]]:
    """Solve a block of queries.

    Args:
        ctx: the run.
        block: its name.
        parts: per query a handle per shard of its a and g.
        later: the runs that its queries are carried from.

    Returns:
        The solution, and the objects that hold it: of no use once the block is committed, and named by no manifest.

    Raises:
        ShardLostError: the shard died.
    """
    handles = [handle for own in parts for handle in own]
    how = fitted(ctx), block, ctx.backend.shards, later
    keys, objects, tag = one_shard(ctx.backend, 0, "solve_jointly", (*how, *handles))
    return Solution(keys, {}, [tag]), list(objects)
