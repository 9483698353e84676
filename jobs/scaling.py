"""The plans in docs/scaling.md: Llama-3-8B and 70B, a million candidates, a thousand queries, on 8, 64, 512 H100s.

Nothing runs: shapes from configs/models, machines from configs/clusters, and the cost model.

    python jobs/scaling.py --write
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from raylux.config import Config
from raylux.cost import costs
from raylux.cost.costs import RunPlan
from raylux.cost.machine import Cluster
from raylux.cost.model import ModelShape
from raylux.cost.running import rotation_flops
from raylux.cost.sizes import covariance_bytes, layer_bytes
from raylux.errors import UserError
from raylux.planning import Found, Sizes, find_shape, plan_on
from raylux.report import plans

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- jobs/scaling.py writes from here -->", "<!-- to here -->"
SIZES = Sizes(sequences=1_000_000, tokens=512, queries=1_000)
FITTED = 100_000
BEST = 100
DEVICES = (8, 64, 512)
NAMES = {"llama-3-8b": "Llama-3-8B", "llama-3-70b": "Llama-3-70B", "smollm2-135m": "SmolLM2-135M"}
# 70B does not fit one device: a worker is a node.
SPLIT = {"llama-3-8b": 1, "llama-3-70b": 8}
# Units shorter than the engine's default keep 512 devices busy.
SHORTER = {512: ("score.unit_size=256", "fit.unit_tokens=200000"), 64: ("score.unit_size=1024",)}
# GPUs of a worker as the engine has them, and queries of such a run: its s_test has to fit beside the model.
GPUS, ASKED = (4, 8), 50
FLOOR, AIM = 24.0, 12.0


def config(model: str, *overrides: str) -> Config:
    """A config of a model of which only config.json is here."""
    sections = {
        "run": {"folder": "runs/scaling"},
        "model": {"path": str(ROOT / "configs" / "models" / model), "dtype": "bfloat16", "device": "cuda"},
        "corpus": {"path": "corpus"},
        "queries": {"path": "queries"},
        "fit": {"sequences": FITTED},
        "prefilter": {"kind": "none"},
        "score": {"best": BEST},
    }
    return Config.parse(sections, overrides)


@cache
def found(model: str) -> Found:
    """A model's shape, which no number of devices changes."""
    return find_shape(config(model))


@cache
def plan(model: str, devices: int, split: int | None = None, *more: str) -> RunPlan:
    """The plan of a model on so many H100s, with more keys of the config."""
    cluster = Cluster.load(ROOT / "configs" / "clusters" / f"h100-{devices}.yaml")
    cluster = cluster.model_copy(update={"devices_per_worker": split or SPLIT[model]})
    settings = config(model, *SHORTER.get(devices, ()), *more)
    return plan_on(settings, SIZES, cluster, costs.AHEAD, found(model))


@cache
def turns(gpus: int) -> RunPlan:
    """Llama-3-70B on 64 H100s by what the engine does: workers of so many GPUs, which take turns."""
    cluster = Cluster.load(ROOT / "configs" / "clusters" / "h100-64.yaml")
    spread = (f"engine.gpus_per_worker={gpus}", "model.device_map=balanced")
    settings = config("llama-3-70b", *SHORTER[64], *spread)
    return plan_on(settings, replace(SIZES, queries=ASKED), cluster, costs.ENGINE, found("llama-3-70b"))


def shapes() -> str:
    """What the models' shapes alone say."""
    rows = []
    for name in ("smollm2-135m", "llama-3-8b", "llama-3-70b"):
        shape, _, _ = found(name)
        tracked, tokens = shape.tracked, SIZES.tokens or 0
        forming = 2.0 * layer_bytes(tracked, 1)
        first = forming + sum(rotation_flops(layer, tokens)[0] for layer in tracked)
        rows.append(
            [
                NAMES[name],
                f"{shape.parameters / 1e9:,.3g} G",
                f"{layer_bytes(tracked, 1) / 1e9:,.3g} G",
                plans.bytes_text(covariance_bytes(tracked, shape.groups)),
                plans.bytes_text(layer_bytes(tracked)),
                f"{shape.forward_flops(tokens) / 1e9:,.3g} + {shape.backward_flops(tokens) / 1e9:,.3g}",
                f"{first / 1e9:,.3g}",
                f"{(forming + _formed(shape, tokens)) / 1e9:,.4g}",
            ]
        )
    names = (
        "model", "parameters", "tracked", "A and S, float32", "one gradient, or Λ", "forward + backward",
        "Λ, tokens first", "Λ, gradients rotated",
    )  # fmt: skip
    return plans.markdown(names, rows)


def _formed(shape: ModelShape, tokens: int) -> float:
    return sum(2.0 * layer.parameters * (layer.outputs + layer.inputs) / tokens for layer in shape.tracked)


def summary() -> str:
    """A row per model and number of devices."""
    rows = []
    for model in SPLIT:
        for devices in DEVICES:
            one = plan(model, devices)
            hours = {stage.name: plans.hours_text(stage.device_hours) for stage in one.stages}
            stages = [hours[name] for name in ("covariance", "eigenbases", "lambda", "query", "score")]
            rows.append(
                [
                    NAMES[model], str(devices), plans.time_text(one.seconds), *stages,
                    f"**{one.device_hours:,.1f}**", f"{one.dollars or 0:,.0f}", plans.bytes_text(one.disk_bytes),
                ]
            )  # fmt: skip
    names = ("model", "H100s", "time", "covariance", "eigenbases", "Λ", "query", "score", "device-hours", "$", "disk")
    return plans.markdown(names, rows)


def spread() -> str:
    """A row per number of GPUs of a worker."""
    rows = []
    for gpus in GPUS:
        one = turns(gpus)
        passes = [next(c.value for c in one.choices if c.name == name) for name in ("covariance passes", "Λ passes")]
        fullest = max(stage.device_bytes for stage in one.stages)
        hours = [plans.hours_text(one.stage(name).device_hours) for name in ("covariance", "lambda", "query", "score")]
        rows.append(
            [
                str(gpus), *(each.partition(",")[0] for each in passes), plans.bytes_text(fullest),
                plans.time_text(one.seconds), *hours, f"**{one.device_hours:,.1f}**",
            ]
        )  # fmt: skip
    names = (
        "GPUs of a worker", "covariance passes", "Λ passes", "fullest GPU", "time", "covariance", "Λ", "query", "score",
        "device-hours",
    )  # fmt: skip
    return plans.markdown(names, rows)


def refusal() -> str:
    """What is said of 70B where a worker is one device."""
    try:
        plan("llama-3-70b", 8, split=1)
    except UserError as error:
        return str(error)
    raise AssertionError("Llama-3-70B fits a single device")


def section() -> str:
    """What stands between the marks of the page."""
    small, large = plan("llama-3-8b", 8), plan("llama-3-70b", 64)
    quarter = plan("llama-3-8b", 8, None, f"fit.covariance_sequences={FITTED // 4}")
    verdict = f"{small.device_hours:.1f} device-hours; floor {FLOOR:.0f}, aim {AIM:.0f}"
    floor = SIZES.sequences or 0
    shape, _, _ = found("llama-3-8b")
    tokens = SIZES.tokens or 0
    bare = floor * tokens * (shape.forward_flops(tokens) + shape.backward_flops(tokens))
    return f"""
## What shapes alone say

GFLOP per token at {SIZES.tokens} tokens a sequence, by the formulas below.

{shapes()}

## A million candidates, a thousand queries

Fit on {FITTED:,} sequences, score {SIZES.sequences:,} candidates of {SIZES.tokens} tokens against {SIZES.queries:,}
queries, the {BEST} best of each wanted (`score.best={BEST}`). Device-hours by stage.

{summary()}

Llama-3-70B on single devices is refused:

> {refusal()}

So a worker is a node of 8 devices there, **all at work at once, which looks ahead**: the engine spreads a model's
blocks over the GPUs of a worker (`engine.gpus_per_worker`, `model.device_map`), and they take turns. Today, with
{ASKED} queries on 64 H100s:

{spread()}

The weights are cut as evenly as whole blocks allow, each GPU counts its own weights, activations, sums and bases, and a
layer pass takes layers of each of them; a GPU waits while the others run their blocks, so that more of them make fewer
passes and no pass faster. Device-hours count the waiting.

On 64 and 512 devices units are shorter than the engine's default, or
devices would wait: {"; ".join(" ".join(SHORTER[n]) + f" on {n}" for n in (64, 512))}.

### Llama-3-8B on 8 H100s, term by term

{verdict}. One forward and backward pass over the candidates is {bare:.2e} FLOPs: {bare / 989e12 / 3600:.1f}
device-hours at the full peak rate, {bare / 989e12 / 0.45 / 3600:.1f} at 45 % of it. Within this model, the aim
is met only by running fewer candidates through the model, or by running the model faster. With A and S of a quarter
of the fitted sequences (`fit.covariance_sequences={FITTED // 4}`) it is {quarter.device_hours:.1f}.

{plans.markdown(plans.stage_names(small), plans.stage_rows(small))}

{plans.markdown(plans.WORK, plans.work_rows(small))}

{plans.markdown(plans.CHOICES, plans.choice_rows(small.choices))}

### Llama-3-70B on 64 H100s

{plans.markdown(plans.stage_names(large), plans.stage_rows(large))}

{plans.markdown(plans.CHOICES, plans.choice_rows(large.choices))}
"""


def page(text: str) -> str:
    """The page with the section that the plans of today make."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{section()}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the section, or write it; 1 where the plan for Llama-3-8B misses its floor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the page")
    options = parser.parse_args(arguments)
    if options.write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(section())
    return 0 if plan("llama-3-8b", 8).device_hours <= FLOOR else 1


if __name__ == "__main__":
    sys.exit(main())
