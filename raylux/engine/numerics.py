"""What, beside the inputs, the bits of a result depend on."""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

Numerics = dict[str, Any]
"""torch (version), device (hardware, as far as libraries choose their kernels by it), threads."""


def here(device: str) -> Numerics:
    """Those of this process."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else _cpu()
    return {"torch": torch.__version__, "device": hardware, "threads": torch.get_num_threads()}


@contextlib.contextmanager
def pinned(device: str) -> Iterator[None]:
    """While open, a product on a GPU has the precision its dtype says, whatever the process or its environment chose.

    float32 is float32, not TF32 with its 10 bits: that would cost the scores two or three digits (docs/results/gpu.md);
    and the partial sums of a bf16 product are added in float32.
    """
    if device != "cuda":
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    # torch 2.9 named it anew, and raises where both names are used.
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    reduced = "allow_bf16_reduced_precision_reduction"
    before = {each: getattr(matmul, each) for each in (name, reduced)}
    setattr(matmul, name, exact)
    setattr(matmul, reduced, False)
    try:
        yield
    finally:
        for each, value in before.items():
            setattr(matmul, each, value)


@contextlib.contextmanager
def repeatable(device: str) -> Iterator[None]:
    """While open, a model's pass on a GPU gives the same bits each time: attention adds up without atomics."""
    if device != "cuda":
        yield
        return
    # Asked for by cuBLAS where torch is to be deterministic; as large as the workspace that torch takes by itself.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filling: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), filling.fill_uninitialized_memory
    with warnings.catch_warnings():
        # What has no deterministic kernel is used without: a model must run, and tests see whether bits differ.
        warnings.filterwarnings("ignore", message=".*determinis.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        filling.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before[0])
            filling.fill_uninitialized_memory = before[1]


def distinct(tags: Iterable[Mapping[str, Any]]) -> list[Numerics]:
    """The different ones, in a fixed order."""
    found = {tuple(sorted(tag.items())): dict(tag) for tag in tags}
    return [found[key] for key in sorted(found, key=str)]


def _cpu() -> str:
    """Vector instructions and the processor's name as the system gives it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        named = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        name = named[0] if named else name
    return f"{torch.backends.cpu.get_cpu_capability()} {name}"
