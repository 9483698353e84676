"""Each saving against the plain path: kept tensors, bf16 products, queries in the eigenbases, float32 eigenbases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylux.api import STAGES, run_stages
from raylux.batches import IGNORED, TokenRow
from raylux.config import Config
from raylux.cost import sizes
from raylux.curvature import Spectral
from raylux.engine import choices
from raylux.engine.records import Contraction
from raylux.engine.solve import Form, solve_layer
from raylux.engine.stages import precision
from raylux.engine.stages.query import _is_checked
from raylux.layers import TrackedLayer
from raylux.ledger import CONTRACTION, QUERY
from raylux.store import RunFolder
from tests.small import Inputs, contents, differing, error, make_inputs

# One batch shape is filled often enough that sequences of the fit are scored from what was kept of them.
DENSE = ("query.max_error=0", "fit.unit_tokens=2000", "engine.batch_tokens=64")
# Of what is kept, several sequences stand in a batch: one read in the place of another would show.
TOGETHER = ("prefilter.kind=none", "engine.batch_tokens=128", "corpus.limit=40")
BF16 = "engine.contraction_dtype=bfloat16"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp(request.param), request.param, hidden_size=32, intermediate_size=64)


def scores(inputs: Inputs, folder: Path, *overrides: str) -> np.ndarray:
    return inputs.run(folder, *DENSE, *overrides).scores().to_numpy().astype(float)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_changes_no_bit(
    inputs: Inputs, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raylux.engine.captures import GIVEN, CapturedSequences

    served: list[str] = []
    kept_batch = CapturedSequences.batch

    def watched(self: CapturedSequences, rows: np.ndarray, batch: object, which: str, *more: object) -> object:
        found = kept_batch(self, rows, batch, which, *more)  # type: ignore[arg-type]
        served.extend([which] * (found is not None))
        return found

    monkeypatch.setattr(CapturedSequences, "batch", watched)
    how = (*TOGETHER, f"engine.contraction_dtype={dtype}")
    scores(inputs, tmp_path / "kept", *how)
    assert GIVEN in served and served.count("fit") > 2, "nothing was served from the disk: nothing is tested"
    served.clear()
    scores(inputs, tmp_path / "never", *how, "engine.keep_captured=never")
    assert served == []
    assert differing(contents(tmp_path / "kept"), contents(tmp_path / "never")) == []
    scores(inputs, tmp_path / "little", *how, "engine.keep_captured=20000")
    assert differing(contents(tmp_path / "little"), contents(tmp_path / "never")) == []


def _rotated_first(patch: pytest.MonkeyPatch, dtype: str) -> tuple[str, ...]:
    """How a run rotates all of its tokens in the fit, and has several products of the few sequences that there are."""
    from raylux.engine import scorer

    # In layers as small as these it would pay for few of the sequences.
    patch.setattr("raylux.curvature.moments.rotate_tokens_first", lambda *shape: True)
    packs = scorer.packs
    patch.setattr("raylux.engine.worker.packs", lambda parts, rows, products=1: packs(parts, 4, products))
    return *TOGETHER, f"engine.contraction_dtype={dtype}", "query.basis=eigen"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def without(
    request: pytest.FixtureRequest, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, np.ndarray]]:
    """The products' dtype, and what a run says that rotates first and keeps nothing."""
    folder = tmp_path_factory.mktemp("never") / "run"
    with pytest.MonkeyPatch.context() as patch:
        scores(inputs, folder, *_rotated_first(patch, request.param), "engine.keep_captured=never")
    return request.param, contents(folder)


@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on the disk"])
def test_inputs_that_the_fit_has_rotated_give_the_same_bits(
    inputs: Inputs,
    tmp_path: Path,
    without: tuple[str, dict[str, np.ndarray]],
    on_disk: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They serve the scores; where a file cannot be read any more, the sequences are run again."""
    from raylux.engine import scorer
    from raylux.engine.captures import CapturedSequences
    from raylux.engine.kept import Kept

    dtype, wanted = without
    how = _rotated_first(monkeypatch, dtype)
    found: list[bool] = []
    turned = CapturedSequences.turned

    def watched(self: CapturedSequences, *call: object) -> object:
        rows = turned(self, *call)  # type: ignore[arg-type]
        found.append(rows is not None)
        return rows

    monkeypatch.setattr(CapturedSequences, "turned", watched)
    together: list[bool] = []
    layer_scores = scorer.Scorer.layer_scores

    def counted(self: scorer.Scorer, pack: scorer.Pack) -> object:
        together.append(sum(map(len, pack.parts)) > pack.rows)
        return layer_scores(self, pack)

    monkeypatch.setattr(scorer.Scorer, "layer_scores", counted)
    if on_disk:
        monkeypatch.setattr(sizes, "_IN_MEMORY", 0)
    scores(inputs, tmp_path / "kept", *how)
    assert any(together) == on_disk, "queries on the disk are read once for several products, and those alone"
    assert found and all(found), "nothing was served as it is in the eigenbases: nothing is tested"
    assert differing(contents(tmp_path / "kept"), wanted) == []
    monkeypatch.setattr(Kept, "read", lambda self, key, into: False)
    scores(inputs, tmp_path / "failed", *how)
    assert differing(contents(tmp_path / "failed"), wanted) == []


def test_sequences_that_are_run_anew_share_the_reading_of_queries(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as memory allows go against queries on the disk at once, product by product: the bits are the same."""
    from raylux.engine import scorer

    how = *_rotated_first(monkeypatch, "float32"), "engine.keep_captured=never"
    sizes_of: list[int] = []
    layer_scores = scorer.Scorer.layer_scores

    def counted(self: scorer.Scorer, pack: scorer.Pack) -> object:
        sizes_of.append(sum(map(len, pack.parts)))
        return layer_scores(self, pack)

    monkeypatch.setattr(scorer.Scorer, "layer_scores", counted)
    monkeypatch.setattr(sizes, "_IN_MEMORY", 0)
    scores(inputs, tmp_path / "together", *how)
    shared = list(sizes_of)
    sizes_of.clear()
    monkeypatch.setattr(sizes, "_CAPTURED_TOGETHER", 1)
    scores(inputs, tmp_path / "alone", *how)
    assert sum(shared) == sum(sizes_of) and len(shared) < len(sizes_of)
    assert differing(contents(tmp_path / "together"), contents(tmp_path / "alone")) == []


def test_the_eigenbases_give_the_same_scores(inputs: Inputs, tmp_path: Path) -> None:
    """In float64, total, by layer and by token: a rotation on either side of a product changes nothing."""
    plain, eigen = (
        inputs.run(tmp_path / basis, *DENSE, "model.dtype=float64", "score.layers=true", f"query.basis={basis}")
        for basis in ("standard", "eigen")
    )
    assert error(eigen.scores().to_numpy(), plain.scores().to_numpy()) <= 1e-9
    for query in plain.queries:
        assert error(eigen.layer_scores(query).to_numpy(), plain.layer_scores(query).to_numpy()) <= 1e-9


@pytest.fixture(scope="module")
def rounded(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """Run folder and scores of float32 products (``exact``), and of bf16 ones by basis of the queries."""
    base = tmp_path_factory.mktemp("rounded")
    how = {"exact": ("engine.contraction_dtype=float32",)}
    how |= {basis: (BF16, f"query.basis={basis}", "fit.eigh=float64") for basis in ("standard", "eigen")}
    return {name: (base / name, scores(inputs, base / name, *overrides)) for name, overrides in how.items()}


def test_bf16_products_are_near(rounded: dict[str, tuple[Path, np.ndarray]]) -> None:
    exact = rounded["exact"][1]
    for basis in ("standard", "eigen"):
        found = rounded[basis][1]
        assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] >= 0.9999
        assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.01


@pytest.mark.parametrize(("limit", "dtype"), [(1.0, "bfloat16"), (0.0, "float32")])
def test_bf16_is_held_against_a_measured_error(
    inputs: Inputs, tmp_path: Path, limit: float, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the plan proposes is used where its error keeps the limit; the choice is kept with the folder."""
    monkeypatch.setattr(choices, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(choices, "_BF16_FROM", 0)
    monkeypatch.setattr(precision, "LIMIT", limit)
    found = scores(inputs, tmp_path / "auto", "fit.eigh=float64")
    manifest = RunFolder(str(tmp_path / "auto")).units(CONTRACTION)["products"]
    assert manifest.meta["dtype"] == dtype and 0 < manifest.meta["error"] < 0.05
    asked = scores(inputs, tmp_path / "asked", f"engine.contraction_dtype={dtype}", "fit.eigh=float64")
    assert np.array_equal(found, asked)
    monkeypatch.setattr(precision, "LIMIT", 1.0 - limit)
    assert np.array_equal(scores(inputs, tmp_path / "auto", "fit.eigh=float64"), found), "decided once"


class TestChoices:
    LAYERS = (TrackedLayer("up", 256, 1024, False, False), TrackedLayer("down", 1024, 256, False, False))
    GROUPS = {"up": "up", "down": "down"}  # noqa: RUF012

    @staticmethod
    def config(*overrides: str) -> Config:
        required = {"run": {"folder": "r"}, "model": {"path": "m"}, "corpus": {"path": "c"}, "queries": {"path": "q"}}
        return Config.parse(required, overrides)

    def products(self, queries: int, sequences: int, *overrides: str) -> choices.Products:
        config = self.config("prefilter.kind=none", *overrides)
        return choices.products(config, "cpu", self.LAYERS, self.GROUPS, 128.0, queries, sequences)

    def test_queries_stay_in_the_eigenbases_where_they_outnumber_candidates(self) -> None:
        # Per candidate 128·(256² + 1024²)·2, per query 256·1024·1280·2: the border is at 128/301 queries each.
        assert self.products(40, 100).query_basis == "standard"
        assert self.products(45, 100).query_basis == "eigen"
        assert self.products(45, 100, "query.basis=standard").query_basis == "standard"
        assert self.products(45, 100, "curvature.kind=identity").query_basis == "standard"

    def test_compressed_only_where_dense_ones_are_too_many(self) -> None:
        few, many = self.products(100, 10_000), self.products(3000, 10**6)
        assert (few.low_rank, many.low_rank) == (False, True)
        assert self.products(100, 10_000, "query.low_rank=always").low_rank
        assert not self.products(3000, 10**6, "query.max_error=0").low_rank
        assert self.products(9000, 100).query_basis == "standard", "compressed queries stay in the standard basis"

    def test_tiles_follow_the_number_of_queries(self) -> None:
        assert [self.products(count, 10**6).tile for count in (1, 31, 32, 63, 64, 255, 256)] == [
            8,
            8,
            32,
            32,
            64,
            64,
            256,
        ]

    def test_the_dtype_follows_config_model_and_hardware(self, monkeypatch: pytest.MonkeyPatch) -> None:
        large = (TrackedLayer("up", 1024, 1024, False, False),)
        for has in (True, False):
            monkeypatch.setattr(choices, "has_bfloat16", lambda device, has=has: has)
            assert choices.contraction(self.config(), "cpu", large) == ("bfloat16" if has else "float32")
            assert choices.contraction(self.config(), "cpu", self.LAYERS[:1]) == "float32"
            assert choices.contraction(self.config(BF16), "cpu", self.LAYERS[:1]) == "bfloat16"
            assert choices.contraction(self.config("model.dtype=float64", BF16), "cpu", large) == "float64"


def test_queries_on_the_disk_give_the_same_bits(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raylux.engine import scorer

    usual = scores(inputs, tmp_path / "memory")
    rested: list[int] = []
    used: list[int] = []
    hold, build = scorer.Resting.hold, scorer.LayerQueries.build

    def counted(*about: Any, **more: Any) -> Any:
        found = build(*about, **more)
        used.extend(found.tile for tile in found.tiles for _ in tile if about[-1])
        return found

    monkeypatch.setattr(sizes, "_IN_MEMORY", 0)
    monkeypatch.setattr(scorer.Resting, "hold", lambda self, x: rested.append(len(x)) or hold(self, x))
    monkeypatch.setattr(scorer.LayerQueries, "build", counted)
    assert np.array_equal(scores(inputs, tmp_path / "disk"), usual)
    assert used == rested and rested, "each tile is used once as it was read, and rests from its second use on"
    used.clear()
    monkeypatch.setattr(sizes, "_ONCE", 0)
    assert np.array_equal(scores(inputs, tmp_path / "many"), usual)
    assert not used, "many of one layer rest at once"


def test_a_block_measures_what_bf16_does_to_scores(
    inputs: Inputs,
    rounded: dict[str, tuple[Path, np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The figure kept with the block is near the error of the scores themselves; where it is large, the run says so."""
    folder, exact = rounded["exact"]
    (block,) = RunFolder(str(folder)).units(QUERY).values()
    assert "rounding" not in block.meta
    for basis in ("standard", "eigen"):
        folder, found = rounded[basis]
        (block,) = RunFolder(str(folder)).units(QUERY).values()
        measured, true = block.meta["rounding"], np.linalg.norm(found - exact) / np.linalg.norm(exact)
        assert true / 5 < measured < 5 * true
    monkeypatch.setattr(precision, "_WORTH_SAYING", 1e-6)
    run_stages(inputs.config(tmp_path / "said", *DENSE, BF16), STAGES[:-1])
    assert "bf16 products change scores by" in "".join(capsys.readouterr())


def test_few_blocks_measure_it() -> None:
    measured = [place for place in range(40) if _is_checked(place, Contraction("bfloat16"))]
    assert measured == [0, 1, 3, 7, 15, 31]
    assert not any(_is_checked(place, Contraction("float32")) for place in range(40))


def test_a_masked_prompt_is_not_taken_for_a_gradient_without_error(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured begins at the first label; where nothing counts, bf16 is not taken."""
    tokens = np.arange(100, dtype=np.int32)
    labels = np.where(tokens < 80, IGNORED, tokens).astype(np.int32)
    part = TokenRow(tokens, labels, 7).part(15)
    assert (part.tokens.tolist(), part.key) == (list(range(79, 94)), 7)
    assert part.labels.tolist() == [IGNORED, *range(80, 94)]
    whole = TokenRow(tokens, tokens).part(64)
    assert whole.tokens.tolist() == list(range(64))
    assert len(TokenRow(tokens, np.full_like(labels, IGNORED)).part(5).tokens) == 5
    monkeypatch.setattr(TokenRow, "part", lambda self, count: replace(self, labels=np.full_like(self.labels, IGNORED)))
    monkeypatch.setattr(choices, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(choices, "_BF16_FROM", 0)
    scores(inputs, tmp_path / "masked")
    meta = RunFolder(str(tmp_path / "masked")).units(CONTRACTION)["products"].meta
    assert (meta["dtype"], meta["error"]) == ("float32", 1.0)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_is_solved_the_same_beside_a_longer_one(dtype: torch.dtype, many: bool) -> None:
    """Short queries rotate their tokens, long ones their gradient: each by its own length, whoever stands beside it."""
    outputs, inputs = 96, 40
    draw = torch.Generator().manual_seed(0)
    q_a, q_s = (torch.linalg.qr(torch.randn(n, n, generator=draw))[0] for n in (inputs, outputs))
    curvature = Spectral(torch.rand(outputs, inputs, generator=draw), q_a, q_s)
    tokens = [
        (torch.randn(length, inputs, generator=draw), torch.randn(length, outputs, generator=draw))
        for length in (5, 7, 400, 6, *[41, 3, 40] * 7)  # more than one product's rows
    ]
    form = Form(dtype, True, many)
    together = solve_layer(curvature, tokens, 0.1, form, checked=False)
    for place, own in enumerate(tokens):
        alone = solve_layer(curvature, [own], 0.1, form, checked=False)
        assert torch.equal(alone.s_test[0], together.s_test[place]) and alone.squares[0] == together.squares[place]
