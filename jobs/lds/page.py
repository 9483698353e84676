"""The study's page and plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.lds import segments
from jobs.lds.compared import PEER, Method
from jobs.lds.methods import EKFAC
from jobs.lds.study import Settings
from jobs.plots import pyplot
from raylux.evaluate import Judgement
from raylux.evaluate.datamodel import Estimate, agreement_of_repeats, ceiling

_ABSENT = """
kronfluence was not installed (`make peers`): its row is left out.
"""


@dataclass(frozen=True)
class Found:
    """What a study found.

    Attributes:
        settings: of it.
        methods: what was compared.
        judged: LDS of each, and by how much it is above EK-FAC's.
        measured: [S, repeats, Q] f after training on each subset.
    """

    settings: Settings
    methods: Sequence[Method]
    judged: Judgement
    measured: np.ndarray


def page(found: Found, apart: Found | None, command: str) -> str:
    """docs/results/datamodel.md.

    Args:
        found: of the model whose head is its word embedding.
        apart: of the one where these are two matrices; None: it was not asked for.
        command: that made it.
    """
    settings = found.settings
    absent = "" if any(method.name == PEER for method in found.methods) else _ABSENT
    return f"""# What other training sets would have done: the linear datamodeling score

    {command}

{settings.train:,} Wikipedia leads (their first {settings.characters} characters), {settings.queries} held-out ones as
queries (f = log p of the last three quarters). A Llama of {settings.layers} layers, width {settings.width}, with a
vocabulary of {settings.vocabulary:,}, is trained on all of them for {settings.epochs} epochs; and, from
{settings.repeats} seed{"s" * (settings.repeats != 1)} each, on {settings.subsets} random halves. A method predicts f
after training on a half by the sum of its scores there; LDS is Spearman's correlation over the halves between these
sums and f (the mean over the seeds), averaged over the queries. In brackets 90 % of a bootstrap over halves and
queries; differences are taken on the same draws.

![LDS by method](datamodel.png)

{_table(found)}
{absent}
## What could be reached

{_reachable(found.measured)}
{"" if apart is None else _apart(apart)}
## How to read it

- Scores are those of one model, trained on all texts with the first of the seeds; only the MLP layers are tracked, but
  where a row names others. In the first table the head shares its weight with the word embedding, so that neither can
  be tracked.
- LDS per cost: a row is on the frontier where no other has a higher LDS for as many CPU seconds as shown, or fewer.
- An interval of a difference that leaves out 0 is a difference on these texts and this model; other models may
  order methods otherwise.
- λ is a tenth of the mean eigenvalue of each layer throughout, but for SOURCE, which has none; it was not tuned for
  any method.
- SOURCE cuts the training into {segments.SEGMENTS} segments of as many epochs, for each of which the model at its end
  stands, with its own EK-FAC; in a row of its own the models after all of its epochs, of which the mean is taken (Bae
  et al. 2024 average the EK-FAC itself). Its theory is about gradient descent
  by one rate. AdamW has a rate for each weight: one stands for all, the root of the mean of its second moments over the
  tracked weights dividing it; beside that the formula with AdamW's rates as they are.
- TrackStar is raylux's kind of curvature of that name, with AdamW's own second moments: a projection by random signs
  from both sides of each layer, whitened by its second moment over the training texts alone (the paper may mix in the
  queries').
- kronfluence draws labels of its own; its layers and λ are raylux's.
- CPU seconds are those of scoring, on one thread, without training the model, as each row was first measured.
"""


def _apart(found: Found) -> str:
    settings = found.settings
    return f"""
## Head and word embedding as layers

The same texts and queries, a model of the same sizes whose head has weights of its own, so that it can be tracked and
the word embedding too: trained on all texts, and from {settings.repeats} seed{"s" * (settings.repeats != 1)} each on
{settings.subsets} random halves. The word embedding has no curvature in raylux: `identity` and `cosine` serve it, by
words that texts share (TracIn-WE).

{_table(found)}

{_reachable(found.measured)}
"""


def _table(found: Found) -> str:
    lds, above = found.judged.lds, found.judged.above
    best = frontier({method.name: (_cost(method), lds[method.name].value) for method in found.methods})
    rows = [
        f"| {method.name} | {method.what} | {lds[method.name]} | "
        f"{'' if method.name == EKFAC else _signed(above[method.name])} | {_cost(method)} | "
        f"{'frontier' if method.name in best else ''} |"
        for method in sorted(found.methods, key=lambda method: -lds[method.name].value)
    ]
    return "\n".join(
        [
            "| method | what | LDS | above EK-FAC | CPU, s | LDS per cost |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def _cost(method: Method) -> int:
    return round(method.seconds)


def frontier(priced: Mapping[str, tuple[int, float]]) -> set[str]:
    """Of methods with a cost and a value each: those that no other exceeds in value at their cost or less."""
    return {
        name
        for name, (cost, value) in priced.items()
        if not any(other <= cost and better > value for other, better in priced.values())
    }


def _reachable(measured: np.ndarray) -> str:
    spread = measured.mean(1).std(0).mean()
    if measured.shape[1] == 1:
        return f"Over the halves f of a query has a standard deviation of {spread:.2f} nats."
    alike = agreement_of_repeats(measured)
    return f"""Models of the same half that differ in their seed agree by a Spearman's ρ of {alike:.3f}: even the true
effect of a half would correlate with the mean of {measured.shape[1]} of them by about {ceiling(measured):.3f}. Over the
halves f of a query has a standard deviation of {spread:.2f} nats."""


def _signed(found: Estimate) -> str:
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def plot(judged: Mapping[str, Judgement], path: Path) -> None:
    """LDS of each method with its interval, a panel for each study, by its title.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    heights = [0.35 * len(one.lds) + 1.2 for one in judged.values()]
    figure, panels = plt.subplots(
        len(judged), sharex=True, squeeze=False, figsize=(7, sum(heights)), height_ratios=heights, layout="constrained"
    )
    for axes, (title, one) in zip(panels[:, 0], judged.items(), strict=True):
        axes.set_title(title, loc="left", fontsize="medium")
        _bars(axes, one)
    panels[-1, 0].set_xlabel("linear datamodeling score, 90 % intervals")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axes: Any, judged: Judgement) -> None:
    order = sorted(judged.lds, key=lambda name: judged.lds[name].value)
    found = [judged.lds[name] for name in order]
    middle = [one.value for one in found]
    sides = [[one.value - one.low for one in found], [one.high - one.value for one in found]]
    colours = ["#c44e52" if name == EKFAC else "#4c72b0" for name in order]
    axes.barh(order, middle, color=colours, height=0.6)
    axes.errorbar(middle, order, xerr=sides, fmt="none", ecolor="#333333", elinewidth=1, capsize=3)
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
