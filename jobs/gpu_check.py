"""raylux on a GPU: exactness against the CPU, rates of operations, and the time of a job in bare passes.

    python jobs/gpu_check.py                       # all parts, some minutes on an H100
    python jobs/gpu_check.py --parts exact rates --out results.json

In process, without Ray. Needs a CUDA device. Weights are random: what is measured does not depend on what they know.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers

from jobs.gpu import exact, rates, speed
from jobs.gpu.inputs import Shape

PARTS = ("exact", "rates", "speed")


def main() -> None:
    """Run the parts; a part that fails does not stop the next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, help="write everything there, as JSON")
    parser.add_argument("--exact", nargs="+", choices=list(exact.SHAPES), default=list(exact.SHAPES))
    parser.add_argument("--compare", nargs="*", choices=list(exact.CASES), default=list(exact.CASES))
    parser.add_argument("--bits", nargs="*", choices=list(exact.PRECISIONS), default=list(exact.PRECISIONS))
    parser.add_argument("--rates", nargs="+", choices=list(rates.PARTS), default=list(rates.PARTS))
    parser.add_argument("--folder", type=Path, help="where models and runs go; in memory, the disk does not count")
    parser.add_argument("--cases", nargs="+", choices=list(speed.CASES), default=list(speed.CASES))
    parser.add_argument("--override", nargs="*", default=[], help="section.key=value, for the timed runs")
    parser.add_argument("--family", choices=("gpt2", "llama"), default="gpt2", help="of the timed runs")
    for name, value in (("layers", 12), ("width", 1024), ("vocabulary", 50257), ("tokens", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--queries", type=int, default=64)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here")
    shape = Shape(
        options.family, options.layers, options.width, options.width // 64, options.vocabulary, options.tokens,
        options.tokens, options.sequences, options.queries,
    )  # fmt: skip
    found: dict[str, Any] = {"where": where(), "shape": vars(shape)}
    say(found["where"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that what was done is told
    with tempfile.TemporaryDirectory(prefix="raylux-gpu-", dir=options.folder) as name:
        base = Path(name)
        for part in options.parts:
            begun = time.perf_counter()
            try:
                if part == "exact":
                    found[part] = exact.run(base / part, options.exact, options.compare, options.bits, say)
                elif part == "rates":
                    found[part] = rates.run(options.rates, say)
                else:
                    found[part] = speed.run(base / part, shape, options.cases, tuple(options.override), say)
            except Exception:  # what was found so far is worth having
                found[part] = {"failed": traceback.format_exc()[-3000:]}
                say(found[part]["failed"])
            say(f"{part}: {time.perf_counter() - begun:.0f} s")
            if options.out:
                options.out.write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")


def where() -> dict[str, Any]:
    """The device and what runs on it."""
    return {
        "device": torch.cuda.get_device_name(),
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def say(*what: Any) -> None:
    """At once: a run that is cut off leaves what it printed."""
    print(*(_plain(x) for x in what), flush=True)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
