"""What is compared: what each method says of the model that was trained on all texts, and what that takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from jobs.kept import Arrays, kept
from jobs.lds import peer, segments, trackstar
from jobs.lds.methods import EKFAC, combined, prefiltered, scores, unit_length
from jobs.lds.study import Study
from jobs.lds.trained import train
from raylux.curvature import KINDS

PEER = "kronfluence"
# Epochs whose models TracIn and the average are taken over: the last ones.
CHECKPOINTS = 4


@dataclass(frozen=True)
class Method:
    """Scores of a method.

    Attributes:
        name: in the tables.
        what: in a few words.
        scores: [Q, N].
        seconds: that it took, the training of the model left out.
    """

    name: str
    what: str
    scores: np.ndarray
    seconds: float


WHAT = {
    "ekfac": "K-FAC's basis, Λ measured",
    "kfac": "Kronecker product of token covariances",
    "tekfac": "TKFAC's basis, Λ measured",
    "tkfac": "token covariances weighted by one another's traces",
    "eshampoo": "Shampoo's basis, Λ measured",
    "shampoo": "Kronecker product of sequences' GᵀG and GGᵀ",
    "diagonal": "Fisher matrix's diagonal",
    "identity": "gradient dot product",
    "cosine": "gradient cosine",
}


def all_methods(study: Study, folder: Path) -> list[Method]:
    """Every kind of curvature on the last model, and the exact solve; three of them over checkpoints; TrackStar; BM25;
    and where it is installed, kronfluence."""
    epochs = train(study)
    points = epochs[-CHECKPOINTS:]
    last = points[-1].model
    # A joint kind is for fewer weights than these models have.
    kinds = [kind.name for kind in KINDS.values() if not kind.joint]
    makers = {kind: (WHAT.get(kind, kind), partial(scores, study, last, folder / kind, kind)) for kind in kinds}
    rates = [point.rate for point in points]
    makers |= {
        "ekfac, pcg": (
            "the exact Gauss-Newton matrix at the same λ, by preconditioned CG",
            partial(scores, study, last, folder / "pcg", EKFAC, ["curvature.solver=pcg"]),
        ),
        "TracIn": (
            f"dot products by learning rate over {len(points)} epochs' models",
            partial(combined, study, points, folder / "tracin", "identity", rates),
        ),
        "ekfac, averaged": (
            f"mean over {len(points)} epochs' models",
            partial(combined, study, points, folder / "averaged", EKFAC),
        ),
        "SOURCE": (
            f"EK-FAC over {segments.SEGMENTS} segments of the training, one rate for AdamW's of all weights",
            partial(segments.scores, study, epochs, folder / "source", EKFAC, adapted=True),
        ),
        "SOURCE, plain rates": (
            "the same as if the training had been SGD with AdamW's rates",
            partial(segments.scores, study, epochs, folder / "source-plain", EKFAC, adapted=False),
        ),
        "bm25": ("shared tokens, no model", partial(prefiltered, study, "bm25")),
    }
    for kind in ("diagonal", EKFAC):
        what = f"{kind}'s scores over the roots of self-influences (RelatIF)"
        makers[f"{kind}, unit length"] = what, partial(unit_length, study, last, folder / f"{kind}-unit", kind)
    for size in trackstar.SIZES:
        makers[f"TrackStar, {size}"] = (
            f"gradients over the roots of AdamW's moments, projected to {size} by {size}, whitened, of unit length",
            partial(trackstar.scores, last, points[-1].moments, study.rows, study.parts, size),
        )
    if peer.is_installed():
        theirs = partial(peer.scores, last, study.rows, study.parts, folder / "peer")
        makers[PEER] = ("its own EK-FAC, labels drawn by itself", theirs)
    return [_kept(folder / "scores", name, *made) for name, made in makers.items()]


def _kept(folder: Path, name: str, what: str, make: Callable[[], np.ndarray]) -> Method:
    """A method, with its scores and what they cost: as ``make`` finds them, or as they lie in the folder."""

    def timed() -> Arrays:
        began = time.process_time()
        found = make()
        return {"scores": found, "seconds": np.float64(time.process_time() - began)}

    arrays = kept(folder / f"{name.replace(', ', '-')}.npz", timed)
    return Method(name, what, arrays["scores"], float(arrays["seconds"]))
