"""What each method says of the model that was trained on all texts: scores [Q, N]."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

import raylux
from jobs.lds.retrain import FIRST_SEED
from jobs.lds.study import Study
from raylux import prefilter
from raylux.combined import Combined
from raylux.curvature import KINDS
from raylux.demo.training import train_model
from raylux.errors import UserError

EKFAC = "ekfac"
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


@dataclass(frozen=True)
class Checkpoint:
    """A model after an epoch, and the learning rate of the step before."""

    model: PreTrainedModel
    rate: float


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
    """Every kind of curvature on the last model, and the exact solve; two of them over checkpoints; BM25."""
    points = train(study)
    last = points[-1].model
    # A joint kind is for fewer weights than these models have.
    kinds = [kind.name for kind in KINDS.values() if not kind.joint]
    methods = [_timed(kind, WHAT.get(kind, kind), partial(scores, study, last, folder / kind, kind)) for kind in kinds]
    solved = partial(scores, study, last, folder / "pcg", EKFAC, ["curvature.solver=pcg"])
    methods.append(_timed("ekfac, pcg", "the exact Gauss-Newton matrix at the same λ, by preconditioned CG", solved))
    methods.append(_timed("TracIn", f"dot products by learning rate over {len(points)} epochs' models",
                          lambda: _weighted(study, points, folder / "tracin", "identity")))  # fmt: skip
    level = [Checkpoint(point.model, 1 / len(points)) for point in points]
    methods.append(_timed("ekfac, averaged", f"mean over {len(points)} epochs' models",
                          lambda: _weighted(study, level, folder / "averaged", EKFAC)))  # fmt: skip
    methods.append(_timed("bm25", "shared tokens, no model", lambda: prefiltered(study, "bm25")))
    return methods


def train(study: Study) -> list[Checkpoint]:
    """The model of all texts after each of the last epochs."""
    kept: list[Checkpoint] = []
    settings = study.settings.training(FIRST_SEED)

    def watch(epoch: int, rate: float, model: PreTrainedModel) -> None:
        if epoch > settings.epochs - CHECKPOINTS:
            copy = type(model)(model.config)
            copy.load_state_dict(model.state_dict())
            kept.append(Checkpoint(copy.eval(), rate))

    train_model(study.texts, study.tokenizer, settings, watch=watch)
    return kept


def scores(study: Study, model: PreTrainedModel, folder: Path, kind: str, overrides: Sequence[str] = ()) -> np.ndarray:
    """raylux's scores [Q, N], in the order of the texts."""
    return array(study, run(study, model, folder, kind, overrides))


def run(study: Study, model: PreTrainedModel, folder: Path, kind: str, overrides: Sequence[str] = ()) -> raylux.Run:
    """Every text scored for every query; unless overridden, dense, without tokens, in the raw unit."""
    options = [f"curvature.kind={kind}", "query.max_error=0", "score.token_top=0", "score.unit=raw", *overrides]
    train = [{"text": text, "id": _id(place)} for place, text in enumerate(study.texts)]
    return raylux.attribute(model, study.tokenizer, train, study.asked, folder=folder, overrides=options)


def _id(place: int) -> str:
    return f"{place:06d}"


def array(study: Study, found: raylux.Run | Combined) -> np.ndarray:
    """Its scores [Q, N], in the order of the study's queries and texts.

    Raises:
        UserError: a text was too long for the model, and was cut in pieces.
    """
    queries, ids = [query["id"] for query in study.asked], [_id(place) for place in range(len(study.texts))]
    if found.scores().sizes["sequence"] != len(ids):
        raise UserError(f"lds: some texts have more tokens than the model's context; raise --vocabulary "
                        f"({study.settings.vocabulary})")  # fmt: skip
    return found.scores().sel(query=queries, sequence=ids).to_numpy().astype(np.float64)


def _weighted(study: Study, points: Sequence[Checkpoint], folder: Path, kind: str) -> np.ndarray:
    runs = [run(study, point.model, folder / str(place), kind) for place, point in enumerate(points)]
    return array(study, raylux.combine(runs, [point.rate for point in points]))


def prefiltered(study: Study, kind: str) -> np.ndarray:
    """A prefilter's score of every text for each query, [Q, N]."""
    rows = study.tokenizer(study.texts, add_special_tokens=False)["input_ids"]
    tokens, offsets = np.concatenate(rows), np.cumsum([0, *map(len, rows)])
    asked = [query["prompt"] + query["completion"] for query in study.asked]
    queries = [np.asarray(row) for row in study.tokenizer(asked, add_special_tokens=False)["input_ids"]]
    return prefilter.score_all(kind, tokens, offsets, len(study.tokenizer), queries)


def _timed(name: str, what: str, make: Callable[[], np.ndarray]) -> Method:
    began = time.process_time()
    return Method(name, what, make(), time.process_time() - began)
