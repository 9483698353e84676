"""What is compared: what each method says of the model that was trained on all texts, and what that takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from jobs.kept import Arrays, kept
from jobs.lds import apart, peer, segments
from jobs.lds.methods import EKFAC, Epochs, Make, checkpoints, of, over, prefiltered, projected, tracking, unit_length
from jobs.lds.study import Study
from jobs.lds.trained import train
from raylux.curvature import KINDS

PEER = "kronfluence"
# Rows and columns that TrackStar projects a layer's gradients to.
PROJECTIONS = (16, 32)


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


LAYERS = {
    "attention": ("attention's layers in the place of the MLPs'", ["*.self_attn.*"]),
    "attention and MLP": ("attention's layers and the MLPs'", ["*.self_attn.*", "*.mlp.*"]),
    "last MLP": ("the last block's MLP alone", ["*.{last}.mlp.*"]),
    "down": ("the MLPs' second layers alone", ["*.mlp.down_proj"]),
}
"""Choice of layers -> what it is, in a few words, and its patterns, ``{last}`` being the last block's number; the
others track all MLPs."""


def all_methods(study: Study, folder: Path, without: Collection[str] = ()) -> list[Method]:
    """Every kind of curvature on the last model, and the exact solve; three of them over checkpoints; TrackStar; BM25;
    and where it is installed, kronfluence. Of a model whose head has weights of its own: choices of layers (``apart``).

    The model is trained where something is missing that is said of it. ``without``: names of those left out.
    """
    trained = cache(partial(train, study))
    makers = (_makers if study.settings.tied else apart.makers)(study, folder)
    return [_kept(folder / "scores", name, *made, trained) for name, made in makers.items() if name not in without]


def _makers(study: Study, folder: Path) -> dict[str, tuple[str, Make]]:
    """Name -> what it is, in a few words, and how its scores are made."""
    count = checkpoints(study)

    def source(place: str, adapted: bool, several: bool = False) -> Make:
        return lambda epochs: segments.scores(study, epochs, folder / place, EKFAC, adapted, several)

    def of_unit_length(kind: str) -> Make:
        return lambda epochs: unit_length(study, epochs[-1].model, folder / f"{kind}-unit", kind)

    def trackstar(size: int) -> Make:
        return lambda epochs: projected(study, epochs[-1], folder / f"trackstar-{size}", size)

    # A joint kind is for fewer weights than these models have; one that projects has rows of its own.
    kinds = [kind.name for kind in KINDS.values() if not kind.joint and not kind.projected]
    makers = {kind: (WHAT.get(kind, kind), of(study, folder / kind, kind)) for kind in kinds}
    exact = "the exact Gauss-Newton matrix at the same λ, by preconditioned CG"
    makers["ekfac, pcg"] = exact, of(study, folder / "pcg", EKFAC, "curvature.solver=pcg")
    for layers, (what, patterns) in LAYERS.items():
        place, last = folder / f"ekfac-{layers.replace(' ', '-')}", str(study.settings.layers - 1)
        chosen = tracking([pattern.replace("{last}", last) for pattern in patterns])
        makers[f"ekfac, {layers}"] = f"EK-FAC of {what}", of(study, place, EKFAC, chosen)
    dots = f"dot products by learning rate over {count} epochs' models"
    makers["TracIn"] = dots, over(study, folder / "tracin", "identity", True)
    makers["ekfac, averaged"] = f"mean over {count} epochs' models", over(study, folder / "averaged", EKFAC, False)
    parts = f"EK-FAC over {segments.SEGMENTS} segments of the training, one rate for AdamW's of all weights"
    makers["SOURCE"] = parts, source("source", adapted=True)
    whole = "the same, the models after all epochs of a segment standing for it"
    makers["SOURCE, all epochs"] = whole, source("source-epochs", adapted=True, several=True)
    plain = "the same as if the training had been SGD with AdamW's rates"
    makers["SOURCE, plain rates"] = plain, source("source-plain", adapted=False)
    for kind in ("diagonal", EKFAC):
        divided = f"{kind}'s scores over the roots of self-influences (RelatIF)"
        makers[f"{kind}, unit length"] = divided, of_unit_length(kind)
    for size in (size for size in PROJECTIONS if size <= study.settings.width):
        what = f"gradients over the roots of AdamW's moments, projected to {size} by {size}, whitened, of unit length"
        makers[f"TrackStar, {size}"] = what, trackstar(size)
    makers["bm25"] = "shared tokens, no model", lambda _: prefiltered(study, "bm25")
    if peer.is_installed():
        makers[PEER] = (
            "its own EK-FAC, labels drawn by itself",
            lambda epochs: peer.scores(epochs[-1].model, study.rows, study.parts, folder / "peer"),
        )
    return makers


def _kept(folder: Path, name: str, what: str, make: Make, trained: Callable[[], Epochs]) -> Method:
    """A method, with its scores and what they cost: as ``make`` finds them, or as they lie in the folder."""

    def timed() -> Arrays:
        epochs = trained()
        began = time.process_time()
        found = make(epochs)
        return {"scores": found, "seconds": np.float64(time.process_time() - began)}

    arrays = kept(folder / f"{name.replace(', ', '-')}.npz", timed)
    return Method(name, what, arrays["scores"], float(arrays["seconds"]))
