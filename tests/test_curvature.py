"""Curvature: K-FAC where it is exact, EK-FAC's optimal diagonal, the solve against dense inverses. In float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raylux.batches import TokenRow, collate
from raylux.capture import Capture
from raylux.cost.contraction import rotate_tokens_first
from raylux.curvature import KINDS, Covariances, Spectral, add_second_moment, eigenbasis, weighted
from raylux.errors import NumericsError
from raylux.groups import input_groups
from raylux.layers import coverage
from tests import reference
from tests.architectures import build

SHAPES = [(1, 1), (3, 5), (6, 2), (4, 4)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass
class Tokens:
    """Sequences of one layer: a [N, T, M], g [N, T, P], zero on padding, and the mask [N, T]."""

    a: Tensor
    g: Tensor
    mask: Tensor

    @property
    def gradients(self) -> list[np.ndarray]:
        """G_n [P, M], one token at a time."""
        return [
            sum((torch.outer(g[t], a[t]) for t in range(len(a))), torch.zeros(g.shape[1], a.shape[1])).numpy()
            for a, g in zip(self.a, self.g, strict=True)
        ]


def tokens_of(sequences: int, longest: int, outputs: int, inputs: int, bias: bool = True, seed: int = 0) -> Tokens:
    """Correlated tokens of sequences of lengths 1 … longest."""
    lengths = [1 + (seed + n) % longest for n in range(sequences)]
    mask = torch.tensor([[t < length for t in range(longest)] for length in lengths])
    a = normal(sequences, longest, inputs, seed=seed) @ normal(inputs, inputs, seed=seed + 1)
    if bias:
        a[..., -1] = 1.0
    # g depends on a: without that K-FAC would be all but exact.
    g = normal(sequences, longest, outputs, seed=seed + 2) + a.tanh() @ normal(inputs, outputs, seed=seed + 3)
    return Tokens(a * mask[..., None], g * mask[..., None], mask)


def fit(batches: Sequence[Tokens], kind: str) -> Spectral:
    """The passes of a fit over batches of one layer."""
    sums = Covariances()
    for batch in batches:
        sums.add(*weighted(KINDS[kind].statistics, {"layer": batch.a}, {"layer": batch.g}, batch.mask))
    rows = sums.rows["layer"]
    a_values, q_a = eigenbasis(sums.inputs["layer"] / rows, "A")
    s_values, q_s = eigenbasis(sums.grads["layer"] / rows, "S")
    basis = (q_a, q_s) if KINDS[kind].basis else (None, None)
    total = torch.zeros(len(q_s), len(q_a), dtype=torch.float64)
    for batch in batches:
        add_second_moment(total, batch.a, batch.g, *basis)
    return KINDS[kind].assemble(q_a, q_s, a_values, s_values, total / sums.sequences, rows / sums.sequences)


def dense(curvature: Spectral, shape: tuple[int, int]) -> np.ndarray:
    """The operator as a matrix on vec() by rows, one column at a time."""
    basis = torch.eye(shape[0] * shape[1], dtype=torch.float64).reshape(-1, *shape)
    return curvature.multiply(basis).reshape(len(basis), -1).T.numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# K-FAC where theory says that it is the Gauss-Newton matrix


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "tkfac", "tekfac", "shampoo", "eshampoo"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_token_of_one_sequence(shape: tuple[int, int], bias: bool, kind: str) -> None:
    one = tokens_of(1, 1, *shape, bias)
    expected = reference.fisher(one.gradients)
    assert error(dense(fit([one], kind), shape), expected) <= 1e-10


class DeepLinear:
    """Linear layers in a row, applied to every token by itself, under ½ ‖y − target‖²."""

    def __init__(self, widths: Sequence[int], bias: bool) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.layers = [nn.Linear(m, p, bias, dtype=torch.float64) for m, p in pairwise(widths)]

    def run(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Each layer's inputs and outputs, and the network's output."""
        inputs, outputs = [], []
        for layer in self.layers:
            inputs.append(x)
            x = layer(x)
            outputs.append(x)
        return inputs, outputs, x

    def gauss_newton(self, index: int, sequences: Sequence[Tensor]) -> np.ndarray:
        """(1/N) Σ_n Σ_t J'J of a layer's parameters: the squared loss has the identity for output Hessian."""
        layer = self.layers[index]
        total: np.ndarray | float = 0.0
        for x in sequences:
            y = self.run(x)[2]
            for value in y.reshape(-1):
                grads = torch.autograd.grad(value, list(layer.parameters()), retain_graph=True)
                columns = [grads[0], *(g[:, None] for g in grads[1:])]
                row = torch.cat(columns, 1).reshape(-1).numpy()
                total = total + np.outer(row, row) / len(sequences)
        return np.asarray(total)

    def batches(self, index: int, sequences: Sequence[Tensor]) -> list[Tokens]:
        """a and g of a layer for the exact expectation over outputs.

        One batch per output: the gradient of that output alone. They count as so many draws, so each is
        scaled to make their mean the sum over outputs. A batch holds one token of each sequence: tokens do
        not see each other, and a draw for one token says nothing about another's.
        """
        longest = max(len(x) for x in sequences)
        mask = torch.tensor([[t < len(x) for t in range(longest)] for x in sequences])
        x = torch.stack([nn.functional.pad(x, (0, 0, 0, longest - len(x))) for x in sequences])
        inputs, outputs, y = self.run(x)
        a = inputs[index].detach()
        if self.layers[index].bias is not None:
            a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        result = []
        for k in range(y.shape[-1]):
            (g,) = torch.autograd.grad(y[..., k].sum(), outputs[index], retain_graph=True)
            g = g * y.shape[-1] ** 0.5
            result.append(Tokens(a * mask[..., None], g * mask[..., None], mask))
        return result


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("widths", [(3, 4), (2, 5, 3), (5, 4, 3, 2), (3, 3, 3), (1, 2, 1)], ids=str)
def test_deep_linear_network_with_squared_loss(widths: tuple[int, ...], bias: bool) -> None:
    """One token a sequence: K-FAC and EK-FAC are exact in every layer."""
    network = DeepLinear(widths, bias)
    sequences = [normal(1, widths[0], seed=n) for n in range(7)]
    for index, layer in enumerate(network.layers):
        shape = (layer.out_features, layer.in_features + bias)
        expected = network.gauss_newton(index, sequences)
        batches = network.batches(index, sequences)
        for kind in ("kfac", "ekfac"):
            assert error(dense(fit(batches, kind), shape), expected) <= 1e-10


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_kfac_is_on_the_scale_of_a_sequence(bias: bool) -> None:
    """Sequences of 1 to 6 tokens: the per-sequence Gauss-Newton matrix is T̄ A ⊗ S, not A ⊗ S."""
    network = DeepLinear((4, 3, 5), bias)
    sequences = [normal(length, 4, seed=length) for length in (6, 1, 3, 4)]
    for index, layer in enumerate(network.layers):
        shape = (layer.out_features, layer.in_features + bias)
        expected = network.gauss_newton(index, sequences)
        found = dense(fit(network.batches(index, sequences), "kfac"), shape)
        assert error(found, expected) <= 1e-10
        assert error(found / 3.5, expected) > 0.5


def test_kfac_eigenvalues_and_mean() -> None:
    batch = tokens_of(9, 6, 4, 5)
    found = fit([batch], "kfac")
    rows = batch.mask.reshape(-1)
    a, g = batch.a.reshape(-1, 5)[rows], batch.g.reshape(-1, 4)[rows]
    lambda_a = np.linalg.eigvalsh((a.T @ a / len(a)).numpy())
    lambda_s = np.linalg.eigvalsh((g.T @ g / len(g)).numpy())
    mean_tokens = float(batch.mask.sum()) / 9
    assert found.values is not None
    np.testing.assert_allclose(found.values.numpy(), mean_tokens * np.outer(lambda_s, lambda_a), rtol=1e-9)
    assert mean_tokens == 3.0


def test_a_batch_more_or_less_changes_nothing() -> None:
    """Batches add up, whatever their padding, and a module's calls count as tokens."""
    whole = tokens_of(6, 5, 3, 4)
    parts = [Tokens(whole.a[s], whole.g[s], whole.mask[s]) for s in (slice(0, 1), slice(1, 6))]
    for kind in ("kfac", "ekfac", "diagonal"):
        assert error(dense(fit(parts, kind), (3, 4)), dense(fit([whole], kind), (3, 4))) <= 1e-12
    twice = Covariances()
    twice.add({"layer": whole.a.repeat(1, 2, 1)}, {"layer": whole.g.repeat(1, 2, 1)}, whole.mask)
    assert twice.rows["layer"] == 2 * int(whole.mask.sum())
    assert twice.sequences == 6


# EK-FAC: the optimal diagonal in the Kronecker eigenbasis


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(6, 7), (3, 9), (8, 2)])
def test_ekfac_is_the_best_diagonal(shape: tuple[int, int], seed: int) -> None:
    batch = tokens_of(12, 5, *shape, seed=seed)
    exact = reference.fisher(batch.gradients)
    kfac, ekfac = fit([batch], "kfac"), fit([batch], "ekfac")
    error_ekfac = np.linalg.norm(dense(ekfac, shape) - exact)
    assert error_ekfac < np.linalg.norm(dense(kfac, shape) - exact)
    # Any other diagonal in this basis is farther away, by exactly its distance (Pythagoras).
    assert ekfac.values is not None
    for step in (1e-3, 1.0, 30.0):
        moved = step * normal(*shape, seed=seed + 9)
        other = Spectral(ekfac.values + moved, ekfac.q_a, ekfac.q_s)
        distance = np.linalg.norm(dense(other, shape) - exact)
        assert distance**2 - error_ekfac**2 == pytest.approx(float(moved.square().sum()), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_on_every_layer_of_a_model(name: str) -> None:
    """Every kind against dense matrices, and EK-FAC against K-FAC, on activations of a model in a padded batch."""
    model = build(name, torch.float64, vocab=40)
    layers = coverage(model).tracked
    groups = input_groups(model, layers)
    random = np.random.default_rng(0)
    examples = []
    for length in (9, 4, 12, 7, 10):
        tokens = random.integers(2, 40, length)
        examples.append(TokenRow(tokens, np.where(np.arange(length) == 0, -100, tokens)))
    batch = collate(examples, range(5), 12)
    captured = Capture(model, layers, groups).run(batch)
    pairs = [
        reference.token_pairs(model, [layer.name for layer in layers], reference.Example(row.tokens, row.labels))
        for row in examples
    ]
    for layer in layers:
        tokens_ = Tokens(captured.inputs[groups[layer.name]], captured.grads[layer.name], batch.mask)
        mine = [pair[layer.name] for pair in pairs]
        gradients = [g.T @ a for a, g in mine]
        kinds = [kind.name for kind in KINDS.values() if kind.spectral]
        expected = {kind: reference.curvature(kind, gradients, mine) for kind in kinds}
        found = {kind: dense(fit([tokens_], kind), layer.shape) for kind in expected}
        for kind, matrix in found.items():
            # RMS norms of a llama round to float32.
            assert error(matrix, expected[kind].matrix) <= (1e-9 if name == "gpt2" else 1e-6)
        exact = expected["ekfac"].fisher
        assert np.linalg.norm(found["ekfac"] - exact) < np.linalg.norm(found["kfac"] - exact)
        for kind in ("ekfac", "tekfac", "eshampoo", "shampoo"):
            assert np.trace(found[kind]) == pytest.approx(np.trace(exact), rel=1e-9)
        # No other diagonal in its basis is as close.
        for corrected, plain in (("tekfac", "tkfac"), ("eshampoo", "shampoo")):
            assert np.linalg.norm(found[corrected] - exact) < np.linalg.norm(found[plain] - exact)


@pytest.mark.parametrize("with_basis", [True, False])
@pytest.mark.parametrize(("longest", "shape"), [(2, (9, 8)), (30, (9, 8)), (30, (3, 12))])
def test_rotating_tokens_or_gradients_first_is_the_same(
    longest: int, shape: tuple[int, int], with_basis: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = tokens_of(5, longest, *shape)
    q_a = torch.linalg.qr(normal(shape[1], shape[1], seed=5))[0] if with_basis else None
    q_s = torch.linalg.qr(normal(shape[0], shape[0], seed=6))[0] if with_basis else None
    totals = []
    for first in (True, False):
        monkeypatch.setattr("raylux.curvature.moments.rotate_tokens_first", lambda *_, first=first: first)
        total = torch.ones(shape, dtype=torch.float64)
        add_second_moment(total, batch.a, batch.g, q_a, q_s)
        totals.append(total - 1)
    expected = torch.zeros(shape, dtype=torch.float64)
    for gradient in batch.gradients:
        rotated = torch.from_numpy(gradient)
        if q_a is not None and q_s is not None:
            rotated = q_s.T @ rotated @ q_a
        expected += rotated**2
    for total in totals:
        assert reference.difference(total, expected) <= 1e-12


def test_the_cheaper_rotation_is_chosen() -> None:
    assert rotate_tokens_first(8, 576, 1536)
    assert not rotate_tokens_first(2048, 576, 1536)


# the solve


def random_curvature(shape: tuple[int, int], seed: int = 0) -> Spectral:
    outputs, inputs = shape
    q_a = torch.linalg.qr(normal(inputs, inputs, seed=seed))[0]
    q_s = torch.linalg.qr(normal(outputs, outputs, seed=seed + 1))[0]
    return Spectral(normal(outputs, inputs, seed=seed + 2).square(), q_a, q_s)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 6)])
def test_the_solve_against_a_dense_inverse(shape: tuple[int, int]) -> None:
    """Orientation (the printed formula has it transposed): Kronecker matrices formed, then inverted."""
    curvature = random_curvature(shape)
    assert curvature.values is not None
    assert curvature.q_a is not None
    assert curvature.q_s is not None
    basis = np.kron(curvature.q_s.numpy(), curvature.q_a.numpy())
    matrix = basis @ np.diag(curvature.values.reshape(-1).numpy()) @ basis.T
    inverse = np.linalg.inv(matrix + 0.05 * np.eye(len(matrix)))
    v = normal(*shape, seed=8)
    expected = (inverse @ v.reshape(-1).numpy()).reshape(shape)
    assert error(curvature.solve(v, 0.05).numpy(), expected) <= 1e-8
    assert error(dense(curvature, shape), matrix) <= 1e-12
    transposed = Spectral(curvature.values, curvature.q_a.T, curvature.q_s.T).solve(v, 0.05)
    assert error(transposed.numpy(), expected) > 0.05


@pytest.mark.parametrize("bases", [(True, True), (True, False), (False, True), (False, False)])
def test_multiply_and_solve_are_inverses(bases: tuple[bool, bool]) -> None:
    curvature = random_curvature((4, 6))
    curvature = Spectral(curvature.values, curvature.q_a if bases[0] else None, curvature.q_s if bases[1] else None)
    v = normal(3, 4, 6, seed=8)
    for damping in (1e-3, 0.3):
        there = curvature.multiply(v) + damping * v
        assert reference.difference(curvature.solve(there, damping), v) <= 1e-10
        back = curvature.solve(v, damping)
        assert reference.difference(curvature.multiply(back) + damping * back, v) <= 1e-10


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal"])
def test_a_large_damping_tends_to_the_dot_product(kind: str) -> None:
    curvature = fit([tokens_of(8, 5, 4, 6)], kind)
    v = normal(4, 6, seed=8)
    errors = [reference.difference(damping * curvature.solve(v, damping), v) for damping in (1e4, 1e6, 1e8)]
    assert errors[0] > 50 * errors[1] > 2000 * errors[2]
    assert errors[2] <= 1e-5


@pytest.mark.parametrize("kind", ["identity", "cosine"])
def test_without_curvature_a_query_stays_as_it_is(kind: str) -> None:
    curvature = KINDS[kind].assemble(None, None, None, None, None, 1.0)
    v = normal(4, 6)
    assert curvature.solve(v, curvature.damping("auto")) is v
    assert curvature.multiply(v) is v


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal"])
def test_damping_is_a_tenth_of_the_mean(kind: str) -> None:
    batch = tokens_of(8, 5, 4, 6)
    curvature = fit([batch], kind)
    assert curvature.values is not None
    assert curvature.damping("auto") == pytest.approx(0.1 * float(curvature.values.mean()), rel=1e-12)
    assert curvature.damping("auto") == pytest.approx(0.1 * np.trace(dense(curvature, (4, 6))) / 24, rel=1e-10)
    assert curvature.damping(0.25) == 0.25
    assert curvature.damping(0.0) == 0.0
    if kind != "kfac":
        exact = reference.fisher(batch.gradients)
        assert curvature.damping("auto") == pytest.approx(0.1 * np.trace(exact) / 24, rel=1e-10)


# what is not regular


def test_rank_deficient_covariances_are_normal() -> None:
    """Two tokens in seven dimensions: zero eigenvalues, and a solve that is exact with damping."""
    batch = tokens_of(2, 1, 5, 7)
    for kind in ("ekfac", "kfac"):
        curvature = fit([batch], kind)
        assert curvature.values is not None
        assert float(curvature.values.min()) >= 0
        assert int((curvature.values > 1e-10 * curvature.values.max()).sum()) <= 4
        v = normal(5, 7, seed=8)
        matrix = dense(curvature, (5, 7)) + 0.1 * np.eye(35)
        expected = np.linalg.solve(matrix, v.reshape(-1).numpy()).reshape(5, 7)
        assert error(curvature.solve(v, 0.1).numpy(), expected) <= 1e-8


def test_eigenvalues_below_zero_are_rounding() -> None:
    x = normal(2, 9)
    values, vectors = eigenbasis(x.T @ x - 1e-15 * torch.eye(9, dtype=torch.float64), "A")
    assert float(values.min()) == 0
    assert reference.difference(vectors.T @ vectors, np.eye(9)) <= 1e-12
    assert reference.difference(vectors @ torch.diag(values) @ vectors.T, x.T @ x) <= 1e-12


def test_eigenbases_are_computed_in_float64() -> None:
    x = normal(30, 9).float()
    values, vectors = eigenbasis(x.T @ x, "A")
    assert values.dtype == vectors.dtype == torch.float64
    whole = (x.T @ x).double()
    assert reference.difference(vectors @ torch.diag(values) @ vectors.T, (whole + whole.T) / 2) <= 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_a_covariance_is_an_error_with_its_name(bad: float) -> None:
    matrix = torch.eye(3)
    matrix[1, 2] = bad
    with pytest.raises(NumericsError, match=r"S:model\.layers\.3.*NaN or infinity"):
        eigenbasis(matrix, "S:model.layers.3")


def test_singular_without_damping_is_an_error() -> None:
    curvature = Spectral(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
    with pytest.raises(NumericsError, match=r"curvature\.damping"):
        curvature.solve(torch.ones(2, 2), 0.0)
    assert torch.isfinite(curvature.solve(torch.ones(2, 2), 1e-6)).all()
    with pytest.raises(NumericsError, match="singular"):
        Spectral(torch.tensor([[float("nan")]])).solve(torch.ones(1, 1), 1.0)
