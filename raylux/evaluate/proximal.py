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

import numpy as np
import torch
from torch import Tensor, nn

from raylux.batches import IGNORED, Batch, TokenRow, collate, fit_batches
from raylux.capture import Capture
from raylux.curvature.gauss_newton import add_products
from raylux.errors import NumericsError, UserError
from raylux.influence.dots import sequence_gradients
from raylux.layers import TrackedLayer
from raylux.parameters import Weights, called_with, flat, parameters_of, unflat
from raylux.tasks import task_of

# Memory for the gradients that choose the coordinates of a search.
_DRAWN_BYTES = 1 << 30
_FEWEST_DRAWS, _MOST_DRAWS = 64, 4096
# Steps that L-BFGS remembers, two vectors each.
_HISTORY = 100


def draws_for(layers: Sequence[TrackedLayer]) -> int:
    """Sampled gradients that choose a search's coordinates: more than there are weights, where memory allows."""
    size = sum(layer.parameters for layer in layers)
    return max(_FEWEST_DRAWS, min(size + size // 2, _MOST_DRAWS, _DRAWN_BYTES // (8 * size)))


def memory_of(rows: Sequence[TokenRow], width: int, layers: Sequence[TrackedLayer], draws: int) -> int:
    """Bytes of a search in float64: log-probabilities of the rows, drawn gradients with their basis, its history.

    Args:
        rows: the training sequences.
        width: entries of a row of logits.
        layers: tracked.
        draws: as of ``ProximalObjective``.
    """
    labelled = sum(int((np.asarray(row.labels) >= 0).sum()) for row in rows)
    size = sum(layer.parameters for layer in layers)
    return 8 * (labelled * width + 2 * draws * size + _HISTORY * 2 * size)


def check_layers(what: str, layers: Sequence[TrackedLayer]) -> None:
    """Raises UserError where ``what``, a command, is about tracked layers that have no proximal optimum here."""
    routed = [layer.name for layer in layers if layer.routed]
    if routed:
        raise UserError(
            f"{what}: '{routed[0]}' belongs to an expert, whose proximal optimum is not defined here; take a run whose "
            "model.layers leave experts out"
        )


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
        self._capture = Capture(model, layers)
        self._basis, self._values = self._sketch(draws)

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
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )
        search.step(closure)
        value = float(closure()) * weight**2
        with torch.no_grad():
            weights = self._weights(self._change(u, weight))
        return Optimum(weights, value, self._gradient_norm(u, weight), start, evaluations, u.detach())

    def linearised(
        self, added: TokenRow | Sequence[TokenRow], weight: float, iterations: int = 500, tolerance: float = 1e-8
    ) -> dict[str, Tensor]:
        """−ε (G + λ)⁻¹ ∇L_z, the change of the tracked weights to first order in ε, with the exact G of all rows.

        By conjugate gradients in the coordinates of ``optimum``.

        Args:
            added: as of ``optimum``.
            weight: ε.
            iterations: at most; each is a product with G.
            tolerance: of the error in the norm of G + λ, as a share of the solution's, as far as the sampled Fisher
                matrix that preconditions the solve is G.

        Raises:
            NumericsError: the error is not that small after so many.
        """
        weights = {name: x.clone().requires_grad_(True) for name, x in self._start.items()}
        self._losses(weights, self._batch([added] if isinstance(added, TokenRow) else added)).sum().backward()
        slope = flat(self.layers, {name: _gradient(x) for name, x in weights.items()}) / self._scale
        found, left = torch.zeros_like(slope), -weight * slope
        direction = towards = self._power(left, -1.0)
        first = inner = float(left @ towards)
        for _ in range(iterations):
            if inner <= tolerance**2 * first:
                return unflat(self.layers, found / self._scale, self._start)
            image = direction + self._curved(direction)
            step = inner / float(direction @ image)
            found, left = found + step * direction, left - step * image
            towards = self._power(left, -1.0)
            before, inner = inner, float(left @ towards)
            direction = towards + inner / before * direction
        share = (inner / first) ** 0.5
        raise NumericsError(f"linearised optimum: an error of {share:.1g} is left after {iterations} products with G")

    def slopes(self, rows: Sequence[TokenRow], change: Weights) -> Tensor:
        """Derivative of ``logprobs`` at θ_s along a change of the tracked weights [len(rows)], in nats."""
        found = []
        for row in rows:
            weights = {name: x.clone().requires_grad_(True) for name, x in self._start.items()}
            self._losses(weights, self._batch([row])).sum().backward()
            found.append(-sum((_gradient(x) * change[name]).sum().double() for name, x in weights.items()))
        return torch.stack([torch.as_tensor(value) for value in found])

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

    def _sketch(self, draws: int) -> tuple[Tensor, Tensor]:
        """Eigenvectors [p, k] and eigenvalues [k] of a sampled Fisher matrix by sqrt(λ) θ: G as far as it shows."""
        generator = torch.Generator(self._device).manual_seed(0)

        def draw(probabilities: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
            return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

        rows: list[Tensor] = []
        while len(rows) < draws:
            for batch, _ in self._batches:
                captured = self._capture.run(batch, draw)
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

    def _curved(self, x: Tensor) -> Tensor:
        """G x in the coordinates sqrt(λ) θ."""
        parts = (x / self._scale).split([layer.parameters for layer in self.layers])
        vector = {layer.name: part.view(layer.shape) for layer, part in zip(self.layers, parts, strict=True)}
        total = {name: torch.zeros_like(part) for name, part in vector.items()}
        for batch, _ in self._batches:
            add_products(self._capture, batch, [vector], [total])
        return torch.cat([total[layer.name].flatten() for layer in self.layers]) / self.size / self._scale

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
