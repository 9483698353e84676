"""The study's page and plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jobs.lingual.measures import TOP, Scored, mean, ratio
from jobs.lingual.study import BEST, DOT, EKFAC, FILTERS, Outcome, Settings, Size
from jobs.lingual.subjects import LANGUAGES, PROBES, Drawn
from jobs.plots import pyplot
from raylux.evaluate.datamodel import Estimate

# Weights of the smallest model of Grosse et al. 2023.
_LEAST = 810e6
NAMES = {EKFAC: "EK-FAC", DOT: "gradient dot product", "idf": "TF-IDF", "bm25": "BM25"}


def rows(drawn: Drawn, outcomes: Mapping[Size, Outcome], filters: Mapping[str, np.ndarray]) -> dict[str, Scored]:
    """Row of a table -> scores: the methods by size, then what knows no model."""
    found = {
        f"{NAMES[kind]} | {size}": Scored(drawn, one.scores[kind])
        for kind in (EKFAC, DOT)
        for size, one in outcomes.items()
    }
    return found | {f"{NAMES[kind]} |": Scored(drawn, filters[kind]) for kind in FILTERS}


def page(
    settings: Settings, drawn: Drawn, outcomes: Mapping[Size, Outcome], filters: Mapping[str, np.ndarray], command: str
) -> str:
    """docs/results/cross-lingual.md."""
    made = rows(drawn, outcomes, filters)
    return f"""# Influence across languages, by the size of the model

    {command}

{settings.each:,} Wikipedia leads in each of English, French and Spanish (their first {settings.characters} characters)
train Llamas of {len(outcomes)} sizes for {settings.epochs} epochs each, with one tokenizer of all (vocabulary
{settings.vocabulary:,}). A query is a lead; f = log p of its last three quarters. EK-FAC on the MLP layers, and dot
products of the same layers' gradients; every sequence is scored, no prefilter. Seed {settings.seed}. In brackets 90 %
of a bootstrap over queries, or over subjects where that is said.

A *twin* is the lead about the same subject in another language, found by an equal title. Two people wrote the two: it
is no translation, and both have the name in common, often years and other names too.

{_models(drawn, outcomes)}

## Is the twin found?

{len(drawn.held)} queries, {settings.held} of each language, that were not trained on; their two twins were. Each number
is a place between 0 (last) and 1 (first), 0.5 is chance: the area under the ROC curve of the one against the others.

- *Twin, its language*: the twin among all the other leads of its language.
- *Twin, at home*: the twin among the leads of the query's own language and topic.
- *Topic, own language*: leads of the query's topic among the other leads of its language.
- *Topic, other language*: leads of the twin's topic among the other leads of its language, without the twin.

| scores | width × layers | twin, its language | twin, at home | topic, own language | topic, other language |
| --- | --- | --- | --- | --- | --- |
{_table(made, _found)}

Mean influence of the same, in nats per copy (EK-FAC):

| width × layers | twin | other leads of its language | query's own language and topic |
| --- | --- | --- | --- |
{_in_nats(drawn, outcomes, Scored.sizes)}

## Is it the name?

{len(drawn.apart)} subjects that were trained on in no language; each query is scored against four sequences in another
language that were not trained on either: its twin, the twin with another subject's name in the place of its own, the
other subject's lead with this one's name, and that lead as it is. How often each is above the last (chance 0.5),
bootstrap over subjects:

| scores | width × layers | {" | ".join(PROBES[:-1])} |
| --- | --- | --- | --- | --- |
{_table(made, lambda one: [str(mean(part)) for part in one.names().T])}

Mean influence in nats per copy (EK-FAC):

| width × layers | {" | ".join(PROBES)} |
| --- | --- | --- | --- | --- |
{_in_nats(drawn, outcomes, Scored.probes)}

## What is left of the best sequences in another language?

As Grosse et al. 2023 ask it: the {TOP} best sequences of a query's language (training sequences), and their influence
on the same subject's lead in another language, over that on the query; the {len(drawn.apart)} subjects apart, bootstrap
over subjects. Beside it their influence on another subject's query in that language, and in their own.

| scores | width × layers | same subject, other language | other subject, other language | other subject, own language |
| --- | --- | --- | --- | --- |
{_table(_sized(made), _left)}

## Where is the influence, by language?

Mean share of each language in the positive influence on a query (a third of the sequences each).

| scores | width × layers | queries in | {" | ".join(LANGUAGES)} |
| --- | --- | --- |{" --- |" * len(LANGUAGES)}
{_languages(_sized(made))}

## Layers

Share of each block's MLP in the influence (EK-FAC) of a query's {BEST} best sequences, those of its own language and
those of the others; mean over all {len(drawn.queries)} queries.

| width × layers | sequences | {" | ".join(f"block {place}" for place in range(_blocks(outcomes)))} |
| --- | --- |{" --- |" * _blocks(outcomes)}
{_by_block(outcomes)}

![What is left in another language, and whether the twin is found](cross-lingual.png)

## How to read it

- These models are at the low end: the smallest of Grosse et al. has {_LEAST / _largest(outcomes):,.0f} times the
  weights of the largest here, which know {sum(len(lead.text) for lead in drawn.train) / 1e6:.2f} million characters.
  What they saw grow from 0.8 to 52 billion weights cannot be seen here. What can be is where the curve begins, and how
  much of it is shared names.
- Subjects were found by equal titles, so that every pair has its name in common, and most are people, places and loan
  words. Pairs whose names differ, which are most of a language, are not here.
- EK-FAC is fitted on the {len(drawn.train):,} training sequences and the {len(drawn.probes)} probes together.
- One seed of subjects, weights and batches for each size; the intervals are over queries and say nothing of other
  seeds.
"""


def _largest(outcomes: Mapping[Size, Outcome]) -> int:
    return max(one.parameters[1] for one in outcomes.values())


def _sized(made: Mapping[str, Scored]) -> dict[str, Scored]:
    """Those whose scores have a sign: of a model."""
    return {name: one for name, one in made.items() if not name.startswith(tuple(NAMES[kind] for kind in FILTERS))}


def _models(drawn: Drawn, outcomes: Mapping[Size, Outcome]) -> str:
    """How well each model knows each language."""
    asked = np.array([lead.language for lead in drawn.queries])
    characters = np.array([len(lead.text) - len(lead.text) // 4 for lead in drawn.queries])
    lines = [
        "| width × layers | parameters | of them tracked | " + " | ".join(f"−log p, {one}" for one in LANGUAGES) + " |"
    ]
    lines.append("| --- | --: | --: |" + " --: |" * len(LANGUAGES))
    for size, one in outcomes.items():
        bits = -one.logprob / characters
        said = " | ".join(f"{bits[asked == language].mean():.2f}" for language in LANGUAGES)
        lines.append(f"| {size} | {one.parameters[1]:,} | {one.parameters[0]:,} | {said} |")
    return (
        "\n".join(lines) + "\n\n−log p: nats per character of the queries' completions, none of which was trained on."
    )


def _table(made: Mapping[str, Scored], cells: Callable[[Scored], list[str]]) -> str:
    return "\n".join(f"| {name} | {' | '.join(cells(one))} |" for name, one in made.items())


def _found(one: Scored) -> list[str]:
    values = one.twins(), one.twins_at_home(), one.topics(abroad=False), one.topics(abroad=True)
    return [str(mean(value)) for value in values]


def _left(one: Scored) -> list[str]:
    left = one.left()
    return [str(ratio(left[:, place], left[:, 0])) for place in (1, 2, 3)]


def _in_nats(drawn: Drawn, outcomes: Mapping[Size, Outcome], values: Callable[[Scored], np.ndarray]) -> str:
    """Means of some influences of each size."""
    found = {size: values(Scored(drawn, one.scores[EKFAC])) for size, one in outcomes.items()}
    return "\n".join(f"| {size} | {' | '.join(map(_nats, own.T))} |" for size, own in found.items())


def _nats(values: np.ndarray) -> str:
    found = mean(values)
    return f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def _languages(made: Mapping[str, Scored]) -> str:
    return "\n".join(
        f"| {name} | {language} | {' | '.join(str(mean(part)) for part in shares.T)} |"
        for name, one in made.items()
        for language, shares in one.languages().items()
    )


def _blocks(outcomes: Mapping[Size, Outcome]) -> int:
    return max(one.blocks.shape[2] for one in outcomes.values())


def _by_block(outcomes: Mapping[Size, Outcome]) -> str:
    lines = []
    for size, one in outcomes.items():
        for place, what in enumerate(("own language", "other languages")):
            cells = [str(mean(share)) for share in one.blocks[:, place].T]
            cells += [""] * (_blocks(outcomes) - len(cells))
            lines.append(f"| {size} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(drawn: Drawn, outcomes: Mapping[Size, Outcome], filters: Mapping[str, np.ndarray], path: Path) -> None:
    """What is left in another language, and the twin's place, by the size of the model.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    sizes = [one.parameters[1] for one in outcomes.values()]
    for kind, colour in ((EKFAC, "#c44e52"), (DOT, "#4c72b0")):
        made = [Scored(drawn, one.scores[kind]) for one in outcomes.values()]
        for place, style, what in ((1, "-", "same subject"), (2, ":", "other subject")):
            found = [ratio(one.left()[:, place], one.left()[:, 0]) for one in made]
            _curve(left, sizes, found, colour, style, f"{NAMES[kind]}, {what}")
        _curve(right, sizes, [mean(one.twins()) for one in made], colour, "-", NAMES[kind])
    for kind, colour in zip(FILTERS, ("#55a868", "#8172b3"), strict=True):
        place = mean(Scored(drawn, filters[kind]).twins()).value
        right.axhline(place, color=colour, linewidth=1, linestyle="--", label=NAMES[kind])
    left.axhline(0, color="#333333", linewidth=0.8)
    left.set_ylabel("influence left in another language; 90 %")
    right.axhline(0.5, color="#333333", linewidth=0.8)
    right.set_ylabel("twin's place in its language; 90 %")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("parameters of the model")
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curve(axes: Any, x: list[int], found: list[Estimate], colour: str, style: str, label: str) -> None:
    middle = [one.value for one in found]
    sides = [[one.value - one.low for one in found], [one.high - one.value for one in found]]
    axes.errorbar(x, middle, yerr=sides, color=colour, linestyle=style, fmt="o", markersize=3, capsize=2, label=label)
