"""Choices of layers where head and word embedding are two matrices, so that each can be tracked."""

from __future__ import annotations

from pathlib import Path

from jobs.lds.methods import EKFAC, Make, checkpoints, of, over, prefiltered, tracking
from jobs.lds.study import Study

_ATTENTION, _MLP, _HEAD, _WORDS = "*.self_attn.*", "*.mlp.*", "lm_head", "model.embed_tokens"

LAYERS = {
    "": ("MLPs", [_MLP]),
    "head": ("head", [_HEAD]),
    "MLP and head": ("MLPs and head", [_MLP, _HEAD]),
    "attention, MLP and head": ("attention, MLPs and head", [_ATTENTION, _MLP, _HEAD]),
    "words": ("word embedding", [_WORDS]),
    "everything": ("attention, MLPs, head and word embedding", [_ATTENTION, _MLP, _HEAD, _WORDS]),
}
"""Choice of layers -> what it is, in a few words, and its patterns."""
# The word embedding has no curvature; without it a dot product of its gradients is what there is.
_KINDS = {
    EKFAC: ("EK-FAC", ["", "head", "MLP and head", "attention, MLP and head"]),
    "identity": ("gradient dot product", ["", "head", "words", "everything"]),
    "cosine": ("gradient cosine", ["head", "words"]),
}
# TracIn of the last layer, and of the first (TracIn-WE).
_TRACIN = ["head", "words"]


def makers(study: Study, folder: Path) -> dict[str, tuple[str, Make]]:
    """Name -> what it is, in a few words, and how its scores are made."""
    found: dict[str, tuple[str, Make]] = {}
    for kind, (what, choices) in _KINDS.items():
        for choice in choices:
            name = f"{kind}, {choice}" if choice else kind
            layers, patterns = LAYERS[choice]
            found[name] = f"{what}: {layers}", of(study, folder / _place(name), kind, tracking(patterns))
    dots = f"dot products by learning rate over {checkpoints(study)} epochs' models"
    for choice in _TRACIN:
        name, (layers, patterns) = f"TracIn, {choice}", LAYERS[choice]
        found[name] = f"{dots}: {layers}", over(study, folder / _place(name), "identity", True, tracking(patterns))
    found["bm25"] = "shared tokens, no model", lambda _: prefiltered(study, "bm25")
    return found


def _place(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")
