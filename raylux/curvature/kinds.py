"""The kinds of curvature by name: which passes over the data each needs, and what it makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raylux.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from raylux.blocks import Square
    from raylux.curvature.spectral import Spectral
    from raylux.curvature.statistics import Statistics
    from raylux.layers import TrackedLayer


@dataclass(frozen=True)
class Kind:
    """What a kind of curvature needs.

    Attributes:
        name: its name in a config.
        basis: needs A, S and their eigenbases (the covariance pass).
        moments: needs the second moments of per-sequence gradients in that basis (the Λ pass).
        normalised: scores are cosines, divided by the norms of the two gradients.
        statistics: what A and S are sums of.
        joint: one exact matrix over all tracked weights (``raylux.curvature.joint``), whose diagonal stands for Λ.
        projected: gradients are divided by the roots of their second moments, projected and whitened
            (``raylux.curvature.projected``), and taken on the data's own labels.
    """

    name: str
    basis: bool = False
    moments: bool = False
    normalised: bool = False
    statistics: Statistics = "tokens"
    joint: bool = False
    projected: bool = False

    @property
    def fitted(self) -> bool:
        return self.basis or self.moments

    @property
    def spectral(self) -> bool:
        """Whether each layer has eigenvalues of its own."""
        return self.fitted and not self.joint and not self.projected

    @property
    def predicts(self) -> bool:
        """Whether a score divided by N is a prediction in nats."""
        return self.fitted and not self.normalised

    def groups(self, found: Mapping[str, str]) -> dict[str, str]:
        """Layer -> the layer whose A it shares, of those that read the same tensor."""
        return dict(found) if self.statistics == "tokens" else {layer: layer for layer in found}

    def mean_product(self, a_mean: float, s_mean: float, inputs: int, rows_per_sequence: float) -> float:
        """The mean of Λ where it is a product of eigenvalues.

        Args:
            a_mean: of the eigenvalues of A.
            s_mean: of those of S.
            inputs: M, how many those of A are.
            rows_per_sequence: T̄.
        """
        product = rows_per_sequence * s_mean * a_mean
        if self.statistics == "tokens":
            return product
        return product / (a_mean * inputs) if a_mean > 0 else 0.0

    def assemble(
        self,
        q_a: Square | None,
        q_s: Square | None,
        a_values: Tensor | None,
        s_values: Tensor | None,
        moments: Tensor | None,
        rows_per_sequence: float,
    ) -> Spectral:
        """The curvature of one layer from what the passes left.

        Args:
            q_a: [M, M] and ``q_s`` [P, P]: eigenvectors of A and S.
            q_s: see ``q_a``.
            a_values: [M] and ``s_values`` [P]: eigenvalues of the token means A and S.
            s_values: see ``a_values``.
            moments: [P, M], the mean of (Q_Sᵀ G Q_A)² over sequences.
            rows_per_sequence: T̄, rows per sequence. Means over rows are multiplied by it: the scale is then that of a
                whole sequence, like every other kind's.
        """
        # What a kind is called and needs is asked by many who compute nothing.
        import torch

        from raylux.curvature.spectral import Spectral

        if self.moments:
            return Spectral(moments, q_a if self.basis else None, q_s if self.basis else None)
        if self.basis:
            assert a_values is not None and s_values is not None
            product = rows_per_sequence * torch.outer(s_values, a_values)
            if self.statistics != "tokens":  # each of the two has the trace of the whole
                product /= a_values.sum().clamp(min=torch.finfo(a_values.dtype).tiny)
            return Spectral(product, q_a, q_s)
        return Spectral()


KINDS = {
    kind.name: kind
    for kind in (
        Kind("ekfac", basis=True, moments=True),
        Kind("kfac", basis=True),
        Kind("tekfac", basis=True, moments=True, statistics="traced"),
        Kind("tkfac", basis=True, statistics="traced"),
        Kind("eshampoo", basis=True, moments=True, statistics="sequences"),
        Kind("shampoo", basis=True, statistics="sequences"),
        Kind("diagonal", moments=True),
        Kind("gauss_newton", moments=True, joint=True),
        Kind("hessian", moments=True, joint=True),
        Kind("trackstar", moments=True, normalised=True, projected=True),
        Kind("identity"),
        Kind("cosine", normalised=True),
    )
}


def check_words(kind: str, layers: Sequence[TrackedLayer]) -> None:
    """Raises UserError where a kind with curvature is to serve the word embedding."""
    words = [layer.name for layer in layers if layer.words]
    if words and KINDS[kind].fitted:
        named = " or ".join(name for name, one in KINDS.items() if not one.fitted)
        raise UserError(
            f"curvature.kind={kind}: '{words[0]}' is the word embedding, of which gradients are kept by word and have "
            f"no curvature; set curvature.kind={named}, or leave it out of model.layers"
        )


def check_segment(kind: str, segment: float | None, solver: str, carried: bool) -> None:
    """Raises UserError where a run cannot stand for a segment of training (SOURCE), or for the stage before another.

    Args:
        kind: of curvature.
        segment: h; None: it is none.
        solver: of queries.
        carried: queries come from the segment or stage after it.
    """
    named = ", ".join(name for name, one in KINDS.items() if one.spectral)
    if segment is None:
        if carried and not KINDS[kind].predicts:
            raise UserError(
                f"query.carried_from: curvature.kind={kind} has no (G + λ)⁻¹ for what is carried; set a fitted kind, "
                "as ekfac, or leave query.carried_from out"
            )
        if carried and solver != "direct":
            raise UserError(
                f"query.carried_from: curvature.solver={solver} solves for a gradient of this model, not for what is "
                "carried; set curvature.solver=direct, or leave query.carried_from out"
            )
    elif not KINDS[kind].spectral:
        raise UserError(
            f"curvature.segment={segment}: curvature.kind={kind} has no eigenvalues layer by layer; set one of the "
            f"kinds {named}, or leave curvature.segment out"
        )
    elif solver != "direct":
        raise UserError(
            f"curvature.segment={segment}: curvature.solver={solver} solves with the inverse, which a segment does not "
            "take; set curvature.solver=direct, or leave curvature.segment out"
        )


def check_end(segment: float | None, carried: bool, what: str) -> None:
    """Raises UserError where ``what``, a command, is about a proximal step of the run's own model and the run is not.

    Args:
        segment: as in ``check_segment``, like ``carried``.
        carried: see ``segment``.
        what: the command.
    """
    if segment is not None:
        raise UserError(
            f"{what}: curvature.segment={segment} predicts what a segment of training does, not a proximal step that "
            "could be measured; take a run without curvature.segment"
        )
    if carried:
        raise UserError(
            f"{what}: with query.carried_from a run predicts what its sequences do through a later training, not a "
            "proximal step of its own model that could be measured; take a run without query.carried_from"
        )


def check_blocks(kind: str, blocks: int) -> None:
    """Raises UserError where a config asks for blocks of what its kind has not."""
    if blocks > 1 and not KINDS[kind].basis:
        named = ", ".join(name for name, one in KINDS.items() if one.basis)
        raise UserError(
            f"curvature.blocks={blocks}: curvature.kind={kind} has no A and S to be kept in blocks; set "
            f"curvature.blocks=1, or one of the kinds {named}"
        )
