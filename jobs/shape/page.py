"""The page and the plot of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.lds.study import Settings
from jobs.plots import pyplot
from jobs.shape.blocks import block_shares
from jobs.shape.tails import Tail, tail, top_share
from raylux.evaluate.datamodel import pearson

# The tail: this part of all sequences.
TAIL = 0.01
# Sequences whose layers are looked at, and that a prefilter is to find.
BEST = 50
WANTED = 20
KEPT = 0.1


@dataclass(frozen=True)
class Found:
    """What was measured. Legend: Q queries, N sequences, L layers.

    Attributes:
        scores: [Q, N] influences in nats.
        layers: [Q, L, N] the same by layer.
        names: [L].
        dots: [Q, N] gradient dot products.
        filters: prefilter -> [Q, N] its scores.
        ranked: [ranks + 1, Q, n] scores of some sequences by rank, the last by all of s_test.
        ranks: those that were tried.
        logprob: [Q] of the completions.
    """

    scores: np.ndarray
    layers: np.ndarray
    names: Sequence[str]
    dots: np.ndarray
    filters: Mapping[str, np.ndarray]
    ranked: np.ndarray
    ranks: Sequence[int]
    logprob: np.ndarray

    def tails(self) -> list[Tail]:
        """Of each query."""
        count = max(3, round(TAIL * self.scores.shape[1]))
        return [tail(np.sort(row)[-count:]) for row in self.scores]

    def top_shares(self) -> np.ndarray:
        """[Q] what the best 1 % have of the positive influence."""
        return np.array([top_share(row) for row in self.scores])

    def correlations(self) -> np.ndarray:
        """[ranks, Q] Pearson's r of the scores at a rank with those of all of s_test."""
        whole = self.ranked[-1]
        return np.array([pearson(one.T, whole.T) for one in self.ranked[:-1]])

    def shared(self, other: np.ndarray, best: int, among: int) -> np.ndarray:
        """[Q] share of the ``best`` by influence that are among the best by other scores."""
        pairs = zip(self.scores, other, strict=True)
        return np.array([len({*np.argsort(-a)[:best]} & {*np.argsort(-b)[:among]}) / best for a, b in pairs])

    def by_block(self) -> np.ndarray:
        """[Q, blocks] share of each block in the influence of the best sequences of a query."""
        best = np.argsort(-self.scores, axis=1)[:, :BEST]
        rows = zip(self.layers, best, strict=True)
        return np.stack([block_shares(self.names, layers[:, places]) for layers, places in rows])


def page(settings: Settings, found: Found, command: str) -> str:
    """docs/results/influence-shape.md."""
    tails, shares = found.tails(), found.top_shares()
    count, kept = found.scores.shape[1], round(KEPT * found.scores.shape[1])
    heavier = sum(one.ratio > 0 and one.heavier < 0.05 for one in tails)
    plausible = sum(one.fit > 0.1 for one in tails)
    exponents = np.array([one.exponent for one in tails])
    correlations = found.correlations()
    ranks = "\n".join(
        f"| {rank} | {row.mean():.5f} | {row.min():.5f} |" for rank, row in zip(found.ranks, correlations, strict=True)
    )
    blocks = found.by_block()
    where = "\n".join(
        f"| {place} | {share.mean():.2f} | {share.min():.2f} to {share.max():.2f} |"
        for place, share in enumerate(blocks.T)
    )
    filters = "\n".join(
        f"| {name} | {found.shared(scores, WANTED, kept).mean():.2f} | {found.shared(scores, WANTED, kept).min():.2f} |"
        for name, scores in found.filters.items()
    )
    by_query = "\n".join(
        f"| {place} | {found.logprob[place]:.1f} | {shares[place]:.2f} | {row.max():.3f} | {np.mean(row > 0.1):.4f} | "
        f"{one.exponent:.2f} | {one.fit:.2f} | {one.ratio:+.1f} |"
        for place, (row, one) in enumerate(zip(found.scores, tails, strict=True))
    )
    return f"""# How influence is spread over sequences, layers and ranks

    {command}

A Llama of {settings.layers} layers, width {settings.width}, trained for {settings.epochs} epochs on {count:,} Wikipedia
leads (their first {settings.characters} characters), all of which are scored for {settings.queries} held-out ones
(f = log p of the last three quarters). EK-FAC on the MLP layers, every score computed, no prefilter.

![Tails, layers and ranks](influence-shape.png)

## Sequences

- The best 1 % carry {shares.mean():.0%} of a query's positive influence ({shares.min():.0%} to {shares.max():.0%});
  Grosse et al. have 12 to 52 % on a model of 22 billion parameters.
- The tail (the best {TAIL:.0%}, {tails[0].size} sequences) is heavier than an exponential on {heavier} of {len(tails)}
  queries (Vuong's test at 5 %), and a power law is plausible (p > 0.1) on {plausible}. Its exponent is
  {np.median(exponents):.1f} in the median ({exponents.min():.1f} to {exponents.max():.1f}); theirs are 2 to 4.3 on the
  best 0.01 % of millions.
- {found.shared(found.dots, BEST, BEST).mean():.0%} of the best {BEST} by EK-FAC are also among the best {BEST} by
  gradient dot product.

Of each query: log p; what the best 1 % carry; its largest influence in nats and the share above 0.1; of the tail, the
power law's exponent and p, and by how many standard deviations it is likelier than an exponential.

| query | log p | best 1 % | largest | above 0.1 | exponent | p | power law above exponential |
| --: | --: | --: | --: | --: | --: | --: | --: |
{by_query}

## Layers

Share of each block's MLP in the influence of a query's best {BEST} sequences:

| block | mean | least and greatest of a query |
| --: | --: | --- |
{where}

## Ranks

Pearson's correlation of the scores of {found.ranked.shape[2]} sequences, s_test of each layer cut to a rank, with those
of all of it; wanted at rank 32: 0.99 or more.

| rank | mean over queries | least |
| --: | --: | --: |
{ranks}

## What a prefilter would have missed

Share of the best {WANTED} by influence that are among the best {KEPT:.0%} by the prefilter:

| prefilter | mean over queries | least |
| --- | --: | --: |
{filters}
"""


def plot(found: Found, path: Path) -> None:
    """Tails on logarithmic axes, layers, ranks.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    count = found.scores.shape[1]
    for row in found.scores:
        positive = np.sort(row[row > 0])[::-1]
        left.loglog(positive, np.arange(1, len(positive) + 1) / count, color="#4c72b0", alpha=0.35, linewidth=1)
    left.axhline(TAIL, color="#333333", linewidth=0.8, linestyle=":")
    left.set_xlabel("influence x, nats")
    left.set_ylabel("share of sequences above x")
    blocks = found.by_block()
    middle.boxplot(blocks, tick_labels=[str(place) for place in range(blocks.shape[1])])
    middle.set_xlabel("block")
    middle.set_ylabel(f"share of influence, best {BEST}")
    lost = 1 - found.correlations()
    right.loglog(found.ranks, lost.mean(1), marker="o", color="#4c72b0", label="mean over queries")
    right.loglog(found.ranks, lost.max(1), marker="o", color="#c44e52", label="worst query")
    right.axhline(0.01, color="#333333", linewidth=0.8, linestyle=":")
    right.set_xlabel("rank of s_test in each layer")
    right.set_ylabel("1 − Pearson's r")
    right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
