"""What is done otherwise on a GPU: against the CPU's way here, and, where there is one, the whole job on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raylux import capture as capture_module
from raylux import gpu, products
from raylux.batches import TokenRow, collate
from raylux.capture import Capture
from raylux.curvature import Covariances, add_second_moment, moments
from raylux.engine.kept import kept_bytes
from raylux.influence import LayerQueries, dots
from raylux.models import coverage
from tests.architectures import build
from tests.reference import difference
from tests.small import contents, differing, error, make_inputs

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
DENSE = ("query.max_error=0", "engine.contraction_dtype=float32")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


# ---------------------------------------------------------------- the ways of a GPU, taken on the CPU


def test_one_product_for_all_sequences_is_one_each() -> None:
    a, g = normal(3, 5, 7, seed=1), normal(3, 5, 4, seed=2)
    found, wanted = torch.empty(3, 4, 7, dtype=a.dtype), torch.empty(3, 4, 7, dtype=a.dtype)
    products.gradients_into(a, g, found, batched=True)
    products.gradients_into(a, g, wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_a_width_is_filled_up_in_bf16_on_a_gpu_alone() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert products.aligned_width(1025, torch.bfloat16, cuda) == 1032
    assert products.aligned_width(1024, torch.bfloat16, cuda) == 1024
    assert products.aligned_width(1025, torch.float32, cuda) == 1025
    assert products.aligned_width(1025, torch.bfloat16, cpu) == 1025
    assert products.aligned_width(1025, torch.float32, cpu) == 1032
    assert products.aligned_width(1025, torch.float64, cpu) == 1025


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows filled up here too."""

    def width(width: int, dtype: torch.dtype, device: torch.device) -> int:
        return width + -width % 8

    for module in (products, moments, dots):
        monkeypatch.setattr(module, "aligned_width", width)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("bases", [True, False])
def test_filling_up_changes_no_second_moment(bases: bool, tokens: int) -> None:
    """Tokens rotated before the gradient is formed, and the gradient after."""
    a, g = normal(3, tokens, 13, seed=1), normal(3, tokens, 6, seed=2)
    q_a, q_s = (normal(13, 13, seed=3), normal(6, 6, seed=4)) if bases else (None, None)
    total = torch.zeros(6, 13, dtype=torch.float64)
    add_second_moment(total, a, g, q_a, q_s)
    gradient = g.mT @ a
    gradient = gradient if q_a is None or q_s is None else q_s.T @ gradient @ q_a
    torch.testing.assert_close(total, gradient.square().sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("filled")
def test_filling_up_changes_no_score() -> None:
    a, g = normal(4, 8, 13, seed=1), normal(4, 8, 6, seed=2)
    queries = [normal(6, 13, seed=10 + place) for place in range(11)]
    built = LayerQueries.build((6, 13), queries, tokens=8)
    assert built.tiles[0][0]().shape[1] == 6 * 16
    wanted = torch.stack([torch.einsum("ntp,pm,ntm->n", g, query, a) for query in queries], 1)
    assert difference(built.scores([(a, g)]), wanted) <= 1e-12
    torch.testing.assert_close(built.token_scores(9, a, g).sum(1), wanted[:, 9], rtol=1e-12, atol=1e-12)


def test_a_cpu_knows_of_no_switch() -> None:
    matmul = torch.backends.cuda.matmul
    before = (matmul.allow_bf16_reduced_precision_reduction, torch.are_deterministic_algorithms_enabled())
    with gpu.pinned("cpu"), gpu.repeatable("cpu"):
        now = (matmul.allow_bf16_reduced_precision_reduction, torch.are_deterministic_algorithms_enabled())
    assert now == before


def test_switches_are_put_back() -> None:
    """They can be set without a device."""
    matmul = torch.backends.cuda.matmul

    def state() -> tuple[object, ...]:
        filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        reduced = matmul.allow_bf16_reduced_precision_reduction
        return torch.get_deterministic_debug_mode(), filling, reduced, matmul.fp32_precision

    def fail_within() -> None:
        with gpu.pinned("cuda"), gpu.repeatable("cuda"):
            assert state() == (2, False, False, "ieee")
            raise KeyError

    before = state()
    with pytest.raises(KeyError):
        fail_within()
    assert state() == before


def test_a_model_without_repeatable_kernels_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []

    @contextmanager
    def repeatable(device: str) -> Iterator[None]:
        if not refused:
            refused.append(device)
            raise RuntimeError("some_backward does not have a deterministic implementation")
        yield

    model = build("gpt2")
    layers = coverage(model).tracked
    batch = collate([TokenRow(*(torch.arange(5).numpy(),) * 2)], [0], 5)
    wanted = Capture(model, layers).run(batch)
    monkeypatch.setattr(capture_module, "repeatable", repeatable)
    found = Capture(model, layers).run(batch)
    assert refused
    assert all(torch.equal(found.grads[name], wanted.grads[name]) for name in wanted.grads)
    assert all(torch.equal(found.inputs[name], wanted.inputs[name]) for name in wanted.inputs)


def test_another_error_of_a_model_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2")
    capture = Capture(model, coverage(model).tracked)
    monkeypatch.setattr(capture, "_logits", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        capture.run(collate([TokenRow(*(torch.arange(5).numpy(),) * 2)], [0], 5))


@pytest.mark.parametrize(
    ("setting", "device", "kept"),
    [("auto", "cpu", None), ("auto", "cuda", 0), ("never", "cpu", 0), (5000, "cuda", 5000), (5000, "cpu", 5000)],
)
def test_a_gpu_keeps_what_it_is_told_to(setting: int | str, device: str, kept: int | None) -> None:
    assert kept_bytes(setting, device) == kept


# ---------------------------------------------------------------- on a device


@needs_cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal", "identity"])
def test_scores_are_those_of_the_cpu(tmp_path: Path, kind: str, dtype: str, tolerance: float) -> None:
    """GPT-2: Llama's norms are taken in float32 by transformers, whatever the model's precision."""
    inputs = make_inputs(tmp_path / "inputs", "gpt2")
    how = (*DENSE, f"curvature.kind={kind}", f"model.dtype={dtype}")
    here, there = (inputs.run(tmp_path / device, *how, f"model.device={device}") for device in ("cpu", "cuda"))
    assert error(there.scores().to_numpy(), here.scores().to_numpy()) <= tolerance


@needs_cuda
@pytest.mark.parametrize("products_in", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_bits_repeat_on_a_device(tmp_path: Path, architecture: str, products_in: str) -> None:
    inputs = make_inputs(tmp_path / "inputs", architecture)
    how = ("query.max_error=0", f"engine.contraction_dtype={products_in}", "model.device=cuda")
    more = {"once": (), "again": (), "kept": ("engine.keep_captured=1000000000",), "cut": ("score.unit_size=60",)}
    for name, overrides in more.items():
        inputs.run(tmp_path / name, *how, *overrides)
    wanted = contents(tmp_path / "once")
    for name in ("again", "kept", "cut"):
        assert differing(contents(tmp_path / name), wanted) == []


@needs_cuda
def test_bf16_tokens_are_summed_exactly() -> None:
    a, g = (normal(4, 9, width, seed=width, dtype=torch.bfloat16, device="cuda") for width in (13, 8))
    sums = Covariances()
    sums.add({"one": a}, {"one": g}, torch.ones(4, 9, dtype=torch.bool, device="cuda"))
    for found, x in ((sums.inputs["one"], a), (sums.grads["one"], g)):
        rows = x.reshape(-1, x.shape[-1]).double()
        assert found.dtype == torch.float32 and difference(found.cpu(), (rows.T @ rows).cpu()) <= 1e-6


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_a_device(dtype: torch.dtype) -> None:
    """Scores and second moments with the odd width of a bias, against float64 on the same operands."""
    a, g = (normal(4, 32, width, seed=width, dtype=dtype, device="cuda") for width in (65, 32))
    queries = [normal(32, 65, seed=place, dtype=dtype, device="cuda") for place in range(10)]
    with gpu.pinned("cuda"):
        found = LayerQueries.build((32, 65), queries, tokens=32).scores([(a, g)])
        total = torch.zeros(32, 65, device="cuda")
        add_second_moment(total, a, g, None, None)
    gradient = (g.double().mT @ a.double()).cpu()
    wanted = torch.stack([(gradient * query.double().cpu()).sum((1, 2)) for query in queries], 1)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert difference(found.double().cpu(), wanted) <= tolerance
    assert difference(total.double().cpu(), gradient.square().sum(0)) <= tolerance


@needs_cuda
def test_large_tensors_come_to_the_host_as_they_are() -> None:
    for x in (normal(700, 800, device="cuda").T, normal(3, 3, device="cuda")):
        assert torch.equal(gpu.to_host(x), x.cpu())


@needs_two
@pytest.mark.parametrize("backend", ["local", "ray"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mixtral"])
def test_two_devices_have_the_bits_of_one(tmp_path: Path, architecture: str, backend: str) -> None:
    """With blocks that do not fit them on the CPU and on disk, where the model can be read so."""
    sizes = {"num_hidden_layers": 2} if architecture == "mixtral" else {}
    inputs = make_inputs(tmp_path / "inputs", architecture, **sizes)
    how = (*DENSE, "model.dtype=float64", "model.device=cuda")
    inputs.run(tmp_path / "one", *how)
    spread = (f"engine.backend={backend}", "engine.workers=1", "engine.gpus_per_worker=2")
    inputs.run(tmp_path / "two", *how, *spread, "model.device_map=balanced")
    assert differing(contents(tmp_path / "two"), contents(tmp_path / "one")) == []
    if architecture != "mixtral":
        blocks = "model.layers" if architecture == "llama" else "transformer.h"
        for name, first in (("host", "cpu"), ("disk", "disk")):
            inputs.run(
                tmp_path / name, *how, *spread, f'model.device_map={{"": 0, {blocks}.0: {first}, {blocks}.1: 1}}'
            )
            assert differing(contents(tmp_path / name), contents(tmp_path / "one")) == []
