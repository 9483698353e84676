"""Scores with s_test cut to a rank, against those with all of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

import raylux
from raylux.batches import collate
from raylux.capture import Capture
from raylux.engine import records
from raylux.influence.lowrank import component_scores, factorise
from raylux.layers import coverage
from raylux.store import CorpusReader, RunFolder

_ROWS = 32


def rank_scores(run: raylux.Run, model: PreTrainedModel, rows: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    """Scores of some sequences by s_test of each rank, [ranks, Q, n]; the last is of full rank.

    Args:
        run: of the model, its queries dense and in the standard basis.
        model: in float32.
        rows: [n] places in the run's corpus.
        ranks: ascending; the best approximation of each layer's s_test by that many singular values.
    """
    folder = RunFolder(run.folder)
    files, sequences = records.query_files(folder), CorpusReader(folder).rows(rows)
    layers = coverage(model).tracked
    capture = Capture(model, layers)
    s_tests = {
        layer.name: records.read_layer_queries(folder, files, layer.name, run.queries, torch.float32, "cpu")
        for layer in layers
    }
    found = np.zeros((len(ranks) + 1, len(run.queries), len(rows)))
    order = sorted(range(len(rows)), key=lambda place: len(sequences[place].tokens))
    factors = {
        name: [factorise(x, min(x.shape)) for x in dense if isinstance(x, torch.Tensor)]
        for name, dense in s_tests.items()
    }
    for start in range(0, len(rows), _ROWS):
        places = order[start : start + _ROWS]
        width = len(sequences[places[-1]].tokens)
        taken = capture.run(collate([sequences[place] for place in places], places, width), None)
        for layer in layers:
            a, g = taken.inputs[layer.name], taken.grads[layer.name]
            for query, (left, right) in enumerate(factors[layer.name]):
                sums = component_scores(left, right, a, g).cumsum(1).double().numpy()
                for place, rank in enumerate([*ranks, sums.shape[1]]):
                    found[place, query, places] += sums[:, min(rank, sums.shape[1]) - 1]
    return found
