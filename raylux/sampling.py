"""Labels drawn from the model that do not depend on company: the same for any batch, worker or order.

A race of exponentials: argmax(p / E) with E standard exponential is a draw from p, as argmax(logit + Gumbel
noise) is, of which it is the exponential. The noise of a vocabulary entry is a hash of (seed, sequence key,
position, entry), the finaliser of SplitMix64 (Steele, Lea, Flood 2014), in integer arithmetic that every device
does alike. Rounding noise in the logits flips a draw only where two entries tie, which an inverse CDF does not
achieve.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_CHUNK = 1 << 17


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def sequence_key(name: str) -> int:
    """A signed 64-bit key of a sequence's id."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def exponential_noise(seed: int, keys: Tensor, positions: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Standard exponential noise [n, vocabulary] for n places given by keys and positions [n] int64."""
    place = _mix(_mix(keys + _signed(seed * 0x9E3779B97F4A7C15 % (1 << 64))) + positions * _GOLDEN)
    entries = torch.arange(1, vocabulary + 1, device=keys.device) * _GOLDEN
    bits = _mix(place[:, None] + entries)
    # −log(1 − u): the winners are small, and small ones keep all their digits even in float32.
    uniform = _shift(bits, 12).to(dtype).add_(0.5).mul_(2.0**-52)
    return uniform.neg_().log1p_().neg_()


def sample_labels(probabilities: Tensor, keys: Tensor, positions: Tensor, seed: int) -> Tensor:
    """One label for each row of ``probabilities`` [n, V], drawn from it; [n] int64."""
    rows = max(1, _CHUNK // probabilities.shape[1])
    drawn = []
    for start in range(0, len(probabilities), rows):
        part = slice(start, start + rows)
        p = probabilities[part]
        noise = exponential_noise(seed, keys[part], positions[part], p.shape[1], p.dtype)
        drawn.append((p / noise).argmax(1))
    return torch.cat(drawn) if drawn else torch.zeros(0, dtype=torch.int64, device=probabilities.device)
