"""Do predictions in nats come true once they are calibrated? Three model families against the proximal optimum.

A small model of characters of each family is trained on openings of Wikipedia articles; held-out openings are the
queries. ``raylux.calibrate`` gives the run its slope, ``raylux.verify`` measures what sequences do at the proximal
optimum, and each kind of prediction is held against that. What is done is kept in --folder: the same command goes on.

    python jobs/calibration.py --folder RESULTS --write
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import raylux
from jobs import pages
from jobs import proximal_optimum as small
from raylux.calibrated import Calibration, agreements
from raylux.evaluate import Agreement
from raylux.verification import CalibrationOptions, VerifyOptions

NAME = "calibration"

KINDS = {
    "predicted": "EK-FAC, uncalibrated",
    "calibrated": "EK-FAC × the run's slope",
    "solved": "better solves (`pcg`)",
    "whole copy": "whole copy, first order",
    "whole copy, by leverage": "whole copy, by leverage along the step",
    "whole copy, by RIF's leverage": "whole copy, by RIF's leverage",
}


def _sizes(settings: small.Settings) -> dict[str, object]:
    return {
        "vocab_size": len(small.LETTERS),
        "hidden_size": settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": 2,
        "max_position_embeddings": settings.length,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def llama(settings: small.Settings) -> PreTrainedModel:
    """A gated MLP without biases, RMS norms."""
    return LlamaForCausalLM(LlamaConfig(intermediate_size=3 * settings.width, **_sizes(settings)))


def neox(settings: small.Settings) -> PreTrainedModel:
    """MLP beside attention, biases."""
    return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=4 * settings.width, **_sizes(settings)))


FAMILIES: dict[str, Callable[[small.Settings], PreTrainedModel]] = {"gpt2": small.gpt2, "llama": llama, "neox": neox}


@dataclass(frozen=True)
class Settings:
    """What is tried.

    Attributes:
        seed: of texts, weights and the order of training.
        train: N. queries: held-out texts. top, random: sequences measured, as of ``raylux verify``.
        length, width, layers, steps: as of jobs/proximal_optimum.py.
        dose: copies of the smaller pair. products: with G, for calibration and of each sequence's better solve.
    """

    seed: int = 0
    train: int = 384
    queries: int = 10
    top: int = 1
    random: int = 4
    length: int = 24
    width: int = 12
    layers: int = 2
    steps: int = 400
    dose: float = 0.05
    products: int = 15


@dataclass(frozen=True)
class Outcome:
    """Of one family."""

    family: str
    loss: float
    parameters: int
    calibration: Calibration
    found: dict[str, Agreement]
    linear: int
    below: int
    leverage: float


def study(settings: Settings, family: str, folder: Path) -> Outcome:
    """Train, attribute, calibrate, verify."""
    own = small.Settings(
        settings.seed, settings.train, length=settings.length, width=settings.width, layers=settings.layers,
        steps=settings.steps,
    )  # fmt: skip
    drawn = small.Settings(settings.seed, settings.train + settings.queries, length=settings.length)
    texts = small._texts(drawn, np.random.default_rng(settings.seed))
    train = texts[: settings.train]
    asked = small._questions(texts, range(settings.train, len(texts)))
    tokenizer = small._tokenizer(settings.length)
    rows = [tokenizer(text)["input_ids"] for text in train]
    model = small._train(own, rows, FAMILIES[family])
    with torch.no_grad():
        tokens = torch.tensor(rows)
        loss = float(model(input_ids=tokens, labels=tokens).loss)
    overrides = [f"score.train_size={len(train)}", "query.max_error=0", "score.token_top=0"]
    run = raylux.attribute(model, tokenizer, train, asked, folder=folder / family, overrides=overrides)
    run = raylux.calibrate(run, CalibrationOptions(settings.queries, products=settings.products))
    assert run.calibration is not None
    options = VerifyOptions(
        settings.queries, settings.top, settings.random, settings.dose, products=settings.products, seed=settings.seed
    )
    frame = raylux.verify(run, options).verification()
    parameters = int(run.settings["model"]["parameters"] * run.settings["model"]["share"])
    return Outcome(
        family, loss, parameters, run.calibration, agreements(frame), int(frame["linear"].sum()),
        int((~frame["resolved"]).sum()), float(frame["leverage"].mean()),
    )  # fmt: skip


def table(outcomes: Sequence[Outcome]) -> str:
    """A row per family and kind of prediction."""
    lines = ["| family | prediction | pairs | slope (90 %) | R² |", "| --- | --- | --- | --- | --- |"]
    for outcome in outcomes:
        for kind, name in KINDS.items():
            if kind in outcome.found:
                one = outcome.found[kind]
                slope = f"{one.slope.value:.2f} ({one.slope.low:.2f} to {one.slope.high:.2f})"
                lines.append(f"| {outcome.family} | {name} | {one.pairs} | {slope} | {one.r_squared:.3f} |")
    return "\n".join(lines)


def runs(outcomes: Sequence[Outcome]) -> str:
    """A row per family: the model, and what calibrating said."""
    lines = [
        "| family | tracked weights | loss per character | slope by better solves (90 %) | residual | d_eff / N "
        "| mean leverage | linear |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for o in outcomes:
        slope, pairs = o.calibration.agreement.slope, o.found["predicted"].pairs
        lines.append(
            f"| {o.family} | {o.parameters:,} | {o.loss:.2f} | {slope.value:.2f} ({slope.low:.2f} to {slope.high:.2f}) "
            f"| {o.calibration.queries['residual'].max():.1e} | {o.calibration.share:.2f} | {o.leverage:.3f} "
            f"| {o.linear} of {pairs} |"
        )
    return "\n".join(lines)


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Whether what is wanted is met, by family."""
    said = []
    for outcome in outcomes:
        for kind in ("calibrated", "solved"):
            one = outcome.found[kind]
            met = 0.8 <= one.slope.value <= 1.25 and one.r_squared >= 0.85
            said.append(f"- {outcome.family}, {KINDS[kind]}: {'met' if met else '**missed**'}")
    return "\n".join(said)


def page(settings: Settings, outcomes: Sequence[Outcome], command: str) -> str:
    """docs/results/calibration.md."""
    return f"""# Nats that come true: calibrated predictions against the proximal optimum

    {command}

A character model of {settings.layers} layers, width {settings.width}, of each family is trained for {settings.steps}
steps on N = {settings.train} openings of Wikipedia articles of {settings.length} characters. The queries are
{settings.queries} held-out openings (f = log p of the last three quarters), so that every pair of query and sequence is
a cross pair: no query is among the texts. Measured are the {settings.top} sequence(s) of the largest influence on each
query and {settings.random} drawn at random, each on all queries, by `raylux.verify`: the proximal optimum of all MLP
weights in float64 at the run's λ (0.1 × mean Λ) and N, in doses of ±{settings.dose:g} and
±{3 * settings.dose:g} copies and of a whole copy. `raylux.calibrate` and the better solves take at most
{settings.products} products with the exact Gauss-Newton matrix.

{table(outcomes)}

The slope is measured change per predicted change, least squares through the origin; its interval is a bootstrap over
queries and sequences together. R² is the square of Pearson's correlation. Wanted: slope 0.8 to 1.25 and R² ≥ 0.85.

{verdict(outcomes)}

## The runs

{runs(outcomes)}

## How to read it

- **A slope puts the size right, and nothing else**: R² is that of EK-FAC's order, which one number cannot better.
  Nor is it one number for all pairs: of the pairs measured here most are the best of some query, of those that the run
  is calibrated on only half, and the first have the larger slope.
- **Better solves** put right each pair by itself: they take the products of the query, or of the sequence, to G.
- **A whole copy** is a finite step. *Leverage along the step* divides by 1 + h, h = xᵀH_z x / (N xᵀ(G + λ)x) with the
  sequence's own Gauss-Newton matrix H_z; *RIF's leverage* takes ∇log p ∇log pᵀ for H_z
  (`raylux/evaluate/sizes.py`).
- *Linear*: the change per copy at the larger doses is within 10 % of that at the smaller ones.
- The models are tiny. What holds here is the formula and the machinery; the slope is another on another model, which
  is why it is measured on the run itself.
"""


def measured(options: dict[str, Any], command: str) -> pages.Page:
    """Run the families."""
    folder, families = options.pop("folder"), options.pop("families")
    settings, outcomes = Settings(**options), []
    for family in families:
        outcomes.append(study(settings, family, folder))
        print(table(outcomes[-1:]), runs(outcomes[-1:]), sep="\n", flush=True)
    return pages.Page(page(settings, outcomes, command))


def main(arguments: Sequence[str] | None = None) -> int:
    """The study as a program."""
    parser = pages.parser(__doc__, NAME, fields(Settings), folder="run folders go here")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    return pages.run(parser, arguments, NAME, measured)


if __name__ == "__main__":
    sys.exit(main())
