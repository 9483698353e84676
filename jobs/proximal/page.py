"""docs/results/proximal-methods.md."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jobs.proximal.study import DOT, EKFAC, FEW, METHODS, Outcome, Settings

LISSA = tuple(name for name in METHODS if name.startswith("LiSSA"))
# By how much faster than LiSSA EK-FAC is to be.
FASTER = 10


def seconds(one: Outcome, method: str) -> float:
    """CPU seconds until the queries are solved. Of LiSSA its own alone: fitting gives it nothing but λ."""
    found = one.predicted[method]
    return found.solve if method in LISSA else found.fit + found.solve


def page(settings: Settings, outcomes: Sequence[Outcome], command: str) -> str:
    """The page as Markdown."""
    families = list(dict.fromkeys(one.family for one in outcomes))
    return f"""# Methods against the proximal optimum, and what each takes

    {command}

Character models of {settings.layers} layers, width {settings.width}, of each family, trained for {settings.steps} steps
on N = {settings.train} openings of Wikipedia articles of {settings.length} characters; {settings.seeds} seeds of texts,
weights and training. {settings.queries} held-out openings are the queries (f = log p of the last three quarters).
{settings.added} training sequences, drawn at random, get {settings.copies:g} of a copy each, and the change of every f
at the proximal optimum (float64, λ of the run: 0.1 × mean Λ) is held against each method's prediction.

{_table(outcomes, families)}

Pearson's correlation over the {settings.added} sequences of a query: mean over queries and seeds, in brackets the least
and the greatest mean of a seed. Seconds: CPU time of fitting the curvature (on all N sequences) and of solving the
queries, one thread, without what loading and storing take; medians over the seeds. LiSSA's are those of solving alone:
it takes nothing but λ from the fit. Its s is the smallest power of two with which it does not diverge; what trying the
others took is not counted. A product of LiSSA is over 32 drawn sequences.

{_verdict(outcomes, families)}

The searches ended where at most {max(one.left for one in outcomes):.0e} of the gradient was left.
"""


def _table(outcomes: Sequence[Outcome], families: Sequence[str]) -> str:
    lines = [
        "| family | method | Pearson | above the dot product, seeds | fit, s | solve, s | s of LiSSA |",
        "| --- | --- | --- | --- | --: | --: | --: |",
    ]
    for family in families:
        own = [one for one in outcomes if one.family == family]
        dots = [one.pearson(DOT).mean() for one in own]
        for method in METHODS:
            means = [float(one.pearson(method).mean()) for one in own]
            above = sum(mine > its for mine, its in zip(means, dots, strict=True))
            found = [one.predicted[method] for one in own]
            scales = ", ".join(f"{one.scale:g}" for one in found) if method in LISSA else ""
            lines.append(
                f"| {family} | {method} | {np.mean(means):.3f} ({min(means):.3f} to {max(means):.3f}) "
                f"| {'' if method == DOT else f'{above} of {len(own)}'} | {np.median([one.fit for one in found]):.2f} "
                f"| {np.median([one.solve for one in found]):.2f} | {scales} |"
            )
    return "\n".join(lines)


def _verdict(outcomes: Sequence[Outcome], families: Sequence[str]) -> str:
    """What is wanted, by family."""
    lines = []
    for family in families:
        own = [one for one in outcomes if one.family == family]
        ekfac, dot = (float(np.mean([one.pearson(name) for one in own])) for name in (EKFAC, DOT))
        lines.append(f"- {family}, EK-FAC above the dot product: {_said(ekfac > dot)} ({ekfac:.3f}, {dot:.3f})")
        lines += [_against(own, family, ours, method) for ours in (EKFAC, FEW) for method in LISSA]
    return "\n".join(lines)


def _against(own: Sequence[Outcome], family: str, ours: str, method: str) -> str:
    """Whether one of ours is as good as LiSSA, and by how much faster."""
    mine, its = (float(np.mean([one.pearson(name) for one in own])) for name in (ours, method))
    ratio = float(np.median([seconds(one, method) / seconds(one, ours) for one in own]))
    return (
        f"- {family}, {ours} against {method}: {ratio:.0f} times faster, wanted {FASTER}: {_said(ratio >= FASTER)}; "
        f"correlation as good: {_said(mine >= its)} ({mine:.3f}, {its:.3f})"
    )


def _said(met: bool) -> str:
    return "met" if met else "**missed**"
