"""What a GPU does with the products and decompositions of raylux: rates of operations, outside of the engine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylux.cost.calibrate import _disk
from raylux.cost.machine import eigh_flops
from raylux.gpu import pinned, repeatable

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def seconds(call: Callable[[], Any], repeats: int = 3, warm: bool = True) -> float:
    """Of the fastest call."""
    if warm:
        call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of normal entries, on the device; zeros would run faster than data do."""
    return torch.randn(*shape, device="cuda").to(dtype)


def gemm() -> dict[str, dict[int, float]]:
    """TFLOP/s of square products; tf32: float32 with the switch that raylux leaves off."""
    found: dict[str, dict[int, float]] = {name: {} for name in (*_DTYPES, "tf32")}
    for n in (512, 1024, 2048, 4096, 8192):
        for name, dtype in _DTYPES.items():
            x, y = normal(n, n, dtype=dtype), normal(n, n, dtype=dtype)
            found[name][n] = 2e-12 * n**3 / seconds(lambda x=x, y=y: x @ y, 5)
        x, y = normal(n, n), normal(n, n)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        found["tf32"][n] = 2e-12 * n**3 / seconds(lambda x=x, y=y: x @ y, 5)
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    return found


def forming(rows: int = 16, tokens: int = 512, outputs: int = 4096) -> dict[str, float]:
    """TFLOP/s of G_n = Σ_t g_t a_tᵀ: one product for all sequences, one each, and with the odd width of a bias."""
    found = {}
    for name in ("float32", "bfloat16"):
        g = normal(rows, tokens, outputs, dtype=_DTYPES[name])
        for inputs in (1024, 1025, 1032):
            a = normal(rows, tokens, inputs, dtype=_DTYPES[name])
            out = torch.empty(rows, outputs, inputs, dtype=a.dtype, device="cuda")
            flops = 2e-12 * rows * tokens * outputs * inputs
            found[f"{name} together {inputs}"] = flops / seconds(lambda a=a, g=g, out=out: torch.bmm(g.mT, a, out=out))

            def each(a: Tensor = a, g: Tensor = g, out: Tensor = out) -> None:
                for n in range(rows):
                    torch.mm(g[n].T, a[n], out=out[n])

            found[f"{name} each {inputs}"] = flops / seconds(each)
        padded = normal(rows, tokens, 1032, dtype=_DTYPES[name])[..., :1025]
        out = torch.empty(rows, outputs, 1032, dtype=padded.dtype, device="cuda")[..., :1025]
        flops = 2e-12 * rows * tokens * outputs * 1025
        found[f"{name} strided 1025"] = flops / seconds(lambda a=padded, g=g, out=out: torch.bmm(g.mT, a, out=out))
    return found


def gram(tokens: int = 16384) -> dict[str, float]:
    """TFLOP/s of xᵀx: float32, bf16 operands with float32 sums."""
    found = {}
    for n in (1024, 1025, 4096, 4097):
        x, total = normal(tokens, n), torch.zeros(n, n, device="cuda")
        flops = 2e-12 * tokens * n * n
        found[f"float32 {n}"] = flops / seconds(lambda x=x, t=total: t.addmm_(x.T, x))
        x = x.bfloat16()
        found[f"bfloat16 {n}"] = flops / seconds(lambda x=x: torch.mm(x.T, x, out_dtype=torch.float32))
    return found


def dots(rows: int = 32, queries: int = 64, entries: int = 1 << 22) -> dict[str, float]:
    """GB/s of formed gradients against dense queries, which memory should bound; ``parts``: cut along the entries."""
    found = {}
    for name in ("float32", "bfloat16"):
        x, y = normal(rows, entries, dtype=_DTYPES[name]), normal(queries, entries, dtype=_DTYPES[name])
        size = 1e-9 * (x.numel() + y.numel()) * x.element_size()
        found[f"{name} whole"] = size / seconds(lambda x=x, y=y: x @ y.T)
        for parts in (64, 256):
            u, v = (z.view(len(z), parts, -1).transpose(0, 1) for z in (x, y))
            found[f"{name} {parts} parts"] = size / seconds(lambda u=u, v=v: torch.bmm(u, v.mT).sum(0))
        if name == "bfloat16":
            found[f"{name} out float32"] = size / seconds(lambda x=x, y=y: torch.mm(x, y.T, out_dtype=torch.float32))
    return found


def eigh() -> dict[str, float]:
    """Seconds of symmetric eigendecompositions with vectors; TFLOP/s by the cost model's count beside them."""
    found = {}
    for name in ("float64", "float32"):
        for n in (512, 1024, 2048, 4096, *((8192,) if name == "float64" else ())):
            x = normal(n, 2 * n, dtype=_DTYPES[name])
            matrix = x @ x.T
            taken = seconds(lambda m=matrix: torch.linalg.eigh(m), 1, warm=n <= 2048)
            found[f"{name} {n}"] = taken
            found[f"{name} {n} tflops"] = eigh_flops(n) / taken / 1e12
    x = normal(16, 1024, 1024)
    found["float32 16 x 1024"] = seconds(lambda m=x @ x.mT: torch.linalg.eigh(m), 1)
    return found


def attention(rows: int = 4, heads: int = 16, tokens: int = 512) -> dict[str, Any]:
    """Backward passes of masked attention: do the bits repeat, and what does it cost that they do; milliseconds."""
    found: dict[str, Any] = {}
    mask = torch.ones(tokens, tokens, device="cuda", dtype=torch.bool).tril()[None, None].repeat(rows, 1, 1, 1)
    mask[..., -8:] = False
    for name in ("float32", "bfloat16"):
        q, k, v, g = (normal(rows, heads, tokens, 64, dtype=_DTYPES[name]) for _ in range(4))
        for how in ("masked", "causal"):
            options = {"attn_mask": mask} if how == "masked" else {"is_causal": True}

            def backward(q: Tensor = q, k: Tensor = k, v: Tensor = v, g: Tensor = g, options: Any = options) -> Any:
                with torch.inference_mode(False), torch.enable_grad():
                    leaves = [x.clone().requires_grad_(True) for x in (q, k, v)]
                    out = torch.nn.functional.scaled_dot_product_attention(*leaves, **options)
                    return torch.autograd.grad(out, leaves, g.clone())

            for where in ("cpu", "cuda"):  # repeatable() does something on the latter
                with repeatable(where):
                    first = backward()
                    same = all(all(map(torch.equal, first, backward())) for _ in range(5))
                    ms = 1e3 * seconds(backward)
                found[f"{name} {how} {'as it is' if where == 'cpu' else 'repeatable'}"] = [same, ms]
    return found


def memory(entries: int = 1 << 28) -> dict[str, float]:
    """GB/s: elementwise on the device, and to and from the host's memory."""
    x = normal(entries)
    out = torch.empty_like(x)
    size = 4e-9 * entries
    host = torch.empty(entries // 4).pin_memory()
    pageable = torch.empty(entries // 4)
    part = x[: entries // 4]
    return {
        "device": 4 * size / seconds(lambda: torch.exp(torch.mul(x, x, out=out), out=out)),
        "to host": size / 4 / seconds(part.cpu, 2),
        "to host, pinned": size / 4 / seconds(lambda: host.copy_(part), 2),
        "from host": size / 4 / seconds(lambda: pageable.cuda(), 2),
    }


def disk() -> dict[str, float]:
    """GB/s written and synced where temporary files go."""
    return {"write": _disk(Path(tempfile.gettempdir())) / 1e9}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    part.__name__: part for part in (gemm, forming, gram, dots, attention, memory, disk, eigh)
}


def run(names: list[str], say: Any = print) -> dict[str, Any]:
    """Some of ``PARTS``; one that fails does not stop the next."""
    found: dict[str, Any] = {}
    with pinned("cuda"), torch.inference_mode():
        for name in names:
            try:
                found[name] = PARTS[name]()
            except (RuntimeError, TypeError) as error:
                found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            say(name, found[name])
            torch.cuda.empty_cache()
    return found
