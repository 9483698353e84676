"""The processor that this process runs on, as the system names it: libraries choose their kernels by that."""

from __future__ import annotations

import contextlib
import platform
from functools import cache

_INTEL = "GenuineIntel"


def name() -> str:
    """Its model; where the system does not say, its architecture."""
    return _facts().get("model name") or platform.processor() or platform.machine()


def is_intel() -> bool:
    """Whether Intel made it, whose library takes its plainest path on any other."""
    return _INTEL in (_facts().get("vendor_id") or platform.processor())


@cache
def _facts() -> dict[str, str]:
    """What Linux tells of the first processor; elsewhere nothing."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = (line.partition(":") for line in file.read().partition("\n\n")[0].splitlines())
        return {key.strip(): value.strip() for key, _, value in lines}
    return {}
