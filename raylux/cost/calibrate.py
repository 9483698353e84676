"""How fast this machine is, measured in about a second, once per host and number of threads."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from raylux.cache import build_once, entry_name
from raylux.cost.machine import Cluster, eigh_flops
from raylux.errors import UserError

_GEMM_SIZES = (32, 64, 128, 256, 512, 1024)
_EIGH_SIZES = (64, 256, 768)
_ELEMENTS = 1 << 22
_DISK_BYTES = 1 << 25
_REPEATS = 3
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_FORMAT = 1


def here(threads: int, workers: int, device: str, folder: str, refresh: bool = False) -> Cluster:
    """This machine as a cluster of one node.

    Args:
        threads: CPU threads of a worker.
        workers: how many.
        device: "cpu" or "cuda".
        folder: where the run folder is to be, whose free disk counts.
        refresh: measure again, whatever the cache holds.

    Raises:
        UserError: the cache cannot be written.
    """
    rates = measured(threads, device, refresh)
    memory = psutil.virtual_memory()
    own = torch.cuda.mem_get_info()[1] if device == "cuda" else memory.available / workers
    found = {name: value for name, value in rates.items() if name != "disk_gb_s"}
    return Cluster.parse(
        {
            "devices": workers,
            "per_node": workers,
            "device": {**found, "kind": _name(device), "memory_gb": own / 1e9, "gpu": device == "cuda"},
            "host_memory_gb": memory.total / 1e9,
            "network_gb_s": 1.0,  # one node: nothing goes over it
            "disk_gb_s": rates["disk_gb_s"],
            "disk_tb": shutil.disk_usage(_existing(folder)).free / 1e12,
        },
        "this machine",
    )


def measured(threads: int, device: str, refresh: bool = False) -> dict[str, Any]:
    """Rates by the names of ``Device``, and disk_gb_s; from the cache where it has them."""
    facts = (_FORMAT, platform.node(), os.cpu_count(), torch.__version__, threads, _name(device))
    name = entry_name(f"{platform.node()}-{device}-{threads}", *facts, *([time.time_ns()] if refresh else []))
    folder = build_once("calibration", name, lambda place: _write(place / "rates.json", threads, device))
    try:
        return dict(json.loads((folder / "rates.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read ({error}); delete it, it is measured again") from None


def _write(path: Path, threads: int, device: str) -> None:
    path.write_text(json.dumps(measure(threads, device, path.parent)), encoding="utf-8")


def measure(threads: int, device: str, folder: Path) -> dict[str, Any]:
    """Measure now; ``folder`` is where the disk is tried."""
    with _threads(threads), torch.inference_mode():
        gemm = {name: [_gemm(n, dtype, device) for n in _GEMM_SIZES] for name, dtype in _DTYPES.items()}
        eigh = [eigh_flops(n) / _best(_symmetric(n, device), device) for n in _EIGH_SIZES]
        rates: dict[str, Any] = {f"{name}_tflops": found[-1] / 1e12 for name, found in gemm.items()}
        rates["small"] = [[n, min(1.0, r / gemm["float32"][-1])]
                          for n, r in zip(_GEMM_SIZES, gemm["float32"], strict=True)]  # fmt: skip
        rates["eigh_tflops"] = eigh[-1] / 1e12
        rates["eigh_small"] = [[n, r / eigh[-1]] for n, r in zip(_EIGH_SIZES, eigh, strict=True)]
        rates["bandwidth_gb_s"] = _bandwidth(device) / 1e9
        rates["operation_us"] = _operation(device) * 1e6
        rates["host_gb_s"] = rates["bandwidth_gb_s"] if device == "cpu" else _to_host() / 1e9
    rates["disk_gb_s"] = _disk(folder) / 1e9
    return rates


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best(call: Callable[[], Any], device: str, repeats: int = _REPEATS) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        _wait(device)
        begun = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return max(min(times), 1e-9)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _gemm(n: int, dtype: torch.dtype, device: str) -> float:
    x = torch.randn(n, n, device=device).to(dtype)
    calls = max(1, 256 // n)

    def products() -> None:
        for _ in range(calls):
            x @ x

    return calls * 2.0 * n**3 / _best(products, device)


def _symmetric(n: int, device: str) -> Callable[[], Any]:
    x = torch.randn(n, n, dtype=torch.float64, device=device)
    gram = x @ x.T
    return lambda: torch.linalg.eigh(gram)


def _bandwidth(device: str) -> float:
    """Bytes per second through a product and an exponential, elementwise."""
    x = torch.rand(_ELEMENTS, device=device)
    out = torch.empty_like(x)

    def operations() -> None:
        torch.mul(x, x, out=out)
        torch.exp(x, out=out)

    return 4 * 4.0 * _ELEMENTS / _best(operations, device)


def _operation(device: str) -> float:
    """Seconds of one small operation started from Python, autograd included."""
    weight = torch.ones(8, 8, device=device)

    def chain() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(8, 8, device=device, requires_grad=True)
            y = x
            for _ in range(100):
                y = torch.nn.functional.linear(y, weight.clone())
            y.sum().backward()

    return _best(chain, device) / 400


def _to_host() -> float:
    x = torch.empty(_ELEMENTS, device="cuda")
    return 4.0 * _ELEMENTS / _best(x.cpu, "cuda")


def _disk(folder: Path) -> float:
    """Bytes per second written and synced."""
    block = os.urandom(1 << 20)
    begun = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(_DISK_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _DISK_BYTES / (time.perf_counter() - begun)


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine() or "cpu"


def _existing(folder: str) -> Path:
    place = Path(folder).expanduser().absolute()
    while not place.exists():
        place = place.parent
    return place
