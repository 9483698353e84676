"""Mixtures of experts: fused weights taken apart, so that each expert's matrices are linear layers of their own.

transformers keeps the experts of a block in 3-D parameters (``gate_up_proj`` [E, 2I, D], ``down_proj`` [E, D, I]) and
has several ways to multiply by them. Here each expert gets modules ``gate_proj``, ``up_proj`` and ``down_proj`` whose
weights are views of those parameters, and one way to run them: every expert on the tokens that were routed to it, laid
out as ``Routed`` says, in products whose shape follows from that of the batch. So a token's bits do not depend on the
tokens that other sequences send to the same expert. Sums over the experts of a token are taken in the router's order.

Legend: E experts, k of them per token, N sequences of T tokens (S = N·T), D width of the model, I of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from raylux.routed import ROW_BLOCK, Routed, whole_blocks

# Of an expert's matrices, in the order in which they are run.
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
# Experts per token, as configs call it.
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts")


class ExpertLinear(nn.Linear):
    """One matrix of one expert, applied to rows a fixed number at a time."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        own = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", own)

    def forward(self, x: Tensor, step: int | None = None) -> Tensor:
        """[R, out] from x [R, in], ``step`` rows in a product; default: all of them."""
        products = [nn.functional.linear(part, self.weight, self.bias) for part in x.split(step or max(1, len(x)))]
        return torch.cat(products) if len(products) > 1 else products[0]


@dataclass(frozen=True)
class Routing:
    """Which rows each expert of a block has in a batch. Pairs (token, one of its k experts) are numbered S·k.

    Attributes:
        pairs: [R] the pair of each row; S·k on rows of zeros.
        rows: [S·k] the row of each pair; R where a token goes nowhere (padding).
        sizes: expert -> rows of each of the N sequences.
        totals: expert -> its rows, in whole steps.
        places: [R] the place of a row's token in its sequence, -1 on rows of zeros.
        step: rows of a product.
    """

    pairs: Tensor
    rows: Tensor
    sizes: list[tuple[int, ...]]
    totals: list[int]
    places: Tensor
    step: int

    @classmethod
    def of(cls, index: Tensor, mask: Tensor, experts: int) -> Routing:
        """From the router's choice.

        Args:
            index: [S, k] experts of each token; E or more: none.
            mask: [N, T] True on the tokens that count.
            experts: E.
        """
        device, (count, tokens), active = index.device, mask.shape, index.shape[1]
        index, mask = index.cpu(), mask.cpu()
        # What an expert gets on average: a function of the batch's shape.
        step = whole_blocks(-(-index.numel() // experts))
        sequence = torch.arange(count).repeat_interleave(tokens)[:, None]
        goes = mask.reshape(-1, 1) & (index < experts)
        groups = experts * count
        group = torch.where(goes, index * count + sequence, groups).reshape(-1)
        # Pairs by expert, then by sequence, then by token.
        order = torch.argsort(group, stable=True)
        counts = torch.bincount(group, minlength=groups + 1)[:groups]
        order = order[: int(counts.sum())]
        sizes = ((counts + ROW_BLOCK - 1) // ROW_BLOCK * ROW_BLOCK).view(experts, count)
        totals = (sizes.sum(1) + step - 1) // step * step
        starts = (totals.cumsum(0) - totals)[:, None] + sizes.cumsum(1) - sizes
        rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[group[order]]
        row, total = starts.reshape(-1)[group[order]] + rank, int(totals.sum())
        pairs = torch.full((total,), index.numel())
        rows = torch.full((index.numel(),), total)
        pairs[row], rows[order] = order, row
        places = torch.where(pairs < index.numel(), pairs // active % tokens, -1)
        by_expert = [tuple(own) for own in sizes.tolist()]
        return cls(pairs.to(device), rows.to(device), by_expert, totals.tolist(), places.to(device), step)

    def routed(self, expert: int, rows: Tensor) -> Routed:
        """An expert's rows, as the modules saw them, by sequence."""
        start, size = sum(self.totals[:expert]), sum(self.sizes[expert])
        return Routed(rows[:size], self.sizes[expert], self.places[start : start + size])


class _Pick(torch.autograd.Function):
    """Rows of x by their numbers, and back by the inverse: neither way adds anything up, so the order is no matter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _rows(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rows(grad, ctx.saved_tensors[0]), None, None


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index]; a row of zeros where the index is the number of rows."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[index]


class SplitExperts(nn.Module):
    """The experts of one block, in place of transformers' module, whose weights they share.

    Attributes:
        mask: [N, T], set by who runs a batch: True on the tokens that count; others get zeros. None: one sequence.
        routing: of the last forward pass.
        share: k/E, the share of all tokens that an expert gets on average.
    """

    def __init__(self, fused: Any, active: int | None) -> None:
        super().__init__()
        self.mask: Tensor | None = None
        self.routing: Routing | None = None
        self.experts = int(fused.down_proj.shape[0])
        self.share = min(1.0, (active or self.experts) / self.experts)
        for expert in range(self.experts):
            one = nn.Module()
            for name, (weight, bias) in _matrices(fused, expert).items():
                one.add_module(name, ExpertLinear(weight, bias))
            self.add_module(str(expert), one)
        for name in list(fused._parameters):
            del fused._parameters[name]
        # Its activation and gate are used; no module of this one, since its weights are.
        self._fused = (fused,)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[S, D] from hidden_states [S, D], each token's experts [S, k] and their weights [S, k]."""
        if isinstance(hidden_states, FakeTensor):
            return hidden_states  # a tensor without numbers says nothing about routes
        count, active = top_k_index.shape
        mask = self.mask if self.mask is not None else torch.ones(1, count, dtype=torch.bool)
        routing = self.routing = Routing.of(top_k_index, mask, self.experts)
        pairs = hidden_states[:, None].expand(count, active, -1).reshape(count * active, -1)
        rows = _Pick.apply(pairs, routing.pairs, routing.rows)
        found = [
            self._expert(expert, part, routing.step)
            for expert, part in enumerate(rows.split(routing.totals))
            if len(part)
        ]
        outputs = torch.cat(found) if found else rows
        weighted = _Pick.apply(outputs, routing.rows, routing.pairs).view(count, active, -1) * top_k_weights[..., None]
        return weighted.sum(1).to(hidden_states.dtype)

    def _expert(self, expert: int, x: Tensor, step: int) -> Tensor:
        one, (fused,) = self.get_submodule(str(expert)), self._fused
        up = one.get_submodule(UP)(x, step)
        if not fused.has_gate:
            return one.get_submodule(DOWN)(fused.act_fn(up), step)
        gate = one.get_submodule(GATE)(x, step)
        both = torch.cat([gate, up], -1) if fused.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
        return one.get_submodule(DOWN)(fused._apply_gate(both), step)


def _matrices(fused: Any, expert: int) -> dict[str, tuple[Tensor, Tensor | None]]:
    """(weight [out, in], bias [out]) of an expert's matrices, as views of the fused parameters."""

    def one(name: str) -> tuple[Tensor, Tensor | None]:
        weight = getattr(fused, name)[expert]
        bias = getattr(fused, f"{name}_bias")[expert] if fused.has_bias else None
        return (weight.T if fused.is_transposed else weight), bias

    if not fused.has_gate:
        return {UP: one("up_proj"), DOWN: one("down_proj")}
    weight, bias = one("gate_up_proj")
    size = len(weight) // 2
    halves = (slice(size), slice(size, None)) if fused.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
    gate, up = ((weight[half], None if bias is None else bias[half]) for half in halves)
    return {GATE: gate, UP: up, DOWN: one("down_proj")}


def can_split(module: Any) -> bool:
    """Whether a module is one of transformers' fused experts, run by its common interface, and holds nothing else."""
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated")):
        return False
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    names += [f"{name}_bias" for name in names] if module.has_bias else []
    own = dict(module.named_parameters())
    return (
        not getattr(module, "has_post_expert_norm", False)
        and set(own) == set(names)
        and all(p.dtype.is_floating_point and p.dim() == (2 if n.endswith("_bias") else 3) for n, p in own.items())
    )


def split_experts(model: nn.Module) -> None:
    """Take the fused experts of a model apart, in place; what cannot be is left as it is.

    The model's weights must be where they are to stay: the new modules' are views of them.
    """
    config = getattr(model, "config", None)
    config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    known = (getattr(config, name, None) for name in _ACTIVE)
    active = next((value for value in known if isinstance(value, int)), None)
    for name, module in list(model.named_modules()):
        if can_split(module):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, SplitExperts(module, active).train(module.training))
