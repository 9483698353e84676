"""Sequences that are left out one by one: what training says, and the optimum that influence is about."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from raylux.evaluate import agreement, ranked, slope
from raylux.evaluate.datamodel import pearson, spearman
from raylux.evaluation import decomposition
from raylux.evaluation.bench import LEVEL, Bench, answers, repeats
from raylux.evaluation.optimum import Removed
from raylux.evaluation.retraining import Way


def loo(bench: Bench) -> None:
    """Some sequences left out one by one, by training from the start and by going on without them."""
    inputs = bench.inputs
    rows = singled_out(bench.scores, inputs.chosen.sequences, bench.draw(2))
    left_out = -np.eye(len(inputs.sequences))[rows]
    ways: tuple[tuple[Way, str], ...] = ("cold", "trained from the start"), ("warm", "going on from the scored model")
    for figure, how in ways:
        measured = answers(bench, rows, figure)
        bench.add(
            "loo",
            figure,
            f"Spearman's ρ over left out sequences between minus the score and the measurement without it, {how}, "
            "mean over queries",
            bench.judged(left_out, measured[1:].mean(1)),
        )
        sizes = _sizes(bench, rows, measured.mean(1))
        bench.found.notes[f"loo, {figure}"] = repeats(measured[1:]) + sizes
    bench.found.notes["loo"] = (
        f"{len(rows)} sequences: half of them the best of the queries by each estimator in turn, the others drawn at "
        f"random; {inputs.chosen.seeds} seeds, the same with and without."
    )


def singled_out(scores: Mapping[str, np.ndarray], count: int, random: np.random.Generator) -> np.ndarray:
    """Rows, ascending: half of them the best of each query by each estimator in turn."""
    turns = np.concatenate([ranked(one).T.reshape(-1, 1, len(one)) for one in scores.values()], 1).reshape(-1)
    _, first = np.unique(turns, return_index=True)
    best = turns[np.sort(first)][: count // 2]
    rest = np.setdiff1d(np.arange(next(iter(scores.values())).shape[1]), best)
    return np.sort(np.concatenate([best, random.choice(rest, count - len(best), replace=False)]))


def _sizes(bench: Bench, rows: np.ndarray, measured: np.ndarray) -> str:
    """Measured per predicted, of estimators whose scores have a size."""
    change = (measured[1:] - measured[0]).T
    found = [
        f"{name} {agreement(-one.scores[:, rows], change, LEVEL, bench.inputs.chosen.draws).slope}"
        for name, one in bench.scored.items()
        if one.unit == "nats"
    ]
    return f" Measured per predicted nat: {'; '.join(found)}." if found else ""


def pbrf(bench: Bench) -> None:
    """The same sequences left out of the objective that influence linearises, its optimum found without doing so."""
    inputs = bench.inputs
    rows = singled_out(bench.scores, inputs.chosen.sequences, bench.draw(2))
    base = bench.scored[inputs.against]
    found = bench.retraining.removed(rows, base.damping, base.train_size)
    pairs = {name: (-one[:, rows].T, found.change) for name, one in bench.scores.items()}
    nats = {name: pairs[name] for name, one in bench.scored.items() if one.unit == "nats"}
    what = "between minus the score and the change of a query's measurement at the proximal optimum without a sequence"
    bench.add("pbrf", "Spearman", f"Spearman's ρ {what}, mean over queries", bench.compared(pairs, spearman))
    bench.add("pbrf", "Pearson", f"Pearson's r {what}, mean over queries", bench.compared(pairs, pearson))
    bench.add(
        "pbrf",
        "slope",
        "measured per predicted: change of measurements at the proximal optimum per nat of minus the score, over all "
        "sequences and queries (1: the right size; below 1: overstated)",
        bench.compared(nats, slope),
    )
    bench.found.notes["pbrf"] = (
        f"{len(rows)} sequences, those of loo. Measured in float64 on the scored model: argmin of the mean KL "
        f"divergence from its own predictions on all {len(inputs.sequences):,} sequences, less the sequence's loss "
        f"over N = {base.train_size:,}, plus λ/2 of the squared distance, in the tracked weights alone. λ and tracked "
        f"layers are those of '{inputs.against}', for all estimators.{_strangers(bench)}"
    )
    bench.found.notes["pbrf, search"] = _search(found)
    if "loo" in inputs.chosen.tests:
        decomposition.add(bench, rows, found)


def _search(found: Removed) -> str:
    moved, noise = (float(np.sqrt(np.mean(x**2))) for x in (found.change, found.noise))
    text = f"Measurements move by {moved:.3g} nats (RMS), which the search leaves open by {noise:.1g}. "
    lacking = int(np.isnan(found.linear).any(1).sum())
    if lacking:
        return (
            f"{text}The exact solve of the linearised objective did not come to its end for {lacking} of "
            f"{len(found.linear)} sequences, so there is nothing to be said of it."
        )
    exact = float(np.nanmean(spearman(found.linear, found.change)))
    return (
        f"{text}The exact solve of the linearised objective, which estimators approximate, reaches a ρ of {exact:.3f} "
        f"and a slope of {slope(found.linear, found.change):.3f}."
    )


def _strangers(bench: Bench) -> str:
    """Estimators in nats that are about another optimum."""
    own, said = bench.scored[bench.inputs.against].damping, []
    for name, one in bench.scored.items():
        if one.unit != "nats":
            continue
        if one.damping.keys() != own.keys():
            said.append(f"{name} tracks other layers")
            continue
        ratios = [one.damping[layer] / own[layer] for layer in own]
        if not np.allclose(ratios, 1, rtol=1e-3):
            said.append(f"{name} has {min(ratios):.3g} to {max(ratios):.3g} times that λ")
    return f" What they predict is another optimum: {'; '.join(said)}." if said else ""
