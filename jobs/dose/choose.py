"""The sets: what each method would train on to change a query, by its scores of the model that was trained on all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

import raylux
from jobs.dose.study import Members, Study, members, weights_of
from jobs.kept import Arrays, kept
from jobs.lds import methods
from jobs.lds import peer as peers
from raylux.demo.training import train_model
from raylux.ledger import QUERY
from raylux.store import RunFolder

EKFAC, AVERAGED, PCG, PEER, BM25, DOT = "ekfac", "averaged", "pcg", "kronfluence", "bm25", "dot"
RANDOM = "random"
# Epochs whose models the average is taken over: the last ones.
CHECKPOINTS = 3


@dataclass(frozen=True)
class Kind:
    """Of a method.

    Attributes:
        what: in the page's words.
        nats: its scores predict nats; otherwise they order and no more.
        ours: it is raylux's way to judge influence, and is to be better than BM25 and the peer.
    """

    what: str
    nats: bool
    ours: bool = False


KINDS = {
    EKFAC: Kind("raylux, EK-FAC", nats=True, ours=True),
    AVERAGED: Kind(f"raylux, EK-FAC, mean over the last {CHECKPOINTS} epochs' models", nats=True, ours=True),
    PCG: Kind("raylux, EK-FAC and preconditioned CG", nats=True, ours=True),
    PEER: Kind("kronfluence, EK-FAC", nats=True),
    BM25: Kind("BM25", nats=False),
    DOT: Kind("gradient dot product", nats=False),
}


@dataclass(frozen=True)
class Base:
    """The model of all texts.

    Attributes:
        weights: [epochs, P] after each of the last epochs.
        damping: λ of each tracked layer, as raylux's EK-FAC run had it.
    """

    weights: np.ndarray
    damping: dict[str, float]


def base(study: Study, folder: Path) -> Base:
    """Train it, or read it."""
    weights = kept(folder / "base.npz", partial(_trained, study))["weights"]
    damping = kept(folder / "damping.npz", partial(_damping, study, weights[-1], folder))
    return Base(weights, {layer: float(value) for layer, value in damping.items()})


def _damping(study: Study, weights: np.ndarray, folder: Path) -> Arrays:
    found = run(study, study.model(weights), folder / "runs" / EKFAC, "ekfac")
    # λ is the layer's, the same in every unit of queries.
    manifest = next(iter(RunFolder(found.folder).units(QUERY).values()))
    return {layer: np.float64(value) for layer, value in manifest.meta["damping"].items()}


def _trained(study: Study) -> Arrays:
    found: list[np.ndarray] = []

    def watch(epoch: int, rate: float, model: PreTrainedModel) -> None:
        if epoch > study.settings.epochs - CHECKPOINTS:
            found.append(weights_of(model))

    # Weighted by ones: the very computation of the other models, not the unweighted loss that rounds otherwise.
    texts = study.drawn.texts
    train_model(texts, study.drawn.tokenizer, study.settings.training(), watch=watch, weights=[1.0] * len(texts))
    return {"weights": np.stack(found)}


def scores(study: Study, found: Base, folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Of each method [Q, N], in nats per copy where it has that unit."""
    runs, drawn = folder / "runs", study.drawn
    pcg = ["curvature.solver=pcg", f"curvature.iterations={study.settings.products}"]

    def model(place: int = -1) -> PreTrainedModel:
        return study.model(found.weights[place])

    def averaged() -> np.ndarray:
        places = range(len(found.weights))
        each = [run(study, model(place), runs / AVERAGED / str(place), "ekfac") for place in places]
        return methods.array(drawn, raylux.combine(each))

    makers: Mapping[str, Callable[[], np.ndarray]] = {
        EKFAC: lambda: methods.array(drawn, run(study, model(), runs / EKFAC, "ekfac")),
        AVERAGED: averaged,
        PCG: lambda: methods.array(drawn, run(study, model(), runs / PCG, "ekfac", pcg)),
        PEER: lambda: peer(study, model(), runs / PEER),
        BM25: lambda: methods.prefiltered(drawn, "bm25"),
        DOT: lambda: methods.array(drawn, run(study, model(), runs / DOT, "identity")),
    }
    found_of = {}
    for name in names:
        raw = kept(folder / "scores" / f"{name}.npz", lambda name=name: {"scores": makers[name]()})["scores"]
        found_of[name] = raw / len(drawn.texts) if KINDS[name].nats else raw
    return found_of


def run(study: Study, model: PreTrainedModel, folder: Path, kind: str, overrides: Sequence[str] = ()) -> raylux.Run:
    """raylux's run of a kind."""
    # Training leaves its truncation behind in the tokenizer, which would be another one to a run that goes on.
    study.drawn.tokenizer.backend_tokenizer.no_truncation()
    return methods.run(study.drawn, model, folder, kind, overrides)


def peer(study: Study, model: PreTrainedModel, folder: Path) -> np.ndarray:
    """kronfluence's EK-FAC on the layers that raylux tracks, labels sampled and λ as its defaults have it.

    Returns:
        [Q, N] in raylux's sign and unit ``raw``.

    Raises:
        UserError: kronfluence is not installed.
    """
    return peers.scores(model, study.rows, study.parts, folder)


def best(scores: np.ndarray, size: int) -> list[Members]:
    """Of each query the sequences with the largest scores; of equals the first."""
    return [members(np.argsort(-own, kind="stable")[:size]) for own in scores]
