"""Where retraining parts from what influence predicts: the five gaps of Bae et al. 2022, in the queries' measurements.

From a model that is trained anew without a sequence (cold) to one that goes on without it (warm), to one that goes on
but is held near the scored weights (proximal), to the proximal Bregman optimum (PBRF), to its linearisation, to what
an estimator says. The paper takes the distance of outputs over the training set; here it is that of f.
"""

from __future__ import annotations

import numpy as np

from raylux.evaluate.datamodel import spearman
from raylux.evaluation.bench import Bench, answers
from raylux.evaluation.optimum import Removed

_OPTIMUM = "proximal optimum"
_TRAINED = ("1: cold to warm", "2: warm to proximal", "3: proximal to PBRF")


def add(bench: Bench, rows: np.ndarray, found: Removed) -> None:
    """What each measured truth says of one estimator, and the gaps from one truth to the next.

    Args:
        bench: where both ``loo`` and ``pbrf`` are asked for.
        rows: that were left out one by one.
        found: at the proximal optimum.
    """
    damping = bench.scored[bench.inputs.against].damping
    cold, warm = (answers(bench, rows, "cold"), answers(bench, rows, "warm"))
    near = answers(bench, rows, "proximal", damping)
    _ordering(bench, rows, found, cold, warm)
    _gaps(bench, rows, found, [cold[:, 0], warm[:, 0], near[:, 0]])


def _ordering(bench: Bench, rows: np.ndarray, found: Removed, cold: np.ndarray, warm: np.ndarray) -> None:
    """Spearman's ρ of the estimator that others are compared with, by what it is held against."""
    own = bench.inputs.chosen.scored == "trained"
    truths = {_OPTIMUM: found.change, "warm": _effect(warm[:, 0])}
    # A model that was given has a seed of its own, which nobody knows.
    truths["cold, same seed" if own else "cold"] = _effect(cold[:, 0])
    if own and cold.shape[1] > 1:
        truths["cold, another seed"] = _effect(cold[:, 1])
    predicted = -bench.scores[bench.inputs.against][:, rows].T
    bench.add(
        "pbrf",
        "by truth",
        f"Spearman's ρ of minus the scores of {bench.inputs.against} and what the same removals do: at the proximal "
        "optimum, to a model that goes on without, to one that is trained anew; one training each, mean over queries",
        bench.compared({name: (predicted, measured) for name, measured in truths.items()}, spearman, _OPTIMUM),
        rows="truth",
        against=_OPTIMUM,
    )


def _gaps(bench: Bench, rows: np.ndarray, found: Removed, trained: list[np.ndarray]) -> None:
    """Distances from one truth to the next.

    Args:
        bench: as of ``add``.
        rows: likewise.
        found: likewise.
        trained: f [1 + n, Q] of cold, warm and proximal models, the first with all sequences.
    """
    solved = np.isfinite(found.linear).all()
    told = {name: -one.scores[:, rows].T for name, one in bench.scored.items() if one.unit == "nats"}
    for figure, what, chain, start in (
        ("gaps", "measurements", [one[1:] for one in trained], found.before),
        ("gaps of effects", "changes of measurements by the removal", [_effect(one) for one in trained], 0.0),
    ):
        chain = [*chain, start + found.change]
        pairs = {name: (chain[place], chain[place + 1]) for place, name in enumerate(_TRAINED)}
        if solved:
            chain = [*chain, start + found.linear]
            pairs["4: PBRF to linearised"] = chain[-2], chain[-1]
        last = "5: linearised" if solved else "4 + 5: PBRF"
        pairs |= {f"{last} to {name}": (chain[-1], start + one) for name, one in told.items()}
        bench.add(
            "pbrf",
            figure,
            f"how far {what} are from one truth to the next, in nats: root mean square over sequences and queries",
            bench.compared(pairs, _distance, _TRAINED[-1]),
            rows="gap",
            against=_TRAINED[-1],
        )
    bench.found.notes["pbrf, gaps"] = (
        "Gaps are those of Bae et al. 2022, there in the outputs over the training set, here in f, by the first seed: "
        "(1) cold to warm start; (2) the tracked weights alone go on, held by λ/2 of the squared distance; (3) from "
        "where that training ends to the optimum for the model's own predictions (PBRF), which is the effect of not "
        "having converged; (4) to the exact solve of the linearised objective, f linear too; (5) to an estimator."
        + ("" if solved else " That solve did not come to its end: (4) and (5) are one.")
    )


def _effect(answers: np.ndarray) -> np.ndarray:
    """What a removal does, of f [1 + n, Q] of which the first is with all sequences."""
    return answers[1:] - answers[0]


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.mean((one - other) ** 2)))
