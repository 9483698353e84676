"""The study's page."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

from jobs.dose.choose import BM25, DOT, EKFAC, KINDS, PEER, RANDOM
from jobs.dose.judge import Outcome, counts, in_nats
from jobs.dose.study import COLD, DOSES, PROXIMAL, WARM, Settings
from raylux.evaluate import Agreement, Estimate

NAMES = {RANDOM: "at random", **{name: kind.what for name, kind in KINDS.items()}}
DIGITS = {COLD: 2, WARM: 2, PROXIMAL: 3}
WAYS = {COLD: "trained from the start", WARM: "trained on", PROXIMAL: "proximal optimum"}


def page(settings: Settings, found: Outcome, command: str) -> str:
    """docs/results/dose-curve.md."""
    sets, seconds = found.sets, found.measured.seconds
    return f"""# The dose curve: chosen sequences trained on less and more

    {command}

{settings.train:,} Wikipedia leads (their first {settings.characters} characters) train a Llama of {settings.layers}
layers, width {settings.width}, vocabulary {settings.vocabulary:,}, for {settings.epochs} epochs; {settings.queries}
held-out leads are the queries (f = log p of the last three quarters). For each query every method chooses the
{settings.size} sequences with its largest scores; {settings.random} more sets are drawn at random and serve all
queries. Queries, random sets, sizes, doses and methods were fixed before anything was scored. Then models are trained
with a dose of a set: −1 copy (taken away), +1 and +4 copies of each of its sequences.
{_count(found)}

**Common random numbers.** A model with a dose starts at the same weights as the one without, and sees the same batches
in the same order; a sequence of the set counts 1 + dose times in the loss of its batch (0: it keeps its place and adds
nothing), divided by the same number of tokens. Models differ by the dose alone.

{_explained(settings, found)}

![Change of a query by a dose of its own set](dose-curve.png)

## What a dose does

Mean change of f of a query by a dose of its own set, in nats; in brackets 90 % of a bootstrap over queries.

{"".join(doses(found, way) for way in found.ways)}
## Against BM25, the dot product and the peer

By how much more a method's sets move their queries in the direction of the dose than the other's do, query by query:
mean of the differences in nats ± its standard error, and in brackets the one over the other. Wanted is +2 and more.

{gaps(found, found.retrained)}

{verdict(found, found.retrained)}

## Is it the query's own set?

Mean change by +1 copy of a query's own set, and by the sets that the same method chose for the other queries: what is
in both is not about the query.

{_elsewhere(found)}

## Predicted against measured

Slope: measured per predicted nat, least squares through the origin, with 90 % of a bootstrap. *Own*: each query with
its own set (means in nats, and the slope over queries). *All*: every set, whoever chose it, with every query, drawn
again together; R² is the square of Pearson's correlation. BM25 and the dot product have no unit, and so no slope.

{slopes(found)}

## How to read it

- The prediction is of first order and for the MLP weights alone, at a proximal optimum. Training from the start or on
  changes all weights, for a number of steps and not to an optimum: its size may be another, its order should hold.
- A standard error is over queries: it says what other queries of this kind would give on this model and this seed, not
  what other models would.
- A set chosen by two methods is trained once. Differences are paired by query, so what doses of any set do to all
  queries falls out of them.
{proximal(found)}- CPU seconds per model, median and longest: {spent(seconds)}.
- The {len(sets.members):,} sets are {overlap(found)}.
"""


def _title(way: str) -> str:
    return WAYS[way][0].upper() + WAYS[way][1:]


def _count(found: Outcome) -> str:
    units = {COLD: "models from the start", WARM: "models trained on", PROXIMAL: "sets at the proximal optimum"}
    counts = [f"{len(found.measured.seconds[way]):,} {units[way]}" for way in found.ways]
    left = ", ".join(WAYS[way] for way in DOSES if way not in found.ways)
    return f"In all: {', '.join(counts)}." + (f" Not measured: {left}." if left else "")


def _explained(settings: Settings, found: Outcome) -> str:
    said = {
        COLD: f"all {settings.epochs} epochs.",
        WARM: f"{settings.warm_epochs} more epochs from the trained model at a rate of up to {settings.warm_rate:g}, "
        "against a model that is trained on as long without a dose.",
        PROXIMAL: f"the short form, for the sets of the first {settings.proximal} queries: MLP weights only, in "
        "float64, at raylux's λ.",
    }
    return "\n".join(f"- *{_title(way)}*: {said[way]}" for way in found.ways)


def doses(found: Outcome, way: str) -> str:
    """What each dose does, a row for each method."""
    lines = [f"### {_title(way)}", "", f"| sets | {' | '.join(f'{dose:+g}' for dose in DOSES[way])} |"]
    lines.append("| --- |" + " --- |" * len(DOSES[way]))
    for name in found.rows:
        cells = [interval(found.mean(name, way, dose), digits=DIGITS[way]) for dose in DOSES[way]]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def against(found: Outcome) -> list[tuple[str, str]]:
    """(method, the other) that are held against each other."""
    others = [name for name in (BM25, DOT, PEER) if name in found.methods]
    return [(name, other) for other in others for name in found.rows if name != other]


def gaps(found: Outcome, ways: Sequence[str]) -> str:
    """By how much each method's sets move their queries more than another's do."""
    cells = [(way, dose) for way in ways for dose in DOSES[way]]
    lines = [f"| sets | against | {' | '.join(f'{way} {dose:+g}' for way, dose in cells)} |"]
    lines.append("| --- | --- |" + " --- |" * len(cells))
    for name, other in against(found):
        said = [found.more(name, other, way, dose).text(DIGITS[way]) for way, dose in cells]
        lines.append(f"| {NAMES[name]} | {NAMES[other]} | {' | '.join(said)} |")
    return "\n".join(lines)


def verdict(found: Outcome, ways: Sequence[str]) -> str:
    """For each of raylux's ways to choose: in how many doses it is ahead, or behind, by two standard errors."""
    said = []
    for name, other in against(found):
        if name != RANDOM and KINDS[name].ours:
            each = [found.more(name, other, way, dose) for way in ways for dose in DOSES[way]]
            ahead, behind = counts(each)
            word = "met in all" if ahead == len(each) else f"met in {ahead} of {len(each)}"
            more = f", **behind in {behind}**" if behind else ""
            default = " (the default)" if name == EKFAC else ""
            said.append(f"- {NAMES[name]}{default}, against {NAMES[other]}: {word}{more}")
    return "\n".join(said)


def _elsewhere(found: Outcome) -> str:
    lines = ["| sets | " + " | ".join(f"{way}, own | {way}, others'" for way in found.retrained) + " |"]
    lines.append("| --- |" + " --- |" * (2 * len(found.retrained)))
    for name in found.methods:
        cells = []
        for way in found.retrained:
            own, others = found.moved(name, way, 1.0), found.elsewhere(name, way, 1.0)
            cells += [f"{own.mean():+.2f}", f"{others.mean():+.2f}"]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def slopes(found: Outcome) -> str:
    """Measured per predicted, in every way that was measured."""
    lines = ["| scores | measured | dose | own: predicted, measured | own: slope | own: R² | all: slope | all: R² |"]
    lines.append("| --- |" + " --- |" * 7)
    for name in found.methods:
        sized = name in in_nats(found.methods)
        for way in found.ways:
            for dose in DOSES[way]:
                own = found.predicted_own(name, dose).mean(), found.mean(name, way, dose).value
                cells = [f"{own[0]:+.3g}, {own[1]:+.3g}" if sized else ""]
                for one in (found.own_slope(name, way, dose), found.all_pairs(name, way, dose)):
                    cells += [interval(one.slope, "") if sized else "", _r_squared(one)]
                lines.append(f"| {NAMES[name]} | {way} | {dose:+g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _r_squared(found: Agreement) -> str:
    return "–" if isnan(found.r_squared) else f"{found.r_squared:.3f}"


def interval(found: Estimate, sign: str = "+", digits: int = 2) -> str:
    """Value and interval."""
    value, low, high = (f"{x:{sign}.{digits}f}" for x in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})"


def proximal(found: Outcome) -> str:
    """How near to proportion the changes at the proximal optimum are, where there are any."""
    if PROXIMAL not in found.ways:
        return ""
    (odd, even), dose = found.linear(), DOSES[PROXIMAL][-1]
    return f"""- Whole copies of a set are no small step at the proximal optimum; there the doses are ±{dose:g}. Their
  changes have an odd part with an RMS of {odd:.3g} nats, and an even part of {even:.3g}: so far from proportion they
  are. What the searches left open is {found.noise():.1%} of what was measured, at the worse dose.
"""


def spent(seconds: dict[str, Sequence[float]]) -> str:
    """Median and longest of each way in which something was measured."""
    said = []
    for way, own in seconds.items():
        if len(own):
            ordered = sorted(own)
            said.append(f"{WAYS[way]} {ordered[len(ordered) // 2]:.1f} and {ordered[-1]:.1f}")
    return ", ".join(said)


def overlap(found: Outcome) -> str:
    """How much the methods' sets have in common with EK-FAC's."""
    names = [name for name in found.methods if name != EKFAC]
    if EKFAC not in found.methods or not names:
        return "those of one method"
    said = []
    for name in names:
        pairs = zip(found.sets.own[EKFAC], found.sets.own[name], strict=True)
        shared = [len(set(found.sets.members[one]) & set(found.sets.members[other])) for one, other in pairs]
        said.append(f"{sum(shared) / len(shared):.1f} ({NAMES[name]})")
    return f"chosen alike in part: with raylux's EK-FAC a set shares on average {', '.join(said)} sequences"
