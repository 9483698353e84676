"""How fast this machine is, measured in some seconds, once per host and number of threads.

What the engine does most is tried as the engine does it: products with rounded bases, symmetric updates, attention and
activations with their backward passes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from raylux.blas import add_gram, eigendecomposition
from raylux.blocks import RoundedBasis
from raylux.cache import build_once, entry_name
from raylux.cost.machine import Cluster, eigh_flops
from raylux.errors import UserError
from raylux.products import gradients_into, rotated

_GEMM_SIZES = (32, 64, 128, 256, 512, 1024)
_ROTATED_SIZES, _ROTATED_ROWS = (64, 128, 256, 512, 1024), 256
# Tokens, sides and number of gradients that are formed.
_FORMED = (128, 512, 16)
# Dense queries of a product, and entries of a part of a gradient.
_TILE, _DOTTED = 8, 1 << 18
_EIGH_SIZES = (64, 256, 768)
# Heads, tokens and head size on which attention is tried; side and rows of a symmetric update.
_ATTENTION = (8, 256, 64)
_SYMMETRIC = (1024, 256)
_ELEMENTS = 1 << 22
# Of an activation's batch on a CPU.
_ACTIVATED = 1 << 19
_DISK_BYTES = 1 << 25
_REPEATS = 5
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_FORMAT = 3


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
    new: list[Path] = []

    def build(place: Path) -> None:
        new.append(place)
        _write(place / "rates.json", threads, device)

    folder = build_once("calibration", entry_name(f"{platform.node()}-{device}-{threads}", *facts), build)
    try:
        if refresh and not new:
            with tempfile.TemporaryDirectory(dir=folder) as apart:
                _write(Path(apart) / "rates.json", threads, device)
                os.replace(Path(apart) / "rates.json", folder / "rates.json")
        return dict(json.loads((folder / "rates.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read ({error}); delete it, it is measured again") from None


def _write(path: Path, threads: int, device: str) -> None:
    path.write_text(json.dumps(measure(threads, device, path.parent)), encoding="utf-8")


def measure(threads: int, device: str, folder: Path) -> dict[str, Any]:
    """Measure now; ``folder`` is where the disk is tried."""
    with _threads(threads), torch.inference_mode():
        gemm = {name: [_gemm(n, dtype, device) for n in _GEMM_SIZES] for name, dtype in _DTYPES.items()}
        eigh = [eigh_flops(n) / _best(_eigh(n, torch.float64, device), device) for n in _EIGH_SIZES]
        quick = _best(_eigh(_EIGH_SIZES[-1], torch.float32, device), device)
        rates: dict[str, Any] = {f"{name}_tflops": found[-1] / 1e12 for name, found in gemm.items()}
        for name, more in (("bfloat16_small", 0), ("bfloat16_odd", 1)):
            shares = [(n, _rotation(n + more, device) / gemm["bfloat16"][-1]) for n in _ROTATED_SIZES]
            rates[name] = [[n, min(1.0, share)] for n, share in shares]
        thin = {name: _dots(_DTYPES[name], device) / gemm[name][-1] for name in ("float32", "bfloat16")}
        rates["small"] = [[n, min(1.0, r / gemm["float32"][-1])]
                          for n, r in zip(_GEMM_SIZES, gemm["float32"], strict=True)]  # fmt: skip
        rates["small"].insert(0, [_TILE, min(1.0, thin["float32"])])
        rates["bfloat16_small"].insert(0, [_TILE, min(1.0, thin["bfloat16"])])
        rates["eigh_tflops"] = eigh[-1] / 1e12
        rates["eigh_small"] = [[n, r / eigh[-1]] for n, r in zip(_EIGH_SIZES, eigh, strict=True)]
        if device == "cpu":
            rates["forming_tflops"] = _forming() / 1e12
        rates["eigh_float32_tflops"] = eigh_flops(_EIGH_SIZES[-1]) / quick / 1e12
        rates["attention_tflops"] = _attention(device) / 1e12
        if device == "cpu":
            rates["symmetric_tflops"] = _symmetric() / 1e12
            rates["gelu_ns"] = _activation(lambda x: functional.gelu(x, approximate="tanh")) * 1e9
            rates["silu_ns"] = _activation(functional.silu) * 1e9
        rates["bandwidth_gb_s"] = _bandwidth(device) / 1e9
        rates["operation_us"] = _operation(device) * 1e6
        rates["host_gb_s"] = (_into_new() if device == "cpu" else _to_host()) / 1e9
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
    """Seconds of some calls, the middle one, after one that does not count.

    One thread's are seconds of the processor: what others take of it meanwhile is no part of how fast it is.
    """
    now = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    call()
    times = []
    for _ in range(repeats):
        _wait(device)
        begun = now()
        call()
        _wait(device)
        times.append(now() - begun)
    return max(sorted(times)[repeats // 2], 1e-9)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _gemm(n: int, dtype: torch.dtype, device: str) -> float:
    x = torch.randn(n, n, device=device).to(dtype)
    calls = max(4, 512 // n)

    def products() -> None:
        for _ in range(calls):
            x @ x

    return calls * 2.0 * n**3 / _best(products, device)


def _rotation(n: int, device: str) -> float:
    """FLOP/s of tokens put into a rounded basis, what is corrected of its rounding not counted as FLOPs."""
    x = torch.randn(1, _ROTATED_ROWS, n, device=device).bfloat16()
    basis = RoundedBasis.of(torch.eye(n, device=device), torch.bfloat16)
    calls = max(8, 2048 // n)

    def products() -> None:
        for _ in range(calls):
            rotated(x, basis)

    return calls * 2.0 * _ROTATED_ROWS * n**2 / _best(products, device)


def _forming() -> float:
    """FLOP/s of gradients formed of their tokens, one sequence after the other."""
    tokens, side, count = _FORMED
    a, g = (torch.randn(count, tokens, side + more).bfloat16() for more in (1, 0))
    formed = torch.empty(count, side, side + 1, dtype=torch.bfloat16)
    return 2.0 * count * tokens * side * (side + 1) / _best(lambda: gradients_into(a, g, formed), "cpu")


def _dots(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of some formed gradients against a tile of dense queries."""
    x, y = (torch.randn(rows, _DOTTED, device=device).to(dtype) for rows in (2 * _TILE, _TILE))
    return 2.0 * 2 * _TILE**2 * _DOTTED / _best(lambda: x @ y.T, device)


def _symmetric() -> float:
    """FLOP/s of a triangle of Σ x xᵀ by the BLAS routine that the engine takes."""
    n, rows = _SYMMETRIC
    total, x = torch.zeros(n, n), torch.randn(rows, n)
    return float(n**2 * rows) / _best(lambda: add_gram(total, x), "cpu")


def _attention(device: str) -> float:
    """FLOP/s of causal attention, forward and backward, half of which are skipped and count."""
    heads, tokens, size = _ATTENTION

    def passes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    taken = _both_passes(passes, [torch.randn(1, heads, tokens, size, device=device) for _ in range(3)])
    return 12.0 * heads * tokens**2 * size / taken


def _activation(call: Callable[[Tensor], Tensor]) -> float:
    """Seconds of a number, forward and backward."""
    return _both_passes(call, [torch.randn(_ACTIVATED)]) / _ACTIVATED


def _both_passes(call: Callable[..., Tensor], tensors: Sequence[Tensor]) -> float:
    """Seconds of an operation and of the gradients by all that goes into it."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [x.clone().requires_grad_() for x in tensors]
        back = torch.ones_like(call(*inputs))
        return _best(lambda: torch.autograd.grad(call(*inputs), inputs, back), inputs[0].device.type)


def _eigh(n: int, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    x = torch.randn(n, n, dtype=torch.float64, device=device)
    gram = (x @ x.T).to(dtype)
    return lambda: eigendecomposition(gram)


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


def _into_new() -> float:
    """Bytes per second copied into memory that the system has yet to give."""
    x = torch.ones(2 * _ELEMENTS)  # more than the allocator keeps for later
    return 8.0 * _ELEMENTS / _best(x.clone, "cpu")


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
