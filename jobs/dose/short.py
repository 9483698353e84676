"""The page of the study's short form: the proximal optimum alone."""

from __future__ import annotations

from jobs.dose.judge import Outcome
from jobs.dose.page import doses, gaps, overlap, proximal, slopes, spent, verdict
from jobs.dose.study import DOSES, PROXIMAL, Settings


def page(settings: Settings, found: Outcome, command: str) -> str:
    """docs/results/dose-proximal.md."""
    dose, ways = DOSES[PROXIMAL][-1], [PROXIMAL]
    return f"""# The dose curve's short form: chosen sequences at the proximal optimum

    {command}

Texts, model, queries, methods and sets are those of [the dose curve](dose-curve.md): {settings.train:,} Wikipedia leads
train a Llama of {settings.layers} layers, width {settings.width}, and for each held-out query every method chooses the
{settings.size} sequences with its largest scores. In the place of training with a dose of a set stands what influence
is defined by: the proximal optimum of the MLP weights, in float64, at raylux's λ and N, with ±{dose:g} copies of a set.
Measured are the sets of the first {settings.proximal} queries, and as many drawn at random:
{len(found.measured.seconds[PROXIMAL])} in all, each on all {settings.queries} queries.

## What a dose does

Mean change of f of a query by a dose of its own set, in nats, over the first {settings.proximal} queries (at random:
over all of them); in brackets 90 % of a bootstrap over queries.

{doses(found, PROXIMAL)}
## Against BM25, the dot product and the peer

By how much more a method's sets move their queries in the direction of the dose than the other's do, query by query:
mean of the differences in nats ± its standard error, and in brackets the one over the other.

{gaps(found, ways)}

Ahead by two standard errors or more:

{verdict(found, ways)}

## Predicted against measured

Slope: measured per predicted nat, least squares through the origin, with 90 % of a bootstrap. *Own*: each of the first
queries with its own set. *All*: every measured set, whoever chose it, with all {settings.queries} queries. R² is the
square of Pearson's correlation. BM25 and the dot product have no unit, and so no slope.

{slopes(found)}

## How to read it

{proximal(found)}- {settings.proximal} queries are few: a standard error of so many differences is itself uncertain.
- CPU seconds of a set in both doses, median and longest: {spent(found.measured.seconds)}.
- All sets, of all {settings.queries} queries, are {overlap(found)}.
"""
