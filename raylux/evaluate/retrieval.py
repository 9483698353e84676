"""What scores put first: sequences that are known to matter, sequences that are known to be wrong, candidates.

Finding them is not the aim of influence, which asks what would change the model; but where the truth was planted, it
is known without training anything again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def ranked(scores: np.ndarray) -> np.ndarray:
    """Places of each row's columns, the largest score first, equal ones in the order of the columns: [..., N]."""
    return np.argsort(-scores, axis=-1, kind="stable")


def recall(scores: np.ndarray, relevant: np.ndarray, top: int) -> np.ndarray:
    """Share of a query's relevant sequences that are among its ``top`` best [Q]; NaN where it has none.

    As many as fit: of more relevant ones than ``top`` the share is of ``top``.

    Args:
        scores: [Q, N].
        relevant: [Q, N] bool.
        top: how many are looked at.
    """
    found = np.take_along_axis(relevant, ranked(scores)[:, :top], 1).sum(1)
    wanted = np.minimum(relevant.sum(1), top)
    with np.errstate(invalid="ignore"):
        return found / np.where(wanted > 0, wanted, np.nan)


def reciprocal_ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """1 / rank of a query's best relevant sequence [Q]; NaN where it has none. Their mean is the MRR."""
    hits = np.take_along_axis(relevant, ranked(scores), 1)
    return np.where(hits.any(1), 1.0 / (hits.argmax(1) + 1), np.nan)


@dataclass(frozen=True)
class Detection:
    """How soon marked sequences are found when all are looked at in some order.

    Attributes:
        found: [N] share of the marked that is found after looking at 1, 2, … sequences.
        area: under the ROC curve: the chance that a marked one comes before one that is not; 0.5 by chance.
    """

    found: np.ndarray
    area: float

    def at(self, share: float) -> float:
        """Share of the marked that is found after looking at that share of all, at least one of them."""
        return float(self.found[max(1, round(share * len(self.found))) - 1])


def detection(suspicion: np.ndarray, marked: np.ndarray) -> Detection:
    """Look at the sequences by falling suspicion.

    Args:
        suspicion: [N].
        marked: [N] bool, some of them true and some not.
    """
    from scipy.stats import rankdata

    hits = marked[ranked(suspicion)]
    count, rest = int(hits.sum()), int((~hits).sum())
    # Of the ranks by rising suspicion, equal ones shared: Mann and Whitney's statistic.
    above = rankdata(suspicion)[marked].sum() - count * (count + 1) / 2
    return Detection(np.cumsum(hits) / count, float(above / (count * rest)))
