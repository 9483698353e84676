"""The proximal optimum: what the tracked weights become when a sequence counts a little more in training.

Influence predicts, to first order in ε, what a measurement does between θ_s (the model as it is) and

    θ*(ε) = argmin_θ  (1/N) Σ_i Σ_t KL(p_s(·|i,t) ‖ p_θ(·|i,t))  +  Σ_l (λ_l/2) |θ_l − θ_s,l|²  +  ε L_z(θ),

the proximal Bregman objective of Grosse et al. 2023, eq. 7 (Bae et al. 2022), where only the tracked layers
move: t runs over the positions that carry a label, L_z is the summed token loss of the sequence z that is
added, and λ_l the damping of its layer. At θ_s the first term has curvature G (the Gauss-Newton matrix per
sequence) and no gradient, hence θ* − θ_s ≈ ε (G + λ)⁻¹ ∇log p(z), whether or not training had converged. Here
θ* is found by L-BFGS, without any approximation of G: that is the truth an approximation is held against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raylux.batches import IGNORED, Batch, TokenRow, collate, fit_batches
from raylux.capture import Capture
from raylux.errors import NumericsError, UserError
from raylux.influence.dots import sequence_gradients
from raylux.layers import TrackedLayer
from raylux.parameters import Weights, called_with, flat, parameters_of, unflat
from raylux.tasks import task_of


@dataclass(frozen=True)
class Optimum:
    """Where the search ended.

    Attributes:
        weights: the tracked parameters there; what ``ProximalObjective.logprobs`` takes.
        value: the objective.
        gradient: norm of its gradient in the coordinates sqrt(λ_l) (θ_l − θ_s,l), in which the penalty alone has
            curvature 1: where the rest of the objective is convex too, the optimum is no farther away than this.
        start: the same at θ_s, where no farther away than this the optimum lay.
        evaluations: of the objective and its gradient.
        step: (θ* − θ_s)/ε in the coordinates of the search, flat: where another search may begin.
    """

    weights: dict[str, Tensor]
    value: float
    gradient: float
    start: float
    evaluations: int
    step: Tensor


class ProximalObjective:
    """The proximal Bregman objective of one model on the sequences it was trained on.

    Args:
        model: a causal LM, a classifier or a marked module in eval mode; it is left as it is. Use float64: the effect
            of one sequence is a difference of two nearly equal numbers. (The RMS norms of transformers compute in
            float32 all the same; with those, keep ε above 1e-3 or so.)
        layers: the tracked layers.
        rows: the N training sequences.
        damping: λ of each layer, per sequence, as the run used it (all > 0).
        batch_tokens: padded tokens of a batch, at most.
        draws: gradients of sequences, their labels drawn from the model, that choose the coordinates of the
            search. With too few, it takes more steps; where the optimum lies does not depend on them. They take
            draws × tracked parameters of memory.

    The model's log-probabilities on ``rows`` are computed once and kept: labelled tokens × vocabulary numbers.

    Raises:
        UserError: there are no rows, or a layer's damping is missing or not above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[TrackedLayer],
        rows: Sequence[TokenRow],
        damping: Mapping[str, float],
        batch_tokens: int = 4096,
        draws: int = 1024,
    ) -> None:
        weak = [layer.name for layer in layers if not damping.get(layer.name, 0.0) > 0.0]
        if weak or not rows:
            missing = f"damping of '{weak[0]}' must be above 0" if weak else "needs training sequences"
            raise UserError(f"proximal optimum: {missing}")
        self.model = model
        self.layers = tuple(layers)
        self.size = len(rows)
        self._task = task_of(model)
        self._start = parameters_of(model, layers)
        self._batches: list[tuple[Batch, Tensor]] = []
        with torch.no_grad():
            for batch in fit_batches(rows, batch_tokens):
                batch = batch.to(self._device)
                self._batches.append((batch, self._logits(self._start, batch).log_softmax(-1)))
        own_dtype = next(iter(self._start.values())).dtype
        parts = [
            torch.full((layer.parameters,), damping[layer.name] ** 0.5, dtype=own_dtype, device=self._device)
            for layer in layers
        ]
        # sqrt(λ) of each tracked parameter, layer after layer.
        self._scale = torch.cat(parts)
        self._basis, self._values = self._sketch(Capture(model, layers), draws)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._start.values())).device

    def optimum(
        self,
        added: TokenRow | Sequence[TokenRow],
        weight: float,
        iterations: int = 200,
        tolerance: float = 1e-5,
        near: Optimum | None = None,
    ) -> Optimum:
        """θ* for an added sequence, by full-batch L-BFGS from θ_s with a strong-Wolfe line search.

        Args:
            added: the sequence z, or several that are added together: L_z is then their sum.
            weight: ε; 1/N for one more copy, negative to take one away.
            iterations: of L-BFGS, at most.
            tolerance: stop where every entry of the gradient, in the coordinates of the search, is below this
                share of the gradient's norm at θ_s.
            near: the optimum of the same sequence for another ε, to begin at instead of θ_s: a whole copy is
                found sooner from a tenth of one.

        Raises:
            NumericsError: the objective is not finite.
        """
        if weight == 0:
            raise UserError("proximal optimum: the weight of the added sequence is 0")
        batch = self._batch([added] if isinstance(added, TokenRow) else added)
        u = torch.zeros_like(self._scale, requires_grad=True)
        evaluations = 0

        def closure() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return self._backward(u, batch, weight)

        closure()
        start, steepest = self._gradient_norm(u, weight), float(_gradient(u).norm())
        if near is not None:
            with torch.no_grad():
                u.copy_(near.step)
        search = torch.optim.LBFGS(
            [u],
            max_iter=iterations,
            max_eval=3 * iterations,
            tolerance_grad=tolerance * steepest,
            tolerance_change=0.0,
            history_size=100,
            line_search_fn="strong_wolfe",
        )
        search.step(closure)
        value = float(closure()) * weight**2
        with torch.no_grad():
            weights = self._weights(self._change(u, weight))
        return Optimum(weights, value, self._gradient_norm(u, weight), start, evaluations, u.detach())

    def logprobs(self, rows: Sequence[TokenRow], weights: Weights | None = None) -> Tensor:
        """Log p of each row's labelled tokens [len(rows)], in nats, under ``weights`` (default: θ_s)."""
        weights = self._start if weights is None else weights
        batch = self._batch(rows)
        with torch.no_grad():
            return -self._losses(weights, batch)

    def _batch(self, rows: Sequence[TokenRow]) -> Batch:
        return collate(rows, range(len(rows)), max(len(row.tokens) for row in rows)).to(self._device)

    def rounded(self, seed: int) -> dict[str, Tensor]:
        """The tracked weights at θ_s, each with its last bit moved up or down at random."""
        generator = torch.Generator().manual_seed(seed)
        found = {}
        for name, x in self._start.items():
            up = torch.rand(x.shape, generator=generator).to(x.device) < 0.5
            found[name] = torch.nextafter(x, torch.where(up, torch.inf, -torch.inf).to(x.dtype))
        return found

    def _sketch(self, capture: Capture, draws: int) -> tuple[Tensor, Tensor]:
        """Eigenvectors [p, k] and eigenvalues [k] of a sampled Fisher matrix by sqrt(λ) θ: G as far as it shows."""
        generator = torch.Generator(self._device).manual_seed(0)

        def draw(probabilities: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
            return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

        rows: list[Tensor] = []
        while len(rows) < draws:
            for batch, _ in self._batches:
                captured = capture.run(batch, draw)
                parts = [sequence_gradients(captured.inputs[x.name], captured.grads[x.name]) for x in self.layers]
                flat = torch.cat([part.flatten(1) for part in parts], 1) / self._scale
                rows += list(flat[: draws - len(rows)])
        matrix = torch.stack(rows) / len(rows) ** 0.5
        # The p × p matrix has the nonzero eigenvalues of the draws × draws one: the smaller is taken apart.
        few = len(matrix) < matrix.shape[1]
        values, vectors = torch.linalg.eigh(matrix @ matrix.T if few else matrix.T @ matrix)
        kept = values > 1e-3
        vectors, values = vectors[:, kept], values[kept]
        return (matrix.T @ vectors) / values.sqrt() if few else vectors, values

    def _power(self, x: Tensor, exponent: float) -> Tensor:
        """(1 + sampled Fisher)^exponent x."""
        return x + self._basis @ (((1 + self._values) ** exponent - 1) * (self._basis.T @ x))

    def _change(self, u: Tensor, weight: float) -> Tensor:
        """sqrt(λ) (θ − θ_s): the search runs in u, where all directions have about the same curvature."""
        return weight * self._power(u, -0.5)

    def _weights(self, change: Tensor) -> dict[str, Tensor]:
        """The tracked parameters at sqrt(λ) (θ − θ_s)."""
        moved = unflat(self.layers, change / self._scale, self._start)
        return {name: x + moved[name] for name, x in self._start.items()}

    def _gradient_norm(self, u: Tensor, weight: float) -> float:
        """Norm of the gradient by sqrt(λ) θ, from that by u."""
        return abs(weight) * float(self._power(_gradient(u), 0.5).norm())

    def _backward(self, u: Tensor, added: Batch, weight: float) -> Tensor:
        """The objective over ε², which makes every amount the same task; its gradient is left in ``u.grad``."""
        change = self._change(u.detach(), weight)
        weights = {name: x.requires_grad_(True) for name, x in self._weights(change).items()}
        total = change.square().sum().double().cpu() / 2 / weight**2
        # One graph per term and batch, back to the weights alone: memory does not grow with the training set.
        for term in self._terms(weights, added, weight):
            scaled = term / weight**2
            scaled.backward()
            total += scaled.detach().cpu()
        if not torch.isfinite(total):
            raise NumericsError("proximal optimum: the objective is not finite")
        # The way from u to the weights is linear and symmetric but for the scale: once for all of the batches.
        slopes = flat(self.layers, {name: _gradient(x) for name, x in weights.items()})
        u.grad = weight * self._power(slopes / self._scale + change / weight**2, -0.5)
        return total

    def _terms(self, weights: Weights, added: Batch, weight: float) -> Iterator[Tensor]:
        for batch, log_p in self._batches:
            gap = log_p - self._logits(weights, batch).log_softmax(-1)
            # Σ p log(p/q), with Σ (q − p) = 0 added so that every summand is of second order in the gap: the
            # plain sum cancels, and its rounding, over ε², would mislead the line search.
            yield (log_p.exp() * (torch.expm1(-gap) + gap)).sum() / self.size
        yield weight * self._losses(weights, added).sum()

    def _logits(self, weights: Weights, batch: Batch) -> Tensor:
        """Logits of the counted positions [n, V]."""
        logits = self._task.logits(called_with(self.model, weights), batch)
        return logits.reshape(-1, logits.shape[-1])[self._task.targets(batch).reshape(-1) != IGNORED]

    def _losses(self, weights: Weights, batch: Batch) -> Tensor:
        """Summed token loss of each row [B]."""
        labels = self._task.targets(batch)
        sequence, _ = (labels != IGNORED).nonzero(as_tuple=True)
        token_losses = nn.functional.cross_entropy(
            self._logits(weights, batch), labels[labels != IGNORED], reduction="none"
        )
        return torch.zeros(len(labels), dtype=token_losses.dtype, device=token_losses.device).index_add(
            0, sequence, token_losses
        )


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad
