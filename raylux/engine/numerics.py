"""What, beside the inputs, the bits of a result depend on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from raylux import processor

Numerics = dict[str, Any]
"""torch (version), device (hardware, as far as libraries choose their kernels by it), threads."""


def here(device: str) -> Numerics:
    """Those of this process."""
    import torch  # which whoever only compares tags does without

    hardware = torch.cuda.get_device_name() if device == "cuda" else _cpu()
    return {"torch": torch.__version__, "device": hardware, "threads": torch.get_num_threads()}


def distinct(tags: Iterable[Mapping[str, Any]]) -> list[Numerics]:
    """The different ones, in a fixed order."""
    found = {tuple(sorted(tag.items())): dict(tag) for tag in tags}
    return [found[key] for key in sorted(found, key=str)]


def _cpu() -> str:
    """Vector instructions and the processor's name as the system gives it."""
    import torch

    return f"{torch.backends.cpu.get_cpu_capability()} {processor.name()}"
