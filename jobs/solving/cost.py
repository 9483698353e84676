"""What a product with G costs, in forward passes of the model over the same tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from raylux.batches import TokenRow, fit_batches
from raylux.capture import Capture
from raylux.curvature.gauss_newton import add_products
from raylux.layers import coverage


@dataclass(frozen=True)
class Cost:
    """Of one model, CPU seconds of one thread per batch: ``forward`` alone, ``base`` what a batch costs whatever the
    queries (forward and the first backward pass), ``query`` what each query adds.
    """

    name: str
    tracked: int
    forward: float
    base: float
    query: float


def measure(name: str, width: int, layers: int, length: int, vocabulary: int, rows: int, repeats: int) -> Cost:
    """Time a random GPT-2 in float32 on ``rows`` random sequences."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers, n_head=max(2, width // 64),
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    tracked = coverage(model).tracked
    draw = np.random.default_rng(0)
    tokens = [draw.integers(0, vocabulary, length) for _ in range(rows)]
    (batch,) = fit_batches([TokenRow(x, x, place) for place, x in enumerate(tokens)], rows * length)
    capture = Capture(model, tracked)
    vectors: list[Mapping[str, torch.Tensor]] = [{x.name: torch.randn(x.shape) for x in tracked} for _ in range(5)]

    def products(count: int) -> None:
        totals = [{x.name: torch.zeros(x.shape) for x in tracked} for _ in range(count)]
        add_products(capture, batch, vectors[:count], totals)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False)

    one, five = _seconds(lambda: products(1), repeats), _seconds(lambda: products(5), repeats)
    query = (five - one) / 4
    return Cost(name, sum(x.parameters for x in tracked), _seconds(forward, repeats), one - query, query)


def _seconds(call: Callable[[], None], repeats: int) -> float:
    """CPU seconds, the median of some calls after a first one."""
    call()
    taken = []
    for _ in range(repeats):
        begun = time.process_time()
        call()
        taken.append(time.process_time() - begun)
    return float(np.median(taken))
