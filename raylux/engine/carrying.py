"""Queries that one run has solved, as the run of the segment of training before it takes them up (SOURCE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raylux.engine.records import Fitted, QueryFiles, read_curvature, read_layer_queries
from raylux.layers import TrackedLayer
from raylux.store import RunFolder


@dataclass(frozen=True)
class Later:
    """The run of the segment after, and some of its queries. What a shard is told of it.

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

    def carried(self, layer: TrackedLayer, dtype: torch.dtype, device: str) -> list[Tensor]:
        """What stands for each query's gradient at the end of the segment before, [P, M] in the standard basis."""
        folder, group = RunFolder(self.folder), self.groups[layer.name]
        curvature = read_curvature(folder, self.fitted, self.kind, layer.name, group, dtype, device)
        found = []
        for s_test in read_layer_queries(folder, self.files, layer, self.ids, dtype, device):
            assert isinstance(s_test, Tensor), "compressed queries are not carried"
            solved = s_test if self.eigen else curvature.into(s_test)
            found.append(curvature.before(solved, self.damping[layer.name]))
        return found
