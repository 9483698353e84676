"""The loss at the logits against autograd's cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raylux import loss
from raylux.loss import logit_loss


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
