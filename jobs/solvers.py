"""How well do the iterative solvers solve? Against dense inverses: a small language model, and logistic regression.

Writes docs/results/solvers.md and solvers.png: relative error and score correlation after each product with G, what
whole runs score, and what a product costs in forward passes.

    python jobs/solvers.py --seeds 0 1 --write
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from jobs.solving import cost, language_model, logistic
from jobs.solving.page import figure, page

# Name in the page -> products, and the step of fixed steps.
SOLVERS = {"pcg": (30, 1.0), "cg": (60, 1.0), "astra (η = 0.01)": (200, 0.01)}
MODELS = {
    "2 layers, width 16, 24 tokens": (16, 2, 24, 30, 40, 9),
    "4 layers, width 256, 128 tokens": (256, 4, 128, 2000, 4, 5),
}
RESULTS = Path(__file__).parent.parent / "docs" / "results"


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--write", action="store_true", help="write docs/results/solvers.md and solvers.png")
    given = parser.parse_args()
    torch.set_num_threads(1)
    costs = [cost.measure(name, *sizes) for name, sizes in MODELS.items()]
    regressions = [logistic.study(seed) for seed in given.seeds]
    print(json.dumps([asdict(one) for one in (*costs, *regressions)], indent=1), flush=True)
    found: list[language_model.Found] = []
    for seed in given.seeds:
        found.append(language_model.study(language_model.Setting(seed), [1.0], SOLVERS))
        # After each seed: what took minutes is there, whatever becomes of the next.
        seeds = " ".join(str(one.seed) for one in found)
        command = f"python jobs/solvers.py --seeds {seeds} --write"
        text = page(found, regressions, costs, command)
        if given.write:
            (RESULTS / "solvers.md").write_text(text, encoding="utf-8")
            figure(found, RESULTS / "solvers.png")
    print(text)


if __name__ == "__main__":
    main()
