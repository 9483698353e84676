"""Seconds of a whole job on a GPU by stage and kind of work, in F: one bare pass over the same sequences.

F is a forward and backward pass with the gradients of all weights, in the model's precision, in the same process.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import raylux
from jobs.bench.batches import batch_of, summed_loss
from jobs.gpu.inputs import Shape, error
from raylux import models
from raylux.api import STAGES, run_stages
from raylux.config import Config
from raylux.gpu import pinned
from raylux.report.profile import seconds

# (model's precision, products, further overrides)
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "float32": ("float32", "float32", ()),
    "float32, bf16 products": ("float32", "bfloat16", ()),
    "bf16 model": ("bfloat16", "bfloat16", ()),
    "bf16 model, low rank": ("bfloat16", "bfloat16", ("query.max_error=0.01", "query.low_rank=always")),
}


def bare(config: Config, rows: list[Any], size: int) -> float:
    """Seconds of F over sequences, in batches of ``size``; the first batch is run once before."""
    files = models.find_model(config.model)
    model = models.load_model(files, config.model.dtype, "cuda").requires_grad_(True)
    batches = [batch_of(rows[start : start + size]) for start in range(0, len(rows), size)]
    batches = [{name: x.cuda() for name, x in batch.items()} for batch in batches]
    with pinned("cuda"):
        summed_loss(model, batches[0]).backward()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for batch in batches:
            model.zero_grad(set_to_none=True)
            summed_loss(model, batch).backward()
        torch.cuda.synchronize()
        return time.perf_counter() - begun


def one(shape: Shape, base: Path, name: str, more: tuple[str, ...], say: Any) -> tuple[dict[str, Any], np.ndarray]:
    """One case: F, the run by stage and kind, peak memory; and the scores [Q, N]."""
    dtype, products, own = CASES[name]
    folder = base / "run"
    shutil.rmtree(folder, ignore_errors=True)
    how = (f"model.dtype={dtype}", f"engine.contraction_dtype={products}", "score.token_top=0", *more, *own)
    config = shape.config(base, folder, "cuda", *how)
    rows = [row["input_ids"] for row in _records(base / "corpus.jsonl")]
    f = bare(config, rows, 16)
    say(f"{name}: F {f:.2f} s")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    try:
        run_stages(config, STAGES[:-1], quiet=True)
    except BaseException:
        say(f"broken off after {time.perf_counter() - begun:.0f} s", stages_of(raylux.open_run(folder), f))
        raise
    taken = time.perf_counter() - begun
    run = raylux.open_run(folder)
    result = {
        "F": f,
        "tokens": sum(map(len, rows)),
        "tflops": 6e-12 * float(run.settings["model"]["parameters"]) * sum(map(len, rows)) / f,
        "seconds": taken,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "plan": dict(run.settings["plan"]),
        "stages": stages_of(run, f),
    }
    scores = run.scores().to_numpy().astype(np.float64)
    shutil.rmtree(folder)
    torch.cuda.empty_cache()
    return result, scores


def stages_of(run: raylux.Run, f: float) -> dict[str, dict[str, Any]]:
    """Seconds by stage, of the driver's clock and by kind of work."""
    stages = {}
    for stage in run.profile():
        kinds = {kind: round(wall, 3) for kind, (wall, _) in stage.work.kinds.items() if wall >= 0.001}
        driver = {kind: round(wall, 3) for kind, (wall, _) in stage.driver.kinds.items() if wall >= 0.001}
        clock = seconds(stage.driver)
        stages[stage.stage] = {"seconds": clock, "F": clock / f, "work": kinds, "driver": driver, "units": stage.units}
    return stages


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(base: Path, shape: Shape, names: list[str], more: tuple[str, ...] = (), say: Any = print) -> dict[str, Any]:
    """Some cases of one shape; the scores of each against those of the first."""
    if not (base / "model").exists():
        shape.write(base)
    found: dict[str, Any] = {}
    first: np.ndarray | None = None
    for name in names:
        try:
            result, scores = one(shape, base, name, more, say)
        except Exception as problem:  # the next case may still run
            found[name] = {"failed": f"{type(problem).__name__}: {problem}"[:2000]}
            say(name, found[name])
            continue
        first = scores if first is None else first
        result["error"] = error(scores, first)
        result["correlation"] = float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(scores, first, strict=True)]))
        found[name] = result
        say(report(name, result))
    return found


def report(name: str, result: dict[str, Any]) -> str:
    """A few lines for people."""
    f = result["F"]
    lines = [
        f"{name}: F {f:.2f} s ({result['tflops']:.0f} TFLOP/s), run {result['seconds']:.1f} s, "
        f"peak {result['peak_gb']:.1f} GB, scores against the first {result['error']:.1e} "
        f"(correlation {result['correlation']:.5f})"
    ]
    for stage, value in result["stages"].items():
        for who in ("work", "driver"):
            kinds = sorted(value[who].items(), key=lambda item: -item[1])[:9]
            parts = ", ".join(f"{kind} {wall / f:.2f}" for kind, wall in kinds)
            lines.append(f"  {stage if who == 'work' else '':12} {value['F'] if who == 'work' else 0:6.2f} F  {parts}")
    return "\n".join(lines)
