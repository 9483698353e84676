"""Across queries: which sequences matter to many of them, and which queries share their influences.

A query is looked at by its best sequences alone, each weighed by its influence as a share of the query's largest: so a
query with large scores counts as much as one with small ones. Two queries are alike by the cosine of these weights;
clusters are those of average linkage (scikit-learn), cut where queries are less alike than ``ALIKE`` on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

# Queries of a cluster have at least this cosine, on average.
ALIKE = 0.3
# Queries that are clustered, the latest: their similarities are a matrix of this size squared.
MOST = 4000


@dataclass(frozen=True)
class Across:
    """What queries have in common.

    Attributes:
        queries: how many were looked at.
        sequences: ``sequence``; ``queries``, among whose k best it is; ``share`` of all queries; ``weight``, the mean
            over those of its influence as a share of the query's largest; ``strongest``, the query where that is
            largest. Those of most queries first.
        clusters: ``query``; ``cluster``, from 1, the largest first; ``size`` of the cluster; ``alike``, mean cosine
            with its other members (NaN where there is none); ``shared``, the sequence with the largest mean weight in
            the cluster. Queries before the latest ``MOST`` are left out.
    """

    queries: int
    sequences: pd.DataFrame
    clusters: pd.DataFrame


def across(best: pd.DataFrame, k: int = 10) -> Across:
    """Look over the best sequences of all queries.

    Args:
        best: ``query``, ``sequence``, ``influence``, one row per pair; only positive influences are looked at.
        k: best sequences of a query that count in ``sequences``.
    """
    found = best[best["influence"] > 0].copy()
    found["weight"] = found["influence"] / found.groupby("query", sort=False)["influence"].transform("max")
    order = ["weight", "sequence"]
    found = found.sort_values(order, ascending=[False, True], kind="stable")
    names = list(dict.fromkeys(best["query"]))
    return Across(len(names), _sequences(found, k, len(names)), _clusters(found, names[-MOST:]))


def _sequences(found: pd.DataFrame, k: int, queries: int) -> pd.DataFrame:
    top = found.groupby("query", sort=False).head(k)
    grouped = top.groupby("sequence", sort=False)
    table = pd.DataFrame(
        {
            "queries": grouped.size(),
            "share": grouped.size() / max(1, queries),
            "weight": grouped["weight"].mean(),
            "strongest": grouped["query"].first(),
        }
    ).reset_index(names="sequence")
    order = ["queries", "weight", "sequence"]
    return table.sort_values(order, ascending=[False, False, True], ignore_index=True)


def _clusters(found: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    from sklearn.preprocessing import normalize  # a second of everybody who reads a run

    found = found[found["query"].isin(names)]
    columns = list(dict.fromkeys(found["sequence"]))
    place = {name: at for at, name in enumerate(names)}, {name: at for at, name in enumerate(columns)}
    where = found["query"].map(place[0]).to_numpy(np.int64), found["sequence"].map(place[1]).to_numpy(np.int64)
    weights = csr_array((found["weight"].to_numpy(np.float64), where), shape=(len(names), max(1, len(columns))))
    unit = normalize(weights) if names else weights
    cosine = np.clip((unit @ unit.T).toarray(), 0.0, 1.0)
    labels = _labels(cosine)
    rows = []
    for number, label in enumerate(sorted(set(labels), key=lambda x: (-(labels == x).sum(), x)), start=1):
        members = np.flatnonzero(labels == label)
        mean = np.asarray(weights[members].mean(0)).ravel()
        shared = columns[int(np.argmax(mean))] if len(columns) and mean.max() > 0 else ""
        for member in members:
            others = members[members != member]
            alike = float(cosine[member, others].mean()) if len(others) else float("nan")
            rows.append((names[member], number, len(members), alike, shared))
    return pd.DataFrame(rows, columns=["query", "cluster", "size", "alike", "shared"])


def _labels(cosine: np.ndarray) -> np.ndarray:
    """The cluster of each query, numbered by the place of its first member."""
    if len(cosine) < 2:
        return np.zeros(len(cosine), np.int64)
    from sklearn.cluster import AgglomerativeClustering

    linked = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="average", distance_threshold=1.0 - ALIKE
    ).fit(1.0 - cosine)
    _, first, inverse = np.unique(linked.labels_, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
