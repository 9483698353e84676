"""The whole job on a GPU against the same on the CPU: how far the scores are apart, and which bits repeat."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import raylux
from jobs.gpu.inputs import Shape, error
from raylux.api import STAGES, run_stages
from raylux.ledger import EIGEN, LABELS
from raylux.store import RunFolder

# Several fit units, score units, batches and lengths, with padding; what a small corpus would not have by itself.
CUT = ("fit.unit_tokens=1500", "score.unit_size=17", "engine.batch_tokens=512", "score.layers=true")
DENSE = ("query.max_error=0",)
CASES: dict[str, tuple[str, ...]] = {
    "ekfac": DENSE,
    "kfac": (*DENSE, "curvature.kind=kfac"),
    "diagonal": (*DENSE, "curvature.kind=diagonal"),
    "identity": (*DENSE, "curvature.kind=identity"),
    "eigen": (*DENSE, "query.basis=eigen"),
    "low rank": ("query.max_error=0.3", "query.low_rank=always"),
    "sampled": (*DENSE, "fit.labels=sampled"),
}
SHAPES = {
    "gpt2": Shape("gpt2", 2, 64, 4, 211, 5, 128, 60, 6, 24, 0.15),
    "llama": Shape("llama", 2, 64, 4, 211, 5, 128, 60, 6, 24, 0.15),
}
# Of the GPU: what must not change a bit, and what may.
SAME: dict[str, tuple[str, ...]] = {
    "again": (),
    "kept": ("engine.keep_captured=1000000000",),
    "other score units": ("score.unit_size=60",),
}


@dataclass
class Numbers:
    """What a run left: scores [Q, N], by layer [L, N] of the first query, its best sequence's tokens, and labels."""

    total: np.ndarray
    layers: np.ndarray
    tokens: np.ndarray
    best: float
    labels: np.ndarray | None
    vectors: dict[str, np.ndarray]

    def same(self, other: Numbers) -> bool:
        """To the last bit, eigenvectors included."""
        pairs = [(self.total, other.total), (self.layers, other.layers), (self.tokens, other.tokens)]
        pairs += [(self.vectors[name], other.vectors[name]) for name in self.vectors]
        return all(np.array_equal(x, y) for x, y in pairs)


class Bench:
    """Runs of one model in folders of their own."""

    def __init__(self, base: Path, shape: Shape) -> None:
        self.base, self.shape, self._count = base, shape, 0
        shape.write(base)

    def run(self, device: str, dtype: str, *overrides: str) -> Numbers:
        """All stages but the report."""
        self._count += 1
        folder = self.base / f"run-{self._count}"
        usual = (f"model.dtype={dtype}", "engine.contraction_dtype=float32", "fit.labels=dataset")
        config = self.shape.config(self.base, folder, device, *CUT, *usual, *overrides)
        run = run_stages(config, STAGES[:-1], quiet=True)
        try:
            return _numbers(run)
        finally:
            shutil.rmtree(folder)


def _numbers(run: raylux.Run) -> Numbers:
    store, query = RunFolder(run.folder), run.queries[0]
    best = run.top(query, 1).iloc[0]
    labels = None
    if "labels" in store.committed(LABELS):
        labels = store.group(store.manifest(LABELS, "labels").meta["key"]).read("labels")
    return Numbers(
        run.scores().to_numpy().astype(np.float64),
        run.layer_scores(query).to_numpy().astype(np.float64),
        run.token_scores(query, best["sequence"])["influence"].to_numpy().astype(np.float64),
        float(best["influence"]),
        labels,
        {name: store.group(unit.meta["key"]).read("vectors") for name, unit in store.units(EIGEN).items()},
    )


def sums(found: Numbers) -> dict[str, float]:
    """How far layers are from summing to the total, and tokens to their sequence; relative."""
    rms = float(np.sqrt(np.mean(found.total[0] ** 2)))
    layers = np.moveaxis(found.layers, -1, 0).reshape(found.total.shape[1], -1).sum(1)
    return {
        "layers": float(np.abs(layers - found.total[0]).max() / rms),
        "tokens": abs(float(found.tokens.sum()) - found.best) / abs(found.best),
    }


def compare(bench: Bench, overrides: tuple[str, ...]) -> dict[str, Any]:
    """max|Δ|/RMS of the scores: GPU against CPU in both precisions, and each float32 against the CPU's float64."""
    cpu64, gpu64 = (bench.run(device, "float64", *overrides) for device in ("cpu", "cuda"))
    cpu32, gpu32 = (bench.run(device, "float32", *overrides) for device in ("cpu", "cuda"))
    result: dict[str, Any] = {
        "float64": error(gpu64.total, cpu64.total),
        "float32": error(gpu32.total, cpu32.total),
        "cpu float32 to float64": error(cpu32.total, cpu64.total),
        "gpu float32 to float64": error(gpu32.total, cpu64.total),
        "sums": sums(gpu32),
    }
    if gpu32.labels is not None and cpu32.labels is not None:
        result["labels that differ"] = int((gpu32.labels != cpu32.labels).sum())
        result["labels"] = len(gpu32.labels)
    return result


PRECISIONS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bf16 products": ("engine.contraction_dtype=bfloat16",),
    "bf16 model": ("engine.contraction_dtype=bfloat16", "model.dtype=bfloat16"),
}


def bits(bench: Bench, names: list[str], say: Any) -> dict[str, dict[str, bool]]:
    """Whether the GPU's bits stay, in products of both precisions and with a bf16 model."""
    result: dict[str, dict[str, bool]] = {}
    for name in names:
        usual = ("fit.labels=sampled", *DENSE, *PRECISIONS[name])
        first = bench.run("cuda", "float32", *usual)
        result[name] = {other: bench.run("cuda", "float32", *usual, *more).same(first) for other, more in SAME.items()}
        say(bench.shape.family, name, "the same bits:", result[name])
    return result


def run(base: Path, families: list[str], cases: list[str], precisions: list[str], say: Any = print) -> dict[str, Any]:
    """Some cases of some shapes, and whether bits repeat."""
    result: dict[str, Any] = {}
    for family in families:
        bench = Bench(base / family, SHAPES[family])
        found: dict[str, Any] = {}
        result[family] = found
        for name in cases:
            found[name] = compare(bench, CASES[name])
            say(family, name, _short(found[name]))
        found["bits"] = bits(bench, precisions, say)
    return result


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _short(value) if isinstance(value, Mapping) else f"{value:.1e}" if isinstance(value, float) else value
        for name, value in values.items()
    }
