"""A and S of the first sequences of the fit alone, Λ of all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs import fewer_sequences
from raylux.engine.captures import FIT, GIVEN, CapturedSequences
from raylux.ledger import COVARIANCE, EIGEN, MOMENTS
from raylux.store import RunFolder
from tests.small import Inputs, contents, differing, factors, make_inputs

DENSE = ("query.max_error=0", "engine.batch_tokens=64", "model.dtype=float64", "fit.eigh=float64")
FEW = "fit.covariance_sequences=20"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("gpt2"), "gpt2", hidden_size=32, intermediate_size=64)


@pytest.fixture(scope="module")
def asymmetric(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "few"
    inputs.run(folder, *DENSE, FEW)
    return folder


def _summed(folder: Path, stage: str) -> int:
    (count,) = {manifest.meta["sequences"] for manifest in RunFolder(str(folder)).units(stage).values()}
    return int(count)


def test_bases_are_those_of_the_first_and_squares_those_of_all(
    inputs: Inputs, asymmetric: Path, tmp_path: Path
) -> None:
    few = _summed(asymmetric, COVARIANCE)
    assert 20 <= few < 40 and _summed(asymmetric, MOMENTS) == 60
    inputs.run(tmp_path / "alone", *DENSE, f"fit.sequences={few}")
    inputs.run(tmp_path / "all", *DENSE, "fit.covariance_sequences=60")
    assert _summed(tmp_path / "all", COVARIANCE) == 60
    found, alone, whole = (factors(RunFolder(str(path))) for path in (asymmetric, tmp_path / "alone", tmp_path / "all"))
    for name in found:
        if name.startswith((COVARIANCE, EIGEN)):
            assert np.array_equal(found[name], alone[name]) and not np.array_equal(found[name], whole[name])
        else:  # the mean of |G|² is the same in every basis
            assert not np.array_equal(found[name], whole[name])
            assert found[name].sum() == pytest.approx(whole[name].sum(), rel=1e-12)


def test_what_is_kept_and_layer_passes_change_no_bit(inputs: Inputs, asymmetric: Path, tmp_path: Path) -> None:
    inputs.run(tmp_path / "other", *DENSE, FEW, "engine.keep_captured=never", "fit.passes=2")
    assert differing(contents(tmp_path / "other"), contents(asymmetric)) == []


def test_what_the_second_pass_ran_first_serves_the_scores(
    inputs: Inputs, asymmetric: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: dict[str, set[int]] = {FIT: set(), GIVEN: set()}
    batch = CapturedSequences.batch

    def watched(self: CapturedSequences, rows: np.ndarray, of: object, which: str, *more: object) -> object:
        found = batch(self, rows, of, which, *more)  # type: ignore[arg-type]
        if found is not None:
            served[which] |= {int(rows[at]) for at in of.rows}  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(CapturedSequences, "batch", watched)
    inputs.run(tmp_path / "again", *DENSE, FEW)
    assert served[FIT] and served[GIVEN] - served[FIT], "of the second pass nothing served"
    assert differing(contents(tmp_path / "again"), contents(asymmetric)) == []


def test_it_goes_on_with_the_labels_it_drew(inputs: Inputs, asymmetric: Path, tmp_path: Path) -> None:
    inputs.run(tmp_path / "run", *DENSE, FEW)
    folder = RunFolder(str(tmp_path / "run"))
    labels = sorted(folder.committed("fit.labels"))
    assert len(labels) == 2
    for stage in (MOMENTS, EIGEN, COVARIANCE, "query", "score"):
        for name in folder.committed(stage):
            folder.forget(stage, name)
    inputs.run(tmp_path / "run", *DENSE, FEW)
    assert sorted(folder.committed("fit.labels")) == labels
    assert differing(contents(tmp_path / "run"), contents(asymmetric)) == []


def test_the_study_in_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything, scores agree with themselves; with fewer sequences, less and less."""
    monkeypatch.setattr(fewer_sequences, "SHARES", (1 / 2, 1 / 16))
    assert fewer_sequences.main(["--train", "48", "--queries", "3", "--epochs", "1", "--width", "16"]) == 0
    lines = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("| A")]
    found = {(what.strip(), int(count)): float(r) for what, count, r in lines}
    assert found[fewer_sequences.ALL, 48] == 1.0
    assert 0.3 < found[fewer_sequences.BASES, 3] < found[fewer_sequences.BASES, 24] < 1.0
