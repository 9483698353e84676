"""Classifiers of texts: which models are, what their classes are called, and how a file names one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raylux.errors import UserError, shown
from raylux.modules import features_of

if TYPE_CHECKING:
    from torch import nn

TaskName = Literal["causal-lm", "classification", "module"]
Asked = Literal["auto", "causal-lm", "classification"]
NO_LABEL = -100


def task_named(config: Mapping[str, Any], label: str, asked: Asked = "auto") -> TaskName:
    """What a model's config.json says that the model is for.

    Args:
        config: as it was read.
        label: how the user called the model.
        asked: ``model.task``; ``auto``: by ``architectures``.

    Raises:
        UserError: it is for something else than raylux serves, or than was asked for.
    """
    from transformers.models.auto import modeling_auto as known

    kind, named = str(config.get("model_type")), config.get("architectures")
    built = named[0] if isinstance(named, list) and named else kind
    causal = kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = kind in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    both_ways = config.get("is_encoder_decoder", False)
    if asked == "classification" or (asked == "auto" and built in _classifiers()):
        if kind not in known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES or both_ways:
            raise UserError(f"{label}: raylux serves no classifier of sequences of type '{kind}'")
        if causal and not masked and config.get("pad_token_id") is None:
            # Those of causal models read the last token that is no padding.
            raise UserError(
                f"{label}: config.json has no pad_token_id, by which a classifier of type '{kind}' finds the end of a "
                "text; set it to the padding token that the model was trained with"
            )
        return "classification"
    # BERT's kin can be built as causal LMs, but such a checkpoint is one only if it was trained as a decoder.
    if not causal or (masked and not config.get("is_decoder", False)) or both_ways:
        raise UserError(
            f"{label}: '{built}' is not a causal language model, nor a classifier of sequences; raylux serves these two"
        )
    return "causal-lm"


@cache
def _classifiers() -> frozenset[str]:
    """Names of transformers' classes of classifiers of sequences."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    found: set[str] = set()
    for names in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        found.update([names] if isinstance(names, str) else names)
    return frozenset(found)


def is_classifier(model: nn.Module) -> bool:
    """Whether a model is one of transformers' classifiers of sequences."""
    return type(model).__name__ in _classifiers()


def classes_of(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the classes of a classifier, or of a module in memory, in the order of the logits; else None."""
    features = features_of(model)
    if features is not None:
        return features.classes
    return class_names(model.config) if is_classifier(model) else None


def class_names(config: Any) -> tuple[str, ...]:
    """As a model's config calls the classes."""
    return tuple(str(config.id2label[number]) for number in range(config.num_labels))


def check_classifier(config: Any, where: str) -> None:
    """Raises UserError for a head that is no choice among named classes.

    Args:
        config: of the model.
        where: it comes from, for the message.
    """
    problem = getattr(config, "problem_type", None)
    if problem not in (None, "single_label_classification") or config.num_labels < 2:
        kind = f"problem_type '{problem}'" if problem else f"{config.num_labels} label"
        raise UserError(
            f"{where}: the head is one for regression or for several labels at once ({kind}); raylux serves "
            "classifiers that choose one of two or more classes"
        )
    if set(config.id2label) != set(range(config.num_labels)):
        raise UserError(f"{where}: id2label does not name each class from 0 to {config.num_labels - 1}")
    if len(set(class_names(config))) < config.num_labels:
        raise UserError(f"{where}: id2label gives two classes the same name")


def class_number(value: Any, classes: tuple[str, ...], where: str) -> int:
    """A class as a file names it, by its name or its number, as its number.

    Raises:
        UserError: there is no such class; begins with ``where``.
    """
    known = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
    if isinstance(value, str):
        if value in classes:
            return classes.index(value)
        raise UserError(f"{where}: {shown(value)} is no class of the model; classes: {known}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}: must be a class's name or number, not {shown(value)}; classes: {known}")
    if not 0 <= value < len(classes):
        raise UserError(f"{where}: {value} is no class of the model; it has 0 to {len(classes) - 1} ({known})")
    return value


def class_labels(length: int, number: int) -> np.ndarray:
    """Labels [length] int32 of a sequence that has a class: it stands at the first position, no other one counts."""
    labels = np.full(length, NO_LABEL, np.int32)
    labels[0] = number
    return labels
