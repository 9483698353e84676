"""Queries that other runs have solved, as the run before them in a training takes them up.

Runs of the segments of a training (SOURCE, Bae et al. 2024) hand exp(−h(G + λ)) ∇f on; runs of a stage of it, such as
fine-tuning, λ (G + λ)⁻¹ ∇f. That is the derivative of f, at the weights that the stage ends with, by those that it
began with, where it ends at the optimum of its loss and of a proximity λ/2 ‖θ − θ_begin‖² to these (arXiv 2505.05017).
A run without curvature hands ∇f on as it is: the end of a training, for the checkpoints of its last segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raylux.curvature import KINDS, Spectral
from raylux.engine.records import Fitted, QueryFiles, read_basis, read_curvature, read_layer_queries
from raylux.store import RunFolder


@dataclass(frozen=True)
class Later:
    """The run of the segment or stage after, and some of its queries. What a shard is told of it.

    Attributes:
        folder: its run folder, which every shard must be able to read.
        ids: of the queries, in the order in which they are wanted.
        files: blocks of its s_test that hold them.
        fitted: what its fit left, with its segment.
        kind: of its curvature.
        groups: layer -> input group, of its kind.
        damping: layer -> λ.
        eigen: its s_test are in its eigenbases.
        prints: query id -> what changes with anything that is read for it.
    """

    folder: str
    ids: tuple[str, ...]
    files: tuple[QueryFiles, ...]
    fitted: Fitted
    kind: str
    groups: dict[str, str]
    damping: Mapping[str, float]
    eigen: bool
    prints: dict[str, str]

    def of(self, ids: Sequence[str]) -> Later:
        """The same for some of its queries."""
        files = tuple(block for block in self.files if set(block.queries) & set(ids))
        return replace(self, ids=tuple(ids), files=files, prints={query: self.prints[query] for query in ids})

    def carried(self, layer: str, dtype: torch.dtype, device: str) -> list[Tensor]:
        """What stands for each query's gradient where the run before ends, [P, M] in the standard basis."""
        folder, group = RunFolder(self.folder), self.groups[layer]
        damping = self.damping[layer] if KINDS[self.kind].fitted else 1.0
        segment = self.fitted.segment is not None
        if segment:
            curvature = read_curvature(folder, self.fitted, self.kind, layer, group, dtype, device)
        else:
            curvature = Spectral(None, *read_basis(folder, self.fitted.files, layer, group, dtype, device))
        found = []
        for s_test in read_layer_queries(folder, self.files, layer, self.ids, dtype, device):
            assert isinstance(s_test, Tensor), "compressed queries are not carried"
            if segment:
                found.append(curvature.before(s_test if self.eigen else curvature.into(s_test), damping))
            else:
                found.append(damping * (curvature.back(s_test) if self.eigen else s_test))
        return found


def mean_carried(runs: Sequence[Later], layer: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The mean over runs, the checkpoints of one segment, of what they carry of each query, [P, M]."""
    total = runs[0].carried(layer, dtype, device)
    for run in runs[1:]:
        for x, more in zip(total, run.carried(layer, dtype, device), strict=True):
            x += more
    return [x / len(runs) for x in total]


def prints(runs: Sequence[Later]) -> dict[str, list[str]]:
    """Query id -> those of the runs that it is carried from."""
    return {query: [run.prints[query] for run in runs] for query in runs[0].ids} if runs else {}
