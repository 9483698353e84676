"""s_test as low-rank factors, the rank chosen by a measured error.

Grosse et al. 2023 keep rank 32 for every query and layer; on small models that loses up to a tenth of the
correlation. Here the error of a query's scores is measured on probe sequences, over all layers together,
and the smallest ranks that keep it within ``query.max_error`` are taken.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

# The bound is to hold on sequences that the probes do not include.
MARGIN = 0.25


def factorise(s_test: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """s_test [P, M] ≈ left [P, R] rightᵀ [R, M], the best rank-R approximation, R ≤ ``most``.

    The right factor is orthonormal, columns by falling singular value; left = s_test · right. Taken from the
    eigenvectors of the smaller Gram matrix: any orthonormal basis gives a valid projection, and the error is
    measured afterwards.
    """
    outputs, inputs = s_test.shape
    most = min(most, outputs, inputs)
    if inputs <= outputs:
        right = _leading(s_test.T @ s_test, most)
        return s_test @ right, right
    left = _leading(s_test @ s_test.T, most)
    values = s_test.T @ left
    norms = values.norm(dim=0)
    return left * norms, values / norms.clamp(min=torch.finfo(norms.dtype).tiny)


def _leading(gram: Tensor, most: int) -> Tensor:
    return torch.linalg.eigh(gram)[1][:, -most:].flip(1).contiguous()


def component_scores(left: Tensor, right: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """What each component gives to the score of each sequence: [N, R].

    Args:
        left: [P, R], right: [M, R].
        a: [N, T, M], g: [N, T, P].
    """
    return ((g @ left) * (a @ right)).sum(1)


def choose_ranks(
    components: Mapping[str, np.ndarray],
    dense: Mapping[str, np.ndarray],
    max_error: float,
    split: int | None = None,
) -> tuple[dict[str, int], float]:
    """The rank of each compressible layer for one query.

    Args:
        components: layer -> [N, R] component scores on N probe sequences, by falling singular value.
        dense: layer -> [N] scores of the uncompressed s_test on the same probes, of all layers.
        max_error: allowed RMS(score − dense score) / RMS(dense score), over all layers together.
        split: the bound is to hold on the first so many probes and on the rest, each by itself.

    Returns:
        layer -> rank, −1 where the layer has to stay dense; and the error measured on the probes.

    One tolerance for all layers: a layer takes the smallest rank from which on its own error is within it;
    the largest tolerance that keeps the bound is found by bisection over the errors that occur.
    """
    target = np.sum([np.asarray(values, np.float64) for values in dense.values()], axis=0)
    sets = [part for part in (slice(0, split), slice(split, None) if split else slice(0, 0)) if target[part].size]
    # What is missing at each choice: rank 0 leaves out the whole score, rank r the rest, dense nothing.
    missing = {}
    for name, values in components.items():
        whole = np.asarray(dense[name], np.float64)[:, None]
        kept = np.cumsum(np.asarray(values, np.float64), axis=1)
        missing[name] = np.hstack([whole, whole - kept, np.zeros_like(whole)])
    # A layer's error is not monotone in the rank; what counts is the largest from a rank on.
    errors = {
        name: np.maximum.accumulate(np.sqrt(np.mean(np.square(rest), axis=0))[::-1])[::-1]
        for name, rest in missing.items()
    }
    levels = np.unique(np.concatenate(list(errors.values())))

    def choices(level: float) -> dict[str, int]:
        return {name: int(np.argmax(values <= level)) for name, values in errors.items()}

    def error(chosen: Mapping[str, int]) -> float:
        left = np.sum([missing[name][:, choice] for name, choice in chosen.items()], axis=0)
        return max(_rms(left[part]) / max(_rms(target[part]), 1e-300) for part in sets)

    # levels[0] is 0: everything dense, which always holds.
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if error(choices(levels[middle])) <= MARGIN * max_error:
            low = middle
        else:
            high = middle - 1
    chosen = choices(levels[low])
    ranks = {name: -1 if choice == missing[name].shape[1] - 1 else choice for name, choice in chosen.items()}
    return ranks, error(chosen)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
