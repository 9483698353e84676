"""Two-stage scoring, studied: sketches of all pairs, then exact scores of each query's best.

How much of the exact contraction's cost is left when recall of each query's best 100 must be 0.99: forming gradients,
sketching them, rescoring. Nothing here is used by a run; docs/results/two-stage.md says why.

    python jobs/two_stage.py --case demo --scratch /tmp/two-stage --write

The scratch folder holds a and g of every sequence (A: 13 GB for 4,096 candidates and 1,000 queries) and what the passes
found; the same command goes on with what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from jobs.twostage import captured, curve
from jobs.twostage.cases import prepare
from jobs.twostage.gathered import slowness
from jobs.twostage.page import FIGURES, write
from jobs.twostage.passes import LayerStudy, sides_of
from raylux.layers import TrackedLayer

# Directions of the largest eigenvalues that are balanced on a side of a layer.
DIRECTIONS = 16
# Sequences by whose sketches pivots are chosen.
PILOT = 512


def study(name: str, sequences: int, queries: int, fitted: int, largest: int, scratch: Path) -> dict[str, Any]:
    """Capture, both passes, and the curve.

    Args:
        name: of the case.
        sequences: N.
        queries: Q.
        fitted: sequences of the fit.
        largest: k of the sketches that are kept; smaller ones are made of them.
        scratch: a folder for this case and these sizes.

    Returns:
        Sizes, a row for each setting of the first pass, and bounds, as ``page`` reads them.
    """
    torch.set_grad_enabled(True)
    case = prepare(name, sequences, queries, fitted)
    layers = captured.layers(case)
    captured.keep(case, scratch)
    with torch.no_grad():
        kept, exact = passes(layers, queries, largest, scratch)
    tokens = captured.mean_tokens(scratch, "cand")
    sides = {layer.name: sides_of(layer, DIRECTIONS, DIRECTIONS) for layer in layers}
    scale = exact.std(0)
    rows = []
    for pivots, mean in settings(largest):
        row = measured(layers, kept, exact, scale, sides, tokens, pivots, mean)
        print({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
        rows.append(row)
    return {
        "case": name,
        "sequences": len(exact),
        "queries": queries,
        "fitted": fitted,
        "tokens": tokens,
        "covering": curve.covering(exact),
        "entries": sum(layer.parameters for layer in layers),
        "layers": len(layers),
        "spread": [float(x) for x in np.quantile(scale / np.median(scale), (0, 0.1, 0.9, 1))],
        "rows": rows,
    }


def settings(largest: int) -> list[tuple[int, int]]:
    """(pivots, mean k of a layer) of the first passes that are tried."""
    sizes = [largest // by for by in (16, 8, 4, 2)]
    return [(0, size) for size in sizes] + [(16, sizes[1])]


def passes(
    layers: Sequence[TrackedLayer], queries: int, largest: int, scratch: Path
) -> tuple[dict[str, curve.Kept], np.ndarray]:
    """Exact scores and sketches of every layer, and the total of the scores [N, Q]."""
    found, exact = {}, {}
    for layer in layers:
        begun = time.perf_counter()
        exact[layer.name] = LayerStudy(scratch, layer, queries).exact()
        print(f"{layer.name}: exact scores, {time.perf_counter() - begun:.0f} s", flush=True)
    total = sum((x.astype(np.float64) for x in exact.values()), start=np.zeros((1, 1)))
    for layer in layers:
        begun = time.perf_counter()
        LayerStudy(scratch, layer, queries).sketch(largest, sides_of(layer, DIRECTIONS, DIRECTIONS), total.std(0))
        with np.load(scratch / f"sketch.{layer.name}.npz") as file:
            found[layer.name] = curve.Kept(exact[layer.name], file["gradients"], file["queries"])
        print(f"{layer.name}: sketches, {time.perf_counter() - begun:.0f} s", flush=True)
    return found, total


def scores(scratch: Path, queries: int) -> np.ndarray:
    """[N, Q] exact scores over all layers, as the passes kept them."""
    layers = (np.load(path)[:, :queries].astype(np.float64) for path in sorted(scratch.glob("exact.*.npy")))
    return sum(layers, start=np.zeros((1, 1)))


def measured(
    layers: Sequence[TrackedLayer],
    kept: dict[str, curve.Kept],
    exact: np.ndarray,
    scale: np.ndarray,
    sides: dict[str, tuple[int, int]],
    tokens: float,
    pivots: int,
    mean: int,
) -> dict[str, Any]:
    """One point of the curve; ``elsewhere``: (Q, N) -> the cost there, with the same share of pairs rescored."""
    setting = curve.FirstPass(curve.allocate(kept, scale, pivots, mean, PILOT), pivots)
    found = curve.estimate(kept, scale, setting, PILOT)
    result = curve.rescored(exact, found)
    best = curve.rescored(exact, found, curve.TOP // 10)
    weights = {layer.name: float(layer.parameters) for layer in layers}
    dropped = curve.least_eliminated(kept, found, weights)
    sequences = len(exact)

    def shares(queries: int, count: int, pairs: float) -> curve.Cost:
        return curve.cost(layers, curve.Shape(tokens, queries, count), setting, sides, pairs)

    return {
        "pivots": pivots,
        "size": mean,
        "error": result.error,
        "promised": result.promised,
        "fixed": result.pairs,
        "adaptive": result.adaptive,
        "eliminated": dropped,
        "sequences": result.sequences,
        "best_tenth": best.adaptive,
        "cost": vars(shares(1000, sequences, dropped)),
        "elsewhere": {
            f"{queries} {count}": shares(queries, count, pairs).total
            for queries, count, pairs in (
                (1000, sequences, dropped),
                (2000, sequences, dropped),
                (4000, sequences, dropped),
                (1000, 10 * sequences, best.adaptive),
                (10000, 10 * sequences, best.adaptive),
            )
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a case, keep its figures, write the page from all that are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["A", "demo", "tiny"], default="demo")
    parser.add_argument("--sequences", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--fitted", type=int, default=512)
    parser.add_argument("--largest", type=int, default=8192, help="k of the largest sketch of a layer")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep the figures and write the page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    sizes = options.sequences, options.queries, options.fitted
    scratch = options.scratch / "-".join(map(str, (options.case, *sizes)))
    scratch.mkdir(parents=True, exist_ok=True)
    figures = scratch / "figures.json"
    if not figures.exists():
        figures.write_text(json.dumps(study(options.case, *sizes, options.largest, scratch)), encoding="utf-8")
    found = json.loads(figures.read_text(encoding="utf-8"))
    found["energies"] = curve.energies(scores(scratch, options.queries))
    found["gathered"] = {str(share): slowness(share) for share in (0.005, 0.02, 0.05)}
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}))
    if options.write:
        kept = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
        command = f"python jobs/two_stage.py {_without_scratch(sys.argv[1:] if arguments is None else arguments)}"
        write({**kept, options.case: {**found, "command": command}})
    return 0


def _without_scratch(given: Sequence[str]) -> str:
    """The arguments without the path of a machine."""
    words = list(given)
    if "--scratch" in words:
        words[words.index("--scratch") + 1] = "SCRATCH"
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
