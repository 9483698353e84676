"""What is to be computed, as numbers: model, data, queries and the settings that reach the cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

from raylux.cost.contraction import captured_width
from raylux.cost.model import ModelShape
from raylux.cost.sizes import rank_limit
from raylux.layers import TrackedLayer

ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2}


@dataclass(frozen=True)
class Workload:
    """One run.

    Attributes:
        model: its shapes.
        dtype: of the model's forward and backward pass.
        contraction: precision of the products of a and g (DESIGN, decision 9).
        basis: the curvature has eigenbases.
        moments: and Λ.
        sequence_products: A and S are sums over sequences' gradients, not over tokens.
        blocks: in which A and S are kept.
        fit_sequences: that the curvature is fitted on.
        covariance_sequences: of them, those that A and S are summed over; None: all.
        corpus: sequences of the corpus, which the prefilter reads.
        candidates: sequences that are scored.
        tokens: mean length of a sequence.
        queries: Q.
        query_tokens: mean length of a query.
        batch_tokens: padded tokens of a batch; None: the planner's choice.
        unit_tokens: tokens of a fit unit.
        score_unit: sequences of a score unit.
        padding: padded tokens over tokens in scoring.
        prefilter: whether there is one.
        max_error: allowed error of low rank; 0: dense.
        max_rank: largest rank that is tried.
        rank: assumed where s_test is kept in low rank; the run measures it.
        probes: sequences on which compression is measured.
        tile: dense queries per product.
        rows: sequences of such a product.
        eigh: precision of eigendecompositions, "float32", "float64" or "auto".
        query_basis: "standard" or "eigen", as a run has frozen it; None: the planner's choice.
        keep_bytes: a worker's local disk for the captured a and g of fitted sequences; 0: they are not kept.
        joint: the curvature is one exact matrix over all tracked weights.
        projection: K of a kind that projects gradients; 0: it does not.
        self_influence: the gradients of scored sequences are measured too.
        solver_products: products with the Gauss-Newton matrix that a query takes, at most; 0: solved directly.
        solver_sequences: over which each of them goes.
        passes: of each stage of the fit that sums; None: the planner's choice.
        best: of each query so many best sequences are wanted, found in two stages; None: all scores.
        scores_fit: the candidates include the fitted sequences, and kept ones are scored without another pass.
    """

    model: ModelShape
    dtype: str
    contraction: str
    basis: bool
    moments: bool
    fit_sequences: int
    corpus: int
    candidates: int
    tokens: float
    queries: int
    query_tokens: float
    batch_tokens: int | None
    unit_tokens: int
    score_unit: int
    padding: float = 1.0
    prefilter: bool = True
    max_error: float = 0.01
    max_rank: int = 256
    rank: int = 64
    probes: int = 32
    tile: int = 8
    rows: int = 16
    eigh: str = "auto"
    query_basis: str | None = None
    keep_bytes: float = 0.0
    scores_fit: bool = False
    passes: int | None = None
    self_influence: bool = False
    joint: bool = False
    projection: int = 0
    solver_products: int = 0
    solver_sequences: int = 0
    sequence_products: bool = False
    blocks: int = 1
    covariance_sequences: int | None = None
    best: int | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the model."""
        return ITEMSIZE[self.dtype]

    @property
    def stored(self) -> int:
        """Bytes of a number in sums, factors and s_test."""
        return 8 if self.dtype == "float64" else 4

    @property
    def operand(self) -> int:
        """Bytes of a number that goes into a contraction."""
        return ITEMSIZE[self.contraction]

    @property
    def fit_tokens(self) -> float:
        return self.fit_sequences * self.tokens

    def summed(self) -> Workload:
        """With no more fitted sequences than A and S are summed over."""
        most = self.fit_sequences if self.covariance_sequences is None else self.covariance_sequences
        return replace(self, fit_sequences=min(most, self.fit_sequences))

    def beyond(self, workers: int) -> Workload | None:
        """With the fitted sequences beyond those alone, and the disk that those leave; None: there are none."""
        first = self.summed()
        if first.fit_sequences == self.fit_sequences:
            return None
        left = max(0.0, self.keep_bytes - first.captured_bytes / workers)
        return replace(self, fit_sequences=self.fit_sequences - first.fit_sequences, keep_bytes=left)

    def stored_rank(self, layer: TrackedLayer) -> int:
        """The assumed rank of a layer's s_test; 0: dense, as low rank would not halve its memory."""
        if self.max_error <= 0:
            return 0
        limit = rank_limit(self.max_rank, layer)
        return self.rank if self.rank <= limit else 0

    @property
    def captured_bytes(self) -> float:
        """a and g of all fitted tokens on disk; with the gradients on true labels where they are to be scored."""
        layers = self.model.tracked
        width = sum(captured_width(layer, self.model.groups) for layer in layers)
        width += sum(layer.share * layer.outputs for layer in layers) if self.scores_fit else 0
        return self.fit_tokens * self.operand * width

    def kept_share(self, workers: int) -> float:
        """Share of the fitted tokens that ``workers`` disks keep."""
        return min(1.0, self.keep_bytes * workers / self.captured_bytes)

    def query_bytes(self) -> int:
        """One s_test over all layers at rest."""
        total = 0
        for layer in self.model.tracked:
            rank = self.stored_rank(layer)
            low = self.stored * rank * (layer.outputs + layer.inputs)
            total += low or self.operand * layer.parameters  # dense s_test lies in the precision of products
        return total
