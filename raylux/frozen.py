"""What a run folder was made from, which of it may still change, and what has to be computed again where it does.

Every key of a config belongs to the earliest stage whose numbers it reaches. While nothing of that stage, or of
one that reads it, is committed, the key is free; after that a change is refused unless the stage is restarted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raylux.config import Config
from raylux.errors import UserError
from raylux.fingerprints import ModelPrint
from raylux.ledger import (
    ANSWER,
    ASIDE,
    CALIBRATION,
    CANDIDATES,
    CONTRACTION,
    COVARIANCE,
    EIGEN,
    FREEDOM,
    LABELS,
    LEVERAGE,
    MOMENTS,
    PROBE,
    PRODUCT,
    PROJECTED,
    QUARANTINE,
    QUERIES,
    QUERY,
    SCORE,
    SNAPSHOT,
    SOLVE,
    SQUARES,
    TAKEN,
    TOKENS,
    VERIFIED,
    WAVES,
)
from raylux.shown import redacted_values
from raylux.store import RunFolder

RESTARTABLE = ("corpus", "fit", "prefilter", "query", "score")

# What each stage leaves in the ledger, what is read by others last: removed in this order, a kill in between leaves
# a folder that lacks something, never one with something that rests on what is gone.
_LEDGER = {
    "corpus": ("corpus",),
    "fit": (PROJECTED, MOMENTS, EIGEN, COVARIANCE, LABELS, SNAPSHOT, CONTRACTION),
    "prefilter": (CANDIDATES,),
    "query": (VERIFIED, LEVERAGE, CALIBRATION, FREEDOM, QUERY, SOLVE, PRODUCT, PROBE, QUERIES),
    "score": (ANSWER, TAKEN, ASIDE, TOKENS, SQUARES, SCORE, WAVES),
}
# Stage -> those that fall with it, the last reader first.
_FALLS = {
    "corpus": ("score", "query", "prefilter", "fit", "corpus"),
    "fit": ("score", "query", "fit"),
    "prefilter": ("prefilter",),
    # An id may stand for another question then: its candidates and scores are of the old one.
    "query": ("score", "prefilter", "query"),
    "score": ("score",),
}

# Keys that change no number that is stored: where things are, who computes, what is shown.
_FREE = frozenset(
    {
        "run.folder",
        "model.path",  # the weights are compared, wherever they lie
        "model.adapter",  # likewise
        "corpus.path",  # the documents are
        "model.device",  # resolved, then compared
        "model.device_map",  # the same operations, wherever the weights are
        "model.checkpointing",  # the same operations, some of them twice
        "model.strict",
        "model.trust_remote_code",
        "queries.path",
        "fit.snapshot",
        "fit.passes",
        "prefilter.kind",
        "prefilter.top",
        "score.unit",
        "score.train_size",
        "score.layers",
        "score.self_influence",
        "score.token_top",
        "score.best",
        "score.recall",
        "engine.backend",
        "engine.workers",
        "engine.shards",
        "engine.gpus_per_worker",
        "engine.worker_labels",
        "engine.shard_labels",
        "engine.timeout",
        "engine.keep_captured",
    }
)
_OWN = {"model.tokenizer": "corpus", "model.task": "corpus"} | {
    f"curvature.{key}": "query"
    for key in ("damping", "segment", "solver", "iterations", "tolerance", "scale", "step", "batch")
}
_SECTIONS = {"corpus": "corpus", "query": "query", "score": "score", "evaluate": None}


def stage_of(key: str) -> str | None:
    """The earliest stage whose numbers a key of the config reaches; None: it reaches none."""
    if key in _FREE:
        return None
    return _OWN.get(key) or _SECTIONS.get(key.partition(".")[0], "fit")


def holds(folder: RunFolder, stage: str) -> bool:
    """Whether anything is computed that falls with a stage; to know the queries is to have computed nothing yet."""
    known = (QUERIES, TAKEN, ASIDE)
    ledgers = [ledger for fallen in _FALLS[stage] for ledger in _LEDGER[fallen] if ledger not in known]
    return any(folder.committed(ledger) for ledger in ledgers)


def falls(restart: str | None) -> frozenset[str]:
    """The stages that a restart computes again."""
    return frozenset(_FALLS[restart]) if restart else frozenset()


def check_stage_name(restart: str | None) -> None:
    """Raises UserError where there is no such stage to restart."""
    if restart is not None and restart not in RESTARTABLE:
        raise UserError(f"--restart {restart}: no such stage; one of {', '.join(RESTARTABLE)}")


def drop(folder: RunFolder, restart: str) -> None:
    """Take what a restart computes again out of the ledger."""
    dropped = [ledger for stage in _FALLS[restart] for ledger in _LEDGER[stage]]
    folder.drop(dropped)
    for unit, manifest in folder.units(QUARANTINE).items():
        if manifest.meta["stage"] in dropped:
            folder.forget(QUARANTINE, unit)


class Frozen:
    """Refuses what a run folder does not allow to change.

    Args:
        folder: the run.
        known: what its run.yaml says.
        restart: the stage that is to be computed again, if one is.
    """

    def __init__(self, folder: RunFolder, known: Mapping[str, Any], restart: str | None) -> None:
        self._folder, self._known, self._falls = folder, known, falls(restart)

    def check_config(self, config: Config) -> None:
        """Raises UserError where a key differs that may not."""
        before = self._known["config"]
        for section, keys in redacted_values(config.dump()).items():
            for key, value in keys.items():
                stage, was = stage_of(f"{section}.{key}"), before.get(section, {}).get(key)
                if key not in before.get(section, {}):  # a folder that was made before the key was known
                    was = type(getattr(config, section)).model_fields[key].get_default(call_default_factory=True)
                if stage is not None and was != value:
                    self._refuse(stage, f"{section}.{key} is {was!r} there and {value!r} here", "set it back")

    def check_model(self, now: ModelPrint) -> None:
        """Raises UserError where the model or its tokenizer is not the one that the run was made with."""
        try:
            before = ModelPrint.load(self._known["model"])
        except (KeyError, TypeError):
            raise UserError(f"{self._folder.path}/run.yaml: damaged, it does not say what the model was") from None
        for stage, change in (
            ("corpus", before.tokenizer_changed(now)),
            ("fit", before.weights_changed(now)),
            ("fit", before.config_changed(now)),
            ("fit", before.code_changed(now)),
        ):
            if change:
                self._refuse(stage, change, "bring the old model back")

    def check_device(self, before: str, now: str) -> None:
        """Raises UserError where the run was made on another kind of device."""
        if before != now:
            self._refuse("fit", f"made on {before}, model.device is now {now}", f"set model.device={before}")

    def check_source(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Raises UserError where the corpus's files are not those that were read."""
        # Where the content is known it is compared, wherever it lies.
        names = ("files", "content") if "content" in before and "content" in now else ("path", "files", "content")
        differ = [name for name in names if before.get(name) != now.get(name)]
        if differ:
            what = "; ".join(f"{name} {before.get(name)}, now {now.get(name)}" for name in differ)
            self._refuse("corpus", f"the corpus's files changed ({what})", "bring them back")

    def check_queries(self, changed: str | None) -> None:
        """Raises UserError where an id stands for another question: ``changed`` is that id."""
        if changed is not None and "query" not in self._falls:
            raise self._refusal(
                "query", f"query '{changed}' is not the one known there by this id", "give it another id"
            )

    def _refuse(self, stage: str, what: str, instead: str) -> None:
        if stage not in self._falls and holds(self._folder, stage):
            raise self._refusal(stage, what, instead)

    def _refusal(self, stage: str, what: str, instead: str) -> UserError:
        again = [name for name in RESTARTABLE if name in _FALLS[stage]]
        return UserError(
            f"{self._folder.path} holds another run: {what}; {instead}, choose another run.folder, or add "
            f"--restart {stage} (computes {', '.join(again)} again)"
        )
