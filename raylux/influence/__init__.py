"""Dot products of captured sequences with preconditioned queries, and their compression. Torch only.

Legend: N sequences, T tokens, M layer inputs, P layer outputs, Q queries, R rank.
"""

from raylux.influence.dots import LayerQueries, sequence_gradients
from raylux.influence.lowrank import choose_ranks, component_scores, factorise

__all__ = ["LayerQueries", "choose_ranks", "component_scores", "factorise", "sequence_gradients"]
