"""Sampled labels: the right distribution, and the same draw in any company."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from raylux import sampling
from raylux.sampling import gumbel_noise, sample_labels, sequence_key

_MASK = (1 << 64) - 1


def mixed(x: int) -> int:
    """SplitMix64's finaliser on plain integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def noise(seed: int, key: int, position: int, entry: int) -> float:
    """One number of ``gumbel_noise``, on plain integers."""
    golden = 0x9E3779B97F4A7C15
    place = mixed((mixed((key + seed * golden) & _MASK) + position * golden) & _MASK)
    uniform = ((mixed((place + (entry + 1) * golden) & _MASK) >> 12) + 0.5) / 2.0**52
    return -math.log(-math.log(uniform))


def places(count: int, first_key: int = 0) -> tuple[Tensor, Tensor]:
    """Keys of ids, and positions 1 to 7 in turn."""
    keys = torch.tensor([sequence_key(f"doc:{first_key + n // 7}") for n in range(count)])
    return keys, torch.arange(count) % 7 + 1


def test_the_noise_is_splitmix_on_any_sign() -> None:
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), sequence_key("a")])
    positions = torch.tensor([1, 2, 3, 511, 4, 5])
    for seed in (0, 7, 2**40, -3):
        found = gumbel_noise(seed, keys, positions, 5)
        expected = [
            [noise(seed, key, position, entry) for entry in range(5)]
            for key, position in zip(keys.tolist(), positions.tolist(), strict=True)
        ]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_the_noise_is_gumbel() -> None:
    keys, positions = places(400)
    values = np.sort(gumbel_noise(1, keys, positions, 100).numpy().ravel())
    cumulative = np.exp(-np.exp(-values))
    steps = np.arange(1, len(values) + 1) / len(values)
    # Kolmogorov's distance: 1.95 / √n is passed by chance once in a thousand seeds, and the seed is fixed.
    assert np.abs(cumulative - steps).max() < 1.95 / math.sqrt(len(values))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0]) * temperature
    keys, positions = places(20_000)
    drawn = sample_labels(logits.expand(len(keys), -1), keys, positions, seed=5)
    counts = np.bincount(drawn.numpy(), minlength=len(logits))
    expected = torch.softmax(logits, 0).double().numpy() * len(keys)
    # Entries that are expected less than five times go together, as the test asks.
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())[: len(logits)]
    expected = np.append(expected[~rare], expected[rare].sum())[: len(logits)]
    used = expected > 0
    statistic = (((counts - expected) ** 2)[used] / expected[used]).sum()
    # The 99.9 % points of χ² with 3, 4 and 5 degrees of freedom.
    assert statistic < {3: 16.27, 4: 18.47, 5: 20.52}[int(used.sum()) - 1]


def test_neighbouring_draws_are_independent() -> None:
    """Of the next position, the next sequence and the next seed: pairs are as often equal as by chance."""
    count, vocabulary = 20_000, 4
    keys, positions = places(count)
    flat = torch.zeros(count, vocabulary)
    drawn = sample_labels(flat, keys, positions, seed=0)
    next_keys, _ = places(count, first_key=1)
    for other in (
        sample_labels(flat, keys, positions + 1, seed=0),
        sample_labels(flat, next_keys, positions, seed=0),
        sample_labels(flat, keys, positions, seed=1),
    ):
        equal = float((drawn == other).double().mean())
        assert abs(equal - 0.25) < 4 * math.sqrt(0.25 * 0.75 / count)


def test_company_order_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(60, 50, generator=generator)
    keys, positions = places(60)
    drawn = sample_labels(logits, keys, positions, seed=2)
    for chunk in (1, 50, 170, 10_000):
        monkeypatch.setattr(sampling, "_CHUNK", chunk)
        assert torch.equal(sample_labels(logits, keys, positions, seed=2), drawn)
    order = torch.randperm(60, generator=generator)
    assert torch.equal(sample_labels(logits[order], keys[order], positions[order], seed=2), drawn[order])
    alone = [
        sample_labels(logits[n : n + 1], keys[n : n + 1], positions[n : n + 1], seed=2).item() for n in range(0, 60, 9)
    ]
    assert alone == drawn[::9].tolist()


def test_rounding_noise_in_the_logits_flips_next_to_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1000, 2000, generator=generator, dtype=torch.float64)
    keys, positions = places(1000)
    drawn = sample_labels(logits, keys, positions, seed=0)
    shaken = logits + 1e-6 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    flipped = int((sample_labels(shaken, keys, positions, seed=0) != drawn).sum())
    assert flipped <= 1
    # An inverse CDF would flip some: its borders move by the sum of all the noise before them.
    assert len(set(drawn.tolist())) > 100


def test_no_place_no_draw() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert sample_labels(torch.zeros(0, 9), empty, empty, seed=0).shape == (0,)


def test_keys_differ_and_stay() -> None:
    keys = {sequence_key(f"doc{n}:{k}") for n in range(500) for k in range(4)}
    assert len(keys) == 2000
    assert all(-(2**63) <= key < 2**63 for key in keys)
    # Keys are part of a run's labels: this one may never change.
    assert sequence_key("doc:0") == 8795428630218307156
