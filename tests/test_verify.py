"""Calibrating and verifying whole runs: against dense matrices in float64, bit for bit, and refusals."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raylux
from raylux.api import run_stages
from raylux.batches import TokenRow
from raylux.cli import main
from raylux.engine.shard import FactorShard
from raylux.engine.work import ShardLostError
from raylux.engine.worker import GradientWorker
from raylux.errors import UserError
from raylux.evaluate.exact import exact_norms
from raylux.layers import coverage
from raylux.ledger import CALIBRATION, LEVERAGE, SOLVE, VERIFIED
from raylux.store import RunFolder
from raylux.verification import CalibrationOptions, VerifyOptions
from tests import test_exact as exact
from tests.apart import processes
from tests.architectures import build
from tests.interrupts import Interrupt
from tests.reference import gradients, question_gradient
from tests.small import Inputs, make_inputs
from tests.test_gauss_newton import dense, joined

LAYER, DAMPING = "transformer.h.1.mlp.c_proj", 3.0
TINY = (f"model.layers=[{LAYER}]", f"curvature.damping={DAMPING}", "fit.sequences=6", "score.token_top=0")
CALIBRATE = CalibrationOptions(pairs=18, products=60)
VERIFY = VerifyOptions(top=1, random=1, products=60)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> raylux.Run:
    """Scored, calibrated and verified; calibrated to a residual of nothing."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    run = raylux.attribute(
        exact.gpt2(), exact.tokenizer(), exact.TEXTS, exact.ASKED, folder=folder, overrides=[*exact.PARTS, *TINY]
    )
    return raylux.verify(raylux.calibrate(run, CALIBRATE), VERIFY)


@pytest.fixture(scope="module")
def truth(run: raylux.Run) -> Mapping[str, Any]:
    """∇fᵀ(G + λ)⁻¹∇log p / N [Q, N], Δlog-weights per sequence, and G + λ, all dense."""
    model = exact.gpt2()
    layers = coverage(model, [LAYER]).tracked
    fitted = exact.fitted_on(run)
    given = [TokenRow(np.asarray(row.tokens), np.asarray(row.labels)) for row in fitted]
    damped = dense(model, layers, given) / len(given)
    damped += DAMPING * torch.eye(len(damped), dtype=damped.dtype)

    def flat(found: dict[str, np.ndarray]) -> torch.Tensor:
        return joined({name: torch.as_tensor(found[name]) for name in (LAYER,)})

    asked = torch.stack([flat(question_gradient(model, [LAYER], exact.logprob(*pair))) for pair in exact.ASKED])
    sequences = -torch.stack([flat(gradients(model, [LAYER], row)) for row in exact.corpus_of(run)])
    steps = torch.linalg.solve(damped, sequences.T).T
    own = [TokenRow(np.asarray(row.tokens), np.asarray(row.labels)) for row in exact.corpus_of(run)]
    energies = [float(x @ dense(model, layers, [row]) @ x) for x, row in zip(steps, own, strict=True)]
    count = len(sequences)
    return {
        "influence": (asked @ steps.T / count).numpy(),
        "rif": (sequences * steps).sum(1).numpy() / count,
        "leverage": np.array(energies) / (sequences * steps).sum(1).numpy() / count,
    }


def test_solves_that_came_nowhere_calibrate_nothing(run: raylux.Run) -> None:
    found = run.calibration
    assert found is not None and found.solved and str(found).startswith("calibrated: multiply by")
    far = dataclasses.replace(found, queries=found.queries.assign(residual=4.8))
    assert not far.solved
    assert str(far).startswith("not calibrated: solves came to residuals of up to 5 in") and "--products" in str(far)


def test_the_slope_is_that_of_the_dense_inverse(run: raylux.Run, truth: Mapping[str, Any]) -> None:
    found = run.calibration
    assert found is not None
    predicted = run.scores().to_numpy()
    wanted = float((predicted * truth["influence"]).sum() / (predicted**2).sum())
    assert found.slope == pytest.approx(wanted, rel=2e-3)
    assert found.agreement.slope.low <= found.slope <= found.agreement.slope.high
    own = (predicted * truth["influence"]).sum(1) / (predicted**2).sum(1)
    assert found.queries["slope"].to_numpy() == pytest.approx(own, rel=5e-3)
    assert (found.queries["residual"] <= 1e-3).all()
    values = exact_lambda(run)
    assert found.freedom == pytest.approx(float((values / (values + DAMPING)).sum()))


def exact_lambda(run: raylux.Run) -> np.ndarray:
    store = RunFolder(run.folder)
    return store.group(store.manifest("fit.moments", LAYER).meta["key"]).read("matrix")


def test_what_is_measured_is_the_damped_gauss_newton_step(run: raylux.Run, truth: Mapping[str, Any]) -> None:
    frame = run.verification()
    assert len(frame) == 6 and frame["resolved"].all() and frame["linear"].all()
    places = [(int(row["query"]), int(row["sequence"])) for row in frame.to_dict("records")]
    wanted = np.array([truth["influence"][place] for place in places])
    size = np.sqrt((wanted**2).mean())
    assert np.abs(frame["measured"] - wanted).max() <= 2e-3 * size
    assert ((frame["low"] <= wanted) & (wanted <= frame["high"])).all()
    assert np.abs(frame["solved"] - wanted).max() <= 2e-3 * size
    assert frame["predicted"].to_numpy() == pytest.approx(np.array([run.scores().to_numpy()[at] for at in places]))
    for name in ("leverage", "rif"):
        assert frame[name].to_numpy() == pytest.approx([truth[name][row] for _, row in places], rel=5e-3)
    slopes = run.agreements()
    assert slopes["solved"].slope.value == pytest.approx(1, abs=5e-3)
    # A whole copy among 18 is a long step: first order overstates it, or not, but leverage is the nearer one.
    assert set(slopes) >= {"predicted", "calibrated", "whole copy", "whole copy, by leverage"}


def test_it_is_shown_everywhere(run: raylux.Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", run.folder, "-k", "1"]) == 0 and main(["inspect", run.folder]) == 0
    text = capsys.readouterr().out
    assert text.count(str(run.calibration)) == 2
    page = (Path(run.folder) / "report" / "index.html").read_text(encoding="utf-8")
    assert str(run.calibration) in page and "Measured" in page and "whole copy, by leverage" in page
    table = (Path(run.folder) / "report" / "verify.csv").read_text(encoding="utf-8").splitlines()
    assert len(table) == 7 and table[0].startswith("query,sequence,chosen,predicted,calibrated,solved,measured")


def test_a_dose_below_the_noise_is_refused(run: raylux.Run, capsys: pytest.CaptureFixture[str]) -> None:
    """In a copy of the folder: the last question asked is what is shown."""
    folder = Path(run.folder).with_name("noise")
    shutil.copytree(run.folder, folder)
    options = ["--top", "0", "--random", "1", "--products", "0", "--no-whole", "--dose", "1e-16", "--iterations", "10"]
    assert main(["verify", str(folder), *options]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "below what the search can resolve" in said and "--dose" in said
    assert raylux.open_run(folder).verification()["measured"].isna().all()


def test_norms_that_round_to_float32_compute_in_float64() -> None:
    model = build("llama", torch.float64, 12)
    tokens = torch.tensor([[3, 5, 7, 2]])
    before = model(input_ids=tokens).logits
    assert exact_norms(model) == 5
    after = model(input_ids=tokens).logits
    assert 0 < float((after - before).abs().max()) < 1e-5
    # A difference of weights that float32 cannot hold shows now.
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data += 1e-12
    assert float((model(input_ids=tokens).logits - after).abs().max()) > 0
    assert exact_norms(build("gpt2", torch.float64, 12)) == 0


# ----------------------------------------------------------------------------------------- bits

BITS = ("query.max_error=0", "score.token_top=0", "fit.sequences=8", "model.layers=[model.layers.0.mlp.down_proj]")
FEW = CalibrationOptions(queries=2, pairs=5, products=3)
ONE = VerifyOptions(queries=1, top=1, random=1, whole=False, products=2, iterations=6)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "llama", num_hidden_layers=1)


def numbers(folder: Path) -> dict[str, Any]:
    """What calibrating and verifying left, without who computed it."""
    store = RunFolder(str(folder))
    return {
        f"{stage} {unit}": {key: value for key, value in manifest.meta.items() if key != "numerics"}
        for stage in (CALIBRATION, LEVERAGE, VERIFIED, "calibration.freedom")
        for unit, manifest in store.units(stage).items()
    }


@pytest.fixture(scope="module")
def base(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the runs ``scored`` and, on from it, ``calibrated`` and ``verified``: to be copied."""
    base = tmp_path_factory.mktemp("runs")
    inputs.run(base / "scored", *BITS)
    shutil.copytree(base / "scored", base / "calibrated")
    raylux.calibrate(str(base / "calibrated"), FEW)
    shutil.copytree(base / "calibrated", base / "verified")
    raylux.verify(str(base / "verified"), ONE)
    assert not RunFolder(str(base / "verified")).committed(SOLVE)
    return base


@pytest.fixture(scope="module")
def usual(base: Path) -> dict[str, Any]:
    return numbers(base / "verified")


def test_workers_and_shards_change_no_bits(base: Path, usual: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(base / "scored", tmp_path / "run")
    many = ["engine.backend=ray", "engine.workers=3", "engine.shards=2"]
    with processes() as found:
        raylux.calibrate(str(tmp_path / "run"), FEW, many)
    assert {who for who, _ in found.died} == {"worker", "shard"}
    with processes():
        raylux.verify(str(tmp_path / "run"), ONE, many)
    assert numbers(tmp_path / "run") == usual


def test_on_ray_the_bits_are_the_same(base: Path, usual: dict[str, Any], tmp_path: Path, ray_cluster: Any) -> None:
    shutil.copytree(base / "calibrated", tmp_path / "run")
    raylux.verify(str(tmp_path / "run"), ONE, ["engine.backend=ray", "engine.workers=1", "engine.shards=1"])
    assert numbers(tmp_path / "run") == usual


def test_an_interrupted_command_goes_on(base: Path, usual: dict[str, Any], tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    shutil.copytree(base / "scored", folder)
    for owner, method, call, work in (
        (GradientWorker, "product_unit", 2, lambda: raylux.calibrate(folder, FEW)),
        (FactorShard, "measure", 3, lambda: raylux.calibrate(folder, FEW)),
        (GradientWorker, "own_curvatures", 1, lambda: raylux.verify(folder, ONE)),
        (GradientWorker, "measure_unit", 2, lambda: raylux.verify(folder, ONE)),
    ):
        if method == "own_curvatures":
            raylux.calibrate(folder, FEW)
        with pytest.MonkeyPatch.context() as patch:
            Interrupt(patch, owner, method, call, False)
            with pytest.raises(KeyboardInterrupt):
                work()
    measured: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        usually = GradientWorker.measure_unit
        patch.setattr(GradientWorker, "measure_unit", lambda *args: measured.append(args[2]) or usually(*args))
        raylux.verify(folder, ONE)
    assert len(measured) == 1, "what was committed is not measured again"
    assert numbers(Path(folder)) == usual


def test_a_shard_that_began_anew_holds_its_solutions_again(
    base: Path, usual: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base / "scored", tmp_path / "run")
    usually, calls = FactorShard.measure, [0]

    def lost(self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            self._block = {}
            raise ShardLostError("measure")
        return usually(self, *args)

    monkeypatch.setattr(FactorShard, "measure", lost)
    raylux.calibrate(str(tmp_path / "run"), FEW)
    found = numbers(tmp_path / "run")
    assert found == {name: value for name, value in usual.items() if name.startswith("calibration")}


# ----------------------------------------------------------------------------------------- refusals


def test_a_run_that_lacks_a_stage_says_so(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    for command in ("calibrate", "verify"):
        assert main([command, str(folder)]) == 2
    run_stages(inputs.config(folder, *BITS), ("corpus", "fit"), quiet=True)
    for command in ("calibrate", "verify"):
        assert main([command, str(folder)]) == 2
    run_stages(inputs.config(folder, *BITS), ("prefilter", "query"), quiet=True)
    for command in ("calibrate", "verify"):
        assert main([command, str(folder)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert sum("not a run folder" in line for line in said) == 2
    assert sum("the query stage left nothing" in line for line in said) == 2
    assert sum("the score stage left nothing" in line for line in said) == 2


@pytest.mark.parametrize(
    ("override", "calibrate", "verify"),
    [
        ("curvature.kind=identity", "predicts no change in nats", "predicts no change in nats"),
        ("fit.labels=dataset", "fit.labels=sampled", "--products 0 does without"),
    ],
)
def test_what_has_no_size_is_refused(
    inputs: Inputs, tmp_path: Path, override: str, calibrate: str, verify: str
) -> None:
    inputs.run(tmp_path / "run", *BITS, override)
    with pytest.raises(UserError, match=calibrate):
        raylux.calibrate(str(tmp_path / "run"))
    with pytest.raises(UserError, match=verify):
        raylux.verify(str(tmp_path / "run"))
    assert not numbers(tmp_path / "run")


def test_experts_are_refused(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs", "mixtral")
    inputs.run(tmp_path / "run", "query.max_error=0", "score.token_top=0", "fit.sequences=4")
    with pytest.raises(UserError, match="belongs to an expert"):
        raylux.calibrate(str(tmp_path / "run"))
    with pytest.raises(UserError, match="belongs to an expert"):
        raylux.verify(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (VerifyOptions(dose=0.0), "--dose 0"),
        (VerifyOptions(dose=float("nan")), "--dose nan"),
        (VerifyOptions(factor=1.0), "--factor 1"),
        (VerifyOptions(top=0, random=0), "at least one sequence"),
        (VerifyOptions(queries=0), "--queries 0"),
        (VerifyOptions(sequences=0), "--sequences 0"),
        (VerifyOptions(products=-1), "--products -1"),
    ],
)
def test_options_that_ask_for_nothing_are_refused(tmp_path: Path, options: VerifyOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        raylux.verify(str(tmp_path), options)
