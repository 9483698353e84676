"""What each method says of the model that was trained on all texts: scores [Q, N]."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import xarray as xr
from safetensors.torch import save_file
from transformers import PreTrainedModel

import raylux
from jobs.lds.study import Study
from jobs.lds.trained import Checkpoint
from raylux import prefilter
from raylux.combined import Combined
from raylux.errors import UserError

EKFAC = "ekfac"
# Epochs whose models TracIn and the average are taken over: the last ones.
CHECKPOINTS = 4

Epochs = Sequence[Checkpoint]
"""The model of all texts after each epoch."""
Make = Callable[[Epochs], np.ndarray]
"""Scores [Q, N] of it."""
Case = TypeVar("Case", bound=Hashable)


def scores(study: Study, model: PreTrainedModel, folder: Path, kind: str, overrides: Sequence[str] = ()) -> np.ndarray:
    """raylux's scores [Q, N], in the order of the texts."""
    return array(study, run(study, model, folder, kind, overrides))


def each(
    study: Study, model: PreTrainedModel, cases: Mapping[Case, tuple[str, Sequence[str]]]
) -> dict[Case, np.ndarray]:
    """``scores`` of one model by several kinds and keys of the config, each in a folder that does not stay."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            case: scores(study, model, Path(folder) / str(place), kind, keys)
            for place, (case, (kind, keys)) in enumerate(cases.items())
        }


def run(study: Study, model: PreTrainedModel, folder: Path, kind: str, overrides: Sequence[str] = ()) -> raylux.Run:
    """Every text scored for every query; unless overridden, dense, without tokens, in the raw unit."""
    options = [f"curvature.kind={kind}", "query.max_error=0", "score.token_top=0", "score.unit=raw", *overrides]
    train = [{"text": text, "id": _id(place)} for place, text in enumerate(study.texts)]
    return raylux.attribute(model, study.tokenizer, train, study.asked, folder=folder, overrides=options)


def _id(place: int) -> str:
    return f"{place:06d}"


def unit_length(study: Study, model: PreTrainedModel, folder: Path, kind: str) -> np.ndarray:
    """raylux's scores [Q, N] divided by the roots of the texts' self-influences (ℓ-RelatIF)."""
    found = run(study, model, folder, kind, ["score.self_influence=true"])
    return _ordered(study, found.scores("self-influence"))


def array(study: Study, found: raylux.Run | Combined) -> np.ndarray:
    """Its scores [Q, N], in the order of the study's queries and texts.

    Raises:
        UserError: a text was too long for the model, and was cut in pieces.
    """
    return _ordered(study, found.scores())


def _ordered(study: Study, found: xr.DataArray) -> np.ndarray:
    queries, ids = [query["id"] for query in study.asked], [_id(place) for place in range(len(study.texts))]
    if found.sizes["sequence"] != len(ids):
        raise UserError(f"lds: some texts have more tokens than the model's context; raise --vocabulary "
                        f"({study.settings.vocabulary})")  # fmt: skip
    return found.sel(query=queries, sequence=ids).to_numpy().astype(np.float64)


def of(study: Study, folder: Path, kind: str, *overrides: str) -> Make:
    """Scores of the last model."""
    return lambda epochs: scores(study, epochs[-1].model, folder, kind, overrides)


def over(study: Study, folder: Path, kind: str, by_rate: bool, *overrides: str) -> Make:
    """Scores of the models after the last epochs, added up by their learning rates, or their mean."""

    def make(epochs: Epochs) -> np.ndarray:
        points = epochs[-checkpoints(study) :]
        runs = [run(study, point.model, folder / str(place), kind, overrides) for place, point in enumerate(points)]
        return array(study, raylux.combine(runs, [point.rate for point in points] if by_rate else None))

    return make


def checkpoints(study: Study) -> int:
    """How many models ``over`` takes."""
    return min(CHECKPOINTS, study.settings.epochs)


def tracking(patterns: Sequence[str]) -> str:
    """An override: these layers are tracked, and no others."""
    return f"model.layers={json.dumps(list(patterns))}"


def projected(study: Study, point: Checkpoint, folder: Path, size: int) -> np.ndarray:
    """raylux's TrackStar [Q, N] with AdamW's own second moments: a layer's gradients are projected to [size, size]."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.safetensors")
    save_file({f"{name}.weight": moments for name, moments in point.moments.items()}, path)
    options = [f"curvature.projection={size}", f"curvature.optimizer={path}"]
    return scores(study, point.model, folder, "trackstar", options)


def prefiltered(study: Study, kind: str) -> np.ndarray:
    """A prefilter's score of every text for each query, [Q, N]."""
    rows = study.tokenizer(study.texts, add_special_tokens=False)["input_ids"]
    tokens, offsets = np.concatenate(rows), np.cumsum([0, *map(len, rows)])
    asked = [query["prompt"] + query["completion"] for query in study.asked]
    queries = [np.asarray(row) for row in study.tokenizer(asked, add_special_tokens=False)["input_ids"]]
    return prefilter.score_all(kind, tokens, offsets, len(study.tokenizer), queries)
