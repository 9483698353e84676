"""Labels drawn from the model that do not depend on company: the same for any batch, worker or order.

A race of exponentials: argmax(p / E) with E standard exponential is a draw from p, as argmax(logit + Gumbel
noise) is, of which it is the exponential. The noise of a vocabulary entry is a hash of (seed, sequence key,
position, entry), the finaliser of SplitMix64 (Steele, Lea, Flood 2014), in integer arithmetic that every device
does alike. Rounding noise in the logits flips a draw only where two entries tie, which an inverse CDF does not
achieve.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from raylux.profiling import of

# Entries of the vocabulary that are drawn together first.
_BLOCK = 64


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def sequence_key(name: str) -> int:
    """A signed 64-bit key of a sequence's id."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def random_signs(key: str, shape: tuple[int, ...]) -> Tensor:
    """±1, float64, from the bits of a hash of any length: no generator's version changes them."""
    count = math.prod(shape)
    drawn = np.frombuffer(hashlib.shake_256(key.encode()).digest(-(-count // 8)), np.uint8)
    return torch.from_numpy(np.unpackbits(drawn)[:count].reshape(shape) * 2.0 - 1.0)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def exponential_noise(places: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Standard exponential noise [n, count] of n places [n] int64, as ``_places`` gives them."""
    entries = torch.arange(1, count + 1, device=places.device) * _GOLDEN
    bits = _mix(places[:, None] + entries)
    # −log(1 − u): the winners are small, and small ones keep all their digits even in float32.
    uniform = _shift(bits, 12).to(dtype).add_(0.5).mul_(2.0**-52)
    return uniform.neg_().log1p_().neg_()


def _places(seed: int, keys: Tensor, positions: Tensor) -> Tensor:
    return _mix(_mix(keys + _signed(seed * 0x9E3779B97F4A7C15 % (1 << 64))) + positions * _GOLDEN)


def sample_labels(probabilities: Tensor, keys: Tensor, positions: Tensor, seed: int) -> Tensor:
    """One label for each row of ``probabilities`` [n, V], drawn from it; [n] int64.

    Drawn in two steps, a block of entries by its sum and an entry of that block: noise for V/64 + 64 entries.
    """
    with of("label"):
        count = probabilities.shape[1]
        whole = count - count % _BLOCK
        sums = probabilities[:, :whole].unflatten(1, (-1, _BLOCK)).sum(2)
        if whole < count:
            sums = torch.cat([sums, probabilities[:, whole:].sum(1, keepdim=True)], 1)
        places = _places(seed, keys, positions)
        chosen = _race(sums, places)
        entries = (chosen * _BLOCK)[:, None] + torch.arange(_BLOCK, device=chosen.device)
        within = probabilities.gather(1, entries.clamp(max=count - 1)).masked_fill_(entries >= count, 0.0)
        # Never an entry beyond the last, however all others are rounded to nothing: the first of equals wins.
        return chosen * _BLOCK + _race(within, _mix(places))


def drawn_before(keys: Sequence[int], labels: Sequence[np.ndarray]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What gives again the labels [T] that were drawn for each of some sequences; to be called as ``sample_labels``.

    Args:
        keys: of the sequences.
        labels: of each, as they were drawn.
    """
    starts = np.concatenate([[0], np.cumsum([len(own) for own in labels])])
    where = {key: int(start) for key, start in zip(keys, starts, strict=False)}
    flat = torch.from_numpy(np.concatenate([*labels, np.zeros(0, np.int64)]).astype(np.int64))

    def look_up(_: Tensor, asked: Tensor, positions: Tensor) -> Tensor:
        own, at = asked.unique(return_inverse=True)
        begins = torch.tensor([where[key] for key in own.tolist()], device=asked.device)
        return flat.to(asked.device)[begins[at] + positions]

    return look_up


def _race(weights: Tensor, places: Tensor) -> Tensor:
    return (weights / exponential_noise(places, weights.shape[1], weights.dtype)).argmax(1)
