"""kronfluence on a case, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jobs.bench.bare import Inputs
from jobs.bench.batches import Rows, batch_of
from jobs.bench.peer import Kronfluence
from jobs.bench.records import Stopwatch
from jobs.bench.workloads import Case, write_queries
from raylux import models
from raylux.queries import load_queries


def run(
    case: Case, inputs: Inputs, sizes: Sequence[int], empirical: bool, folder: Path, watch: Stopwatch
) -> dict[int, np.ndarray]:
    """Factors once, scores for each number of queries; Q -> [Q, N], in raylux's sign and unit ``raw``."""
    rows = inputs.rows
    train = Rows(batch_of([row for row, _ in rows], [labels for _, labels in rows]))
    tracked = models.coverage(models.load_structure(inputs.files), None).tracked
    names = [layer.name for layer in tracked]
    with watch.on("load"):
        model = inputs.model().requires_grad_(True)
        peer = Kronfluence(model, names, train, folder, case.batch, empirical=empirical)
        del model
    for name, stage in (("covariance", peer.covariances), ("eigenbases", peer.eigenbases), ("lambda", peer.moments)):
        with watch.on(name):
            stage()
    found = {}
    for size in sizes:
        queries = _queries(case, inputs, size, folder)
        with watch.on("score", size):
            scores = peer.scores(queries, f"scores-{size}", query_batch=min(size, case.batch))
        found[size] = scores["all_modules"]
    return found


def _queries(case: Case, inputs: Inputs, size: int, folder: Path) -> Rows:
    """The measurement of a query is the loss of its first part."""
    path = folder / f"queries-{size}.jsonl"
    write_queries(path, case.queries, size)
    queries = load_queries(str(path), inputs.tokenizer, inputs.vocabulary, inputs.context)
    parts = [query.parts[0] for query in queries]
    return Rows(batch_of([part.tokens for part in parts], [part.labels for part in parts]))
