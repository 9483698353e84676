"""Of what a score is made: its shares by layer, by token and by word, read from a run's folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import xarray as xr

from raylux.engine.stages import answers
from raylux.errors import MissingStageError, UserError
from raylux.store import ScoreBlock, token_rows

if TYPE_CHECKING:
    from raylux.results import Run


def by_layer(run: Run, query: str) -> xr.DataArray:
    """``Run.layer_scores``."""
    run.known(query)
    layers = run.settings["model"]["layers"]
    values = np.full((len(layers), len(run.rows)), np.nan)
    blocks = [block for block in run.blocks if block.layers and query in block.queries]
    if not blocks:
        raise MissingStageError(
            f"{run.folder}: no per-layer scores of '{query}'; run `{run.command('score')} score.layers=true`"
        )
    for block in blocks:
        part = run.store.group(block.key).read("layers", block.queries.index(query))
        values[:, np.searchsorted(run.rows, block.rows)] = part * run.scale / _lengths(run, query, block)
    names = run.sequences["sequence"].to_numpy()[run.rows]
    coords = {"layer": np.asarray(layers, object), "sequence": names}
    return xr.DataArray(values, coords, ("layer", "sequence"), name="influence", attrs=run.meaning())


def by_token(run: Run, query: str, sequence: str) -> pd.DataFrame:
    """``Run.token_scores``."""
    run.known(query)
    names = run.sequences["sequence"]
    found = np.flatnonzero(names.to_numpy() == sequence)
    if not len(found):
        raise UserError(f"{run.folder}: no sequence '{sequence}'")
    answer = run.answer(query)
    kept = answers.token_rows(answer, query) if answer else token_rows(run.store, query)
    place = kept.get(int(found[0]))
    if place is None:
        top = run.config.score.token_top
        raise MissingStageError(
            f"{run.folder}: no per-token scores of '{sequence}' for '{query}' (kept for the {top} best); "
            f"run `{run.command('score')} score.token_top={max(2 * top, 10)}`"
        )
    key, index = place
    group = run.store.group(key)
    start, stop = group.read("offsets")[index : index + 2]
    tokens = group.read("tokens", slice(start, stop))
    shares = group.read("shares", slice(start, stop)) * run.scale / _length(run, query, int(found[0]))
    result = pd.DataFrame(
        {"position": np.arange(len(tokens)), "token_id": tokens, "token": decoded(run, tokens), "influence": shares}
    )
    result.attrs.update(run.meaning())
    return result


def by_word(run: Run, query: str, sequence: str) -> pd.DataFrame:
    """``Run.word_scores``."""
    tokens = by_token(run, query, sequence)
    found = tokens.groupby("token_id", sort=False).agg(
        token=("token", "first"), count=("position", "size"), influence=("influence", "sum")
    )
    result = found.reset_index().sort_values("influence", ascending=False, kind="stable", ignore_index=True)
    result.attrs.update(tokens.attrs)
    return result


def _lengths(run: Run, query: str, block: ScoreBlock) -> np.ndarray | float:
    """What a block's scores of a query are divided by, where they are cosines [n]."""
    if run.unit != "cosine":
        return 1.0
    return float(run.measurements["norm"].loc[query]) * run.store.group(block.key).read("norms")


def _length(run: Run, query: str, row: int) -> float:
    """``_lengths`` of one corpus row that has a score."""
    if run.unit != "cosine":
        return 1.0
    block = next(block for block in run.blocks if query in block.queries and row in block.rows)
    return float(np.asarray(_lengths(run, query, block))[np.flatnonzero(block.rows == row)[0]])


def decoded(run: Run, tokens: np.ndarray) -> list[str]:
    """Each token as its tokenizer writes it."""
    from raylux.models import ModelFiles, load_tokenizer

    tokenizer = load_tokenizer(ModelFiles(run.settings["model"]["folder"], run.settings["model"]["tokenizer_folder"]))
    return [str(tokenizer.decode([int(token)])) for token in tokens]
