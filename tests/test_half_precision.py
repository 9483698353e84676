"""Weights in bfloat16: the forward and backward pass are rounded, sums over them are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raylux import models
from raylux.batches import fit_batches
from raylux.capture import Capture
from raylux.config import ModelSection
from raylux.groups import input_groups
from raylux.ledger import COVARIANCE, LABELS, MOMENTS
from raylux.models import coverage
from raylux.sampling import drawn_before
from raylux.store import RunFolder
from tests.small import Inputs, factors, make_inputs

HOW = ("query.max_error=0", "score.token_top=0", "fit.passes=2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "llama", hidden_size=32, intermediate_size=64)


@pytest.fixture(scope="module")
def half(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half") / "run"
    inputs.run(folder, *HOW, "model.dtype=bfloat16")
    return folder


def test_scores_keep_their_order(inputs: Inputs, half: Path, tmp_path: Path) -> None:
    """On labels of the data set, so that both are fitted on the same: drawn ones are another sample each."""
    runs = [
        inputs.run(tmp_path / dtype, *HOW, f"model.dtype={dtype}", "fit.labels=dataset").scores()
        for dtype in ("float32", "bfloat16")
    ]
    for query in runs[0]["query"].to_numpy():
        single, rounded = (run.sel(query=query).sortby("sequence").to_numpy() for run in runs)
        assert np.corrcoef(single, rounded)[0, 1] > 0.99
        assert not np.array_equal(single, rounded)


def test_sums_are_taken_and_kept_in_float32(inputs: Inputs, half: Path) -> None:
    """Held against float64 sums over the a and g of the very same rounded passes."""
    store = RunFolder(str(half))
    found = factors(store)
    assert {array.dtype for name, array in found.items() if name.endswith("matrix")} == {np.dtype(np.float32)}
    files = models.find_model(ModelSection(path=str(inputs.model)))
    model = models.load_model(files, "bfloat16", "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    layers = coverage(model).tracked
    capture = Capture(model, layers, input_groups(model, layers))
    sums, rows = _sums(inputs, half, capture)
    for name, total in sums.items():
        stored = found[f"{COVARIANCE} {name} matrix"]
        exact = (total / rows).numpy()
        assert np.abs(stored - exact).max() <= 2e-6 * np.abs(exact).max(), name
    assert len(store.committed(MOMENTS)) == len(layers)


def _sums(inputs: Inputs, half: Path, capture: Capture) -> tuple[dict[str, torch.Tensor], int]:
    """Σ a aᵀ and Σ g gᵀ in float64 over the units of the fit, by matrix, and the tokens."""
    from raylux.engine.plan import choose_fit_rows, fit_units
    from raylux.store import CorpusReader, read_table

    store = RunFolder(str(half))
    plan, reader = store.settings()["plan"], CorpusReader(store)
    chosen = choose_fit_rows(read_table(store)["sequence"].tolist(), 4096, 0)
    labels = store.group(store.manifest(LABELS, "labels").meta["key"]).read("labels")
    lengths = reader.lengths[chosen]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    sums: dict[str, torch.Tensor] = {}
    for part in fit_units(lengths, plan["fit_unit_tokens"]):
        sequences = reader.rows(chosen[part])
        own = np.split(labels[ends[part.start] : ends[part.stop]], ends[part.start + 1 : part.stop] - ends[part.start])
        labeller = drawn_before([row.key for row in sequences], own)
        for batch in fit_batches(sequences, plan["batch_tokens"], most=plan["longest"]):
            captured = capture.run(batch, labeller)
            assert {g.dtype for g in captured.grads.values()} == {torch.bfloat16}
            for side, tensors in (("A", captured.inputs), ("S", captured.grads)):
                for name, x in tensors.items():
                    flat = x.double().flatten(0, -2)
                    sums[f"{side}:{name}"] = sums.get(f"{side}:{name}", 0) + flat.T @ flat
    return sums, int(ends[-1])
