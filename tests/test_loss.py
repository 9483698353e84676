"""The loss at the logits, and at what a linear head reads, against autograd's cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raylux import loss
from raylux.loss import hidden_loss, logit_loss


def logits_and_targets(rows: int, counted: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, 17, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 17, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) >= counted] = -100
    return logits.to(dtype), targets


@pytest.mark.parametrize("chunk", [1, 17 * 3, 1 << 17])
@pytest.mark.parametrize("counted", [0.0, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_value_and_gradient_are_autograds(
    rows: int, counted: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_CHUNK", chunk)
    logits, targets = logits_and_targets(rows, counted)
    (found,) = logit_loss(logits, targets, None, both=False)
    leaf = logits.clone().requires_grad_(True)
    expected = nn.functional.cross_entropy(leaf, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(found.token_loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.labels, targets)


@pytest.mark.parametrize("counted", [0.2, 1.0])
def test_both_sets_of_labels_at_once(counted: float) -> None:
    """Drawn labels where a label counts, and the given ones, each as if it had been asked for by itself."""
    logits, targets = logits_and_targets(30, counted)

    def draw(probabilities: Tensor, places: Tensor) -> Tensor:
        torch.testing.assert_close(probabilities, logits[places].softmax(1), rtol=1e-12, atol=1e-12)
        return (places * 5 + 1) % 17

    drawn, given = logit_loss(logits, targets, draw, both=True)
    labels = torch.where(targets >= 0, (torch.arange(30) * 5 + 1) % 17, targets)
    assert torch.equal(drawn.labels, labels) and torch.equal(given.labels, targets)
    for found, wanted in ((drawn, labels), (given, targets)):
        (alone,) = logit_loss(logits, wanted, None, both=False)
        assert torch.equal(found.gradient, alone.gradient) and torch.equal(found.token_loss, alone.token_loss)


@pytest.mark.parametrize(("chunk", "block"), [(1, 1), (17 * 3, 7), (1 << 20, 16), (1 << 20, 256)])
@pytest.mark.parametrize("counted", [0.0, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_gradients_by_what_a_head_reads_are_autograds(
    rows: int, counted: float, chunk: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On given and on drawn labels, each with the same bits alone and beside the other."""
    monkeypatch.setattr(loss, "_CHUNK", chunk)
    monkeypatch.setattr(loss, "_BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, 5, generator=generator, dtype=torch.float64).requires_grad_(True)
    weight = torch.randn(17, 5, generator=generator, dtype=torch.float64)
    _, targets = logits_and_targets(rows, counted)
    logits = hidden @ weight.T

    def draw(probabilities: Tensor, places: Tensor) -> Tensor:
        torch.testing.assert_close(probabilities, logits.detach()[places].softmax(1), rtol=1e-12, atol=1e-12)
        return torch.where(places % 3 == 0, targets[places], (places * 5 + 1) % 17)

    drawn, given = hidden_loss(logits.detach(), weight, targets, draw, both=True)
    places = torch.arange(rows)
    labels = torch.where((targets >= 0) & (places % 3 > 0), (places * 5 + 1) % 17, targets)
    assert torch.equal(drawn.labels, labels) and torch.equal(given.labels, targets)
    for found in (drawn, given):
        expected = nn.functional.cross_entropy(logits, found.labels, reduction="none")
        (gradient,) = torch.autograd.grad(expected.sum(), hidden, retain_graph=True)
        torch.testing.assert_close(found.token_loss, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.gradient, gradient, rtol=1e-12, atol=1e-12)
    same = labels == targets
    assert torch.equal(drawn.gradient[same], given.gradient[same])
    for found, labeller in ((drawn, draw), (given, None)):
        (alone,) = hidden_loss(logits.detach(), weight, targets, labeller, both=False)
        assert torch.equal(found.gradient, alone.gradient) and torch.equal(found.token_loss, alone.token_loss)


def test_a_sure_models_small_gradients_keep_their_digits() -> None:
    """float32, all but 1e-6 on the given label: p W alone would have left one digit of them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator)
    logits = torch.randn(30, 50, generator=generator)
    targets = torch.arange(30)
    logits[targets, targets] += 18
    (found,) = hidden_loss(logits, weight, targets, None, both=False)
    exact = logits.double().softmax(1)
    exact[targets, targets] = -(exact.sum(1) - exact[targets, targets])
    expected = exact @ weight.double()
    assert 1e-8 < float(expected.abs().max()) < 1e-4
    (plain,) = logit_loss(logits, targets, None, both=False)
    worst = (plain.gradient @ weight - expected).norm() / expected.norm()
    assert (found.gradient - expected).norm() / expected.norm() <= 1.5 * worst


def test_a_row_has_the_same_bits_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = logits_and_targets(41, 1.0, torch.float32)
    monkeypatch.setattr(loss, "_CHUNK", 17 * 4)
    (whole,) = logit_loss(logits, targets, None, both=False)
    for chosen in ([3, 7], [40, 0, 12], list(range(40, -1, -1))):
        (part,) = logit_loss(logits[chosen], targets[chosen], None, both=False)
        assert torch.equal(part.gradient, whole.gradient[chosen])
        assert torch.equal(part.token_loss, whole.token_loss[chosen])


def test_large_logits_are_no_trouble() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-3e38, 3e38, 0.0]], dtype=torch.float32)
    (found,) = logit_loss(logits, torch.tensor([0, 1]), None, both=False)
    assert found.token_loss.tolist() == [0.0, 0.0] and torch.isfinite(found.gradient).all()
