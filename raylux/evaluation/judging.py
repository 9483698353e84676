"""Each test: what the estimators say, held against what was measured or planted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from raylux.evaluate import Judgement, detection, ranked, recall, reciprocal_ranks
from raylux.evaluate.datamodel import interval
from raylux.evaluation.bench import LEVEL, NOBODY, Bench, repeats, seeds
from raylux.evaluation.estimators import by_prefilter
from raylux.evaluation.inputs import mislabelled, relevant
from raylux.evaluation.outcome import Curve
from raylux.evaluation.singles import loo, pbrf
from raylux.prefilter import KINDS

# Shares of a corpus at which curves have a point.
_POINTS = 60


def lds(bench: Bench) -> None:
    """Random subsets: do scores add up to what models of other training sets say?"""
    inputs, random = bench.inputs, bench.draw(1)
    count, size = len(inputs.sequences), round(inputs.chosen.share * len(inputs.sequences))
    members = np.zeros((inputs.chosen.subsets, count), bool)
    for row in members:
        row[random.choice(count, size, replace=False)] = True
    measured = bench.retraining.answers([np.flatnonzero(~row) for row in members], "models of subsets")
    bench.add(
        "lds",
        "LDS",
        "linear datamodeling score: Spearman's ρ over random subsets between the sum of a subset's scores and the "
        "measurement after training on it, mean over queries",
        bench.judged(members, measured.mean(1)),
    )
    bench.found.notes["lds"] = (
        f"{len(members)} random subsets of {size} of {count} sequences, {seeds(measured.shape[1])} each. "
        + repeats(measured)
        + f" Over the subsets a query's measurement has a standard deviation of {measured.mean(1).std(0).mean():.3g}."
    )


def removal(bench: Bench) -> None:
    """Each query's most and least influential sequences left out: what becomes of its measurement?"""
    chosen, scores = bench.inputs.chosen, bench.scores
    count = min(chosen.queries or len(bench.inputs.queries), len(bench.inputs.queries))
    asked = [(name, query) for name in scores for query in range(count)]
    best = [np.sort(ranked(scores[name][query])[: chosen.remove]) for name, query in asked]
    worst = [np.sort(ranked(-scores[name][query])[: chosen.remove]) for name, query in asked]
    measured = bench.retraining.answers([NOBODY, *best, *worst], "models for removal").mean(1)
    whole, without = measured[0], measured[1:]
    for sign, part, figure, what in (
        (-1, without[: len(asked)], "proponents", "falls by so many nats without its {} highest scores (QLD, −DEL+)"),
        (1, without[len(asked) :], "opponents", "rises by so many nats without its {} lowest scores (DEL−)"),
    ):
        moved = {name: np.zeros(count) for name in scores}
        for (name, query), values in zip(asked, part, strict=True):
            moved[name][query] = sign * (values[query] - whole[query])
        bench.add("removal", figure, f"a query's measurement {what.format(chosen.remove)}", bench.means(moved))
    bench.found.notes["removal"] = (
        f"Of {count} queries, each trained without the {chosen.remove} sequences of its own; {chosen.seeds} seeds, the "
        "same with and without: initial weights and batches are alike, so that these sequences alone differ."
    )


def planted(bench: Bench) -> None:
    """Sequences that were planted for a query: are they what it puts first?"""
    top, there = bench.inputs.chosen.top, relevant(bench.inputs)
    bench.add(
        "planted",
        f"recall@{top}",
        f"share of the sequences marked with a query's id that are among its {top} best, mean over queries",
        bench.means({name: recall(one, there, top) for name, one in bench.scores.items()}),
    )
    bench.add(
        "planted",
        "MRR",
        "mean over queries of 1 / rank of the first sequence marked with its id",
        bench.means({name: reciprocal_ranks(one, there) for name, one in bench.scores.items()}),
    )
    sizes = _shares(there.shape[1])
    lines = {
        name: (sizes / there.shape[1], np.array([np.nanmean(recall(one, there, int(size))) for size in sizes]))
        for name, one in bench.scores.items()
    }
    bench.found.curves.append(
        Curve("planted", "planted sequences found", "share of the corpus looked at", "share found", lines, True)
    )
    bench.found.notes["planted"] = (
        f"{int(there.any(1).sum())} of {len(there)} queries have marked sequences, "
        f"{there.sum(1)[there.any(1)].mean():.3g} on average. To find them is not the aim of influence, which asks "
        "what would change the model."
    )


def wrong(bench: Bench) -> None:
    """Sequences with wrong labels: are they those that hurt what the queries measure?"""
    marked = mislabelled(bench.inputs)
    random, draws = bench.draw(3), bench.inputs.chosen.draws
    # An estimator's view of a sequence: how much it lowers the queries' measurements on the whole; and how much only
    # itself teaches the model what it says.
    suspicion = {name: -one.mean(0) for name, one in bench.scores.items()}
    suspicion |= {f"{name}, self": one.own for name, one in bench.scored.items() if one.own is not None}
    found = {name: detection(one, marked) for name, one in suspicion.items()}
    places = _resampled(marked, random, draws)
    drawn = {
        name: np.array([detection(one[rows], marked[rows]).area for rows in places]) for name, one in suspicion.items()
    }
    bench.add(
        "mislabelled",
        "AUC",
        "chance that a mislabelled sequence comes before another one (0.5: by chance): by how much it lowers the "
        "queries' measurements, or by its self-influence",
        _differences({name: one.area for name, one in found.items()}, drawn, bench.inputs.against),
    )
    sizes = _shares(len(marked))
    lines = {name: (sizes / len(marked), one.found[sizes - 1]) for name, one in found.items()}
    bench.found.curves.append(
        Curve("mislabelled", "mislabelled sequences found", "share of the corpus looked at", "share found", lines)
    )
    tenth = ", ".join(f"{name} {one.at(0.1):.0%}" for name, one in found.items())
    bench.found.notes["mislabelled"] = (
        f"{int(marked.sum())} of {len(marked)} sequences are mislabelled; found after looking at a tenth: {tenth}. "
        "Queries should be right: sequences are suspected by their mean score, the lowest first; or (self) by their "
        "self-influence, the largest first."
    )


def _resampled(marked: np.ndarray, random: np.random.Generator, draws: int) -> list[np.ndarray]:
    """Rows drawn again, the marked among themselves and the others among themselves."""
    parts = np.flatnonzero(marked), np.flatnonzero(~marked)
    return [np.concatenate([random.choice(part, len(part)) for part in parts]) for _ in range(draws)]


def _differences(value: Mapping[str, float], drawn: Mapping[str, np.ndarray], against: str) -> Judgement:
    return Judgement(
        {name: interval(value[name], drawn[name], LEVEL) for name in value},
        {name: interval(value[name] - value[against], drawn[name] - drawn[against], LEVEL) for name in value},
    )


def candidates(bench: Bench) -> None:
    """What a prefilter would have kept of each query's best sequences."""
    inputs, top = bench.inputs, bench.inputs.chosen.top
    count = len(inputs.sequences)
    size = min(inputs.config.prefilter.top, max(1, count // 10))
    best = {name: _best(one, top) for name, one in bench.scores.items()}
    own = inputs.config.prefilter.kind
    for kind in KINDS:
        narrowed = by_prefilter(inputs, kind)
        bench.add(
            "prefilter",
            f"{kind}, {size}",
            f"share of a query's {top} best of all {count:,} that are among the {size:,} candidates of {kind}",
            bench.means({name: recall(narrowed, one, size) for name, one in best.items()}),
        )
        if kind == (KINDS[0] if own == "none" else own):
            sizes = _shares(count)
            lines = {
                name: (sizes / count, np.array([_share_kept(narrowed, one, int(size)).mean() for size in sizes]))
                for name, one in best.items()
            }
            title = f"the {top} best sequences that {kind} keeps"
            bench.found.curves.append(Curve("prefilter", title, "candidates, share of the corpus", "kept", lines, True))


def _best(scores: np.ndarray, top: int) -> np.ndarray:
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, ranked(scores)[:, :top], True, 1)
    return found


def _share_kept(narrowed: np.ndarray, best: np.ndarray, size: int) -> np.ndarray:
    return np.take_along_axis(best, ranked(narrowed)[:, :size], 1).sum(1) / best.sum(1)


def _shares(count: int) -> np.ndarray:
    """Numbers of sequences at which a curve has a point: 1, 2, …, at most ``_POINTS`` of them."""
    return np.unique(np.round(np.geomspace(1, count, _POINTS)).astype(np.int64))


TESTS: dict[str, Callable[[Bench], None]] = {
    "lds": lds,
    "removal": removal,
    "loo": loo,
    "pbrf": pbrf,
    "planted": planted,
    "mislabelled": wrong,
    "prefilter": candidates,
}
