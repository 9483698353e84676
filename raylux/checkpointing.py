"""Gradient checkpointing (Chen et al. 2016): a block keeps its input, and runs again when the backward pass gets there.

Not by the model's own switch: transformers' works in training mode alone, in which a model may drop out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


def blocks_of(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The blocks of a model: all members of the lists of modules in which the named ones stand."""
    lists: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            lists[".".join(parts[:number])] = None
    return [block for path in lists for block in model.get_submodule(path).children()]


@contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While open, graphs through these blocks keep the blocks' inputs alone.

    Modules in a block are run a second time, hooks included, when the backward pass gets there; to their end, as one
    that is broken off would not let go of weights that were read for it.
    """
    before = {block: block.__dict__.get("forward") for block in blocks}
    for block in before:
        # Nothing is drawn at random in a model that is not trained.
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = again
    try:
        with set_checkpoint_early_stop(False):
            yield
    finally:
        for block, usual in before.items():
            if usual is None:
                del block.forward
            else:
                block.forward = usual
