"""Which contraction is cheapest in a layer (DESIGN, decision 6): FLOPs and bytes of each form.

Legend: T tokens of a sequence, P outputs, M inputs, Q queries, R rank of a query's s_test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raylux.layers import TrackedLayer

# Low-rank factors are put against tokens while that costs no more than this many dense dot products.
_TOKEN_CONTRACTION_LIMIT = 4.0

DENSE, TOKENS, EXPANDED, EIGENBASIS = "dense", "tokens", "expanded", "eigenbasis"


def tokens_pay(rank: int, outputs: int, inputs: int, tokens: float) -> bool:
    """True where a low-rank query is cheaper put against tokens than expanded once and used dense."""
    return tokens * rank * (outputs + inputs) <= _TOKEN_CONTRACTION_LIMIT * outputs * inputs


def rotate_tokens_first(tokens: float, outputs: int, inputs: int) -> bool:
    """True where T·(M² + P²) multiplications cost no more than P·M·(P + M) for the formed gradient."""
    return tokens * (inputs**2 + outputs**2) <= outputs * inputs * (outputs + inputs)


def captured_width(layer: TrackedLayer, groups: Mapping[str, str]) -> float:
    """Numbers that are captured of a token at a layer, on average: g, and a where it leads its input group."""
    return layer.share * (layer.outputs + (layer.inputs if groups[layer.name] == layer.name else 0))


def candidate_rotation(layers: Sequence[TrackedLayer], groups: Mapping[str, str], tokens: float) -> float:
    """Multiplications that put a and g of one sequence into the eigenbases: T·(M² + P²)."""
    leaders = sum(layer.share * layer.inputs**2 for layer in layers if groups[layer.name] == layer.name)
    return tokens * (leaders + sum(layer.share * layer.outputs**2 for layer in layers))


def query_rotation(layers: Sequence[TrackedLayer]) -> float:
    """Multiplications that bring one s_test back from the eigenbases: P·M·(P + M)."""
    return float(sum(layer.parameters * (layer.outputs + layer.inputs) for layer in layers))


@dataclass(frozen=True)
class Form:
    """What one form costs in one layer.

    Attributes:
        name: of the form.
        forming: FLOPs per sequence for the gradient G = Σ_t g_t a_tᵀ.
        rotation: FLOPs per sequence for rotating tokens.
        dots: FLOPs per sequence against all queries.
        per_batch: FLOPs for each batch of sequences, whatever its size (expanding queries).
        per_query: FLOPs for each query, once (rotating s_test back to the standard basis).
        held: bytes of all queries that a worker holds.
    """

    name: str
    forming: float
    rotation: float
    dots: float
    per_batch: float
    per_query: float
    held: float

    def per_sequence(self, batch: float) -> float:
        """FLOPs per sequence in batches of ``batch`` sequences."""
        return self.forming + self.rotation + self.dots + self.per_batch / batch


def forms(
    outputs: int, inputs: int, tokens: float, queries: int, rank: int, itemsize: int, blocks: int = 1
) -> list[Form]:
    """The forms for a layer [P, M] and Q queries.

    Args:
        outputs: P.
        inputs: M.
        tokens: T, mean tokens of a sequence.
        queries: Q.
        rank: R of a query's s_test.
        itemsize: bytes of a number of s_test.
        blocks: O of the eigenbases.
    """
    dense = float(outputs * inputs)
    sides = float(outputs + inputs)
    rotate = 2.0 * tokens * (outputs**2 + inputs**2) / blocks
    back = 2.0 * dense * sides / blocks
    low = queries * rank * sides * itemsize
    form = 2.0 * tokens * dense
    against = 2.0 * queries * dense
    tokenwise = 2.0 * tokens * queries * rank * sides
    return [
        Form(DENSE, form, 0.0, against, 0.0, back, queries * dense * itemsize),
        Form(TOKENS, 0.0, 0.0, tokenwise, 0.0, back, low),
        Form(EXPANDED, form, 0.0, against, against * rank, back, low),
        Form(EIGENBASIS, form, rotate, against, 0.0, 0.0, queries * dense * itemsize),
    ]


def cheapest(
    candidates: list[Form], allowed: frozenset[str], sequences: int, queries: int, batch: float, room: float
) -> Form:
    """The form with the fewest FLOPs over a whole run among those that fit.

    Args:
        candidates: of one layer.
        allowed: names.
        sequences: that are scored.
        queries: Q.
        batch: sequences per batch.
        room: bytes that the layer's queries may take; where nothing fits, the smallest is taken.
    """
    usable = [form for form in candidates if form.name in allowed]
    fitting = [form for form in usable if form.held <= room]
    if not fitting:
        return min(usable, key=lambda form: form.held)
    return min(fitting, key=lambda form: sequences * form.per_sequence(batch) + queries * form.per_query)
