"""Which layers the influence covers, and why the others are left out.

A tracked layer is a linear map, y = W a with W of shape [P, M]: ``nn.Linear``, or the ``Conv1D`` of GPT-2,
which keeps its weight as [in, out]. With a bias, the bias is the last column of W and the input gets a
last coordinate of one, so M counts it. By default every linear of an MLP is tracked.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from raylux.errors import UserError

# Names of the module that holds an MLP, as transformers' architectures have them.
MLP_PARTS = frozenset(
    {"mlp", "ffn", "ff", "feed_forward", "feedforward", "mlp_block", "shared_mlp", "shared_expert", "shared_experts"}
)
# Names of an MLP's linears in architectures that hang them directly into the block (OPT, XGLM, BART …).
MLP_LEAVES = frozenset(
    {"fc1", "fc2", "fc_in", "fc_out", "c_fc", "dense_h_to_4h", "dense_4h_to_h", "gate_proj", "up_proj", "down_proj"}
)
# What chooses experts: one linear, or a small network below such a name.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "gate_network"})
OTHER_MODALITIES = ("vision", "visual", "audio", "image", "speech")


@dataclass(frozen=True)
class TrackedLayer:
    """One tracked layer: its module path and the shape [P, M] of its weight, bias column included."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    conv1d: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(P, M): outputs, and inputs with the bias coordinate."""
        return self.outputs, self.inputs

    @property
    def parameters(self) -> int:
        """Weights and biases of the layer."""
        return self.outputs * self.inputs


@dataclass(frozen=True)
class SkippedLayer:
    """A module with parameters of its own that is not tracked; ``parameters`` counts a shared tensor once."""

    name: str
    type: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """What is tracked (in module order), what is not and why; ``parameters`` of the model, tied counted once."""

    tracked: tuple[TrackedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    parameters: int

    @property
    def share(self) -> float:
        """Tracked parameters as a share of all."""
        return sum(layer.parameters for layer in self.tracked) / self.parameters


def coverage(model: nn.Module, patterns: Sequence[str] | None = None) -> Coverage:
    """Choose the tracked layers of a model.

    Args:
        model: a causal LM; its weights are not read, so a model on the meta device will do.
        patterns: globs of module paths (``*`` also crosses dots); None: every linear of an MLP.

    Raises:
        UserError: a pattern matches nothing, or nothing that can be tracked; the model has no MLP layer.
    """
    barriers = _barriers(model)
    chosen = _mlp_names(model, barriers) if patterns is None else _matching(model, patterns, barriers)
    if not chosen:
        raise UserError(_no_layers(model, barriers))
    tracked: list[TrackedLayer] = []
    skipped: list[SkippedLayer] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        fresh = sum(p.numel() for p in own if id(p) not in seen)
        seen.update(id(p) for p in own)
        if name in chosen:
            tracked.append(tracked_layer(name, module))
        elif own:
            reason = barriers.get(name) or _reason(name, module, model)
            skipped.append(SkippedLayer(name, type(module).__name__, fresh, reason))
    return Coverage(tuple(tracked), tuple(skipped), sum(p.numel() for p in model.parameters()))


def _no_layers(model: nn.Module, barriers: dict[str, str]) -> str:
    kind = type(model).__name__
    usable = [name for name in _linears(model) if name not in barriers]
    if not usable:
        return f"{kind}: no MLP layers found to track, nor any other linear layer"
    experts = any("expert" in type(module).__name__.lower() for module in model.modules())
    why = "its MLPs are routed experts, which are not tracked yet" if experts else "no MLP layers found to track"
    return f"{kind}: {why}; name other linear layers in model.layers, such as '{usable[0]}'"


def tracked_layer(name: str, module: nn.Module) -> TrackedLayer:
    """Describe one ``nn.Linear`` or ``Conv1D``."""
    conv1d = isinstance(module, Conv1D)
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    rows, columns = weight.shape
    outputs, inputs = (columns, rows) if conv1d else (rows, columns)
    bias = module.bias is not None
    return TrackedLayer(name, inputs + int(bias), outputs, bias, conv1d)


def _linears(model: nn.Module) -> Iterator[str]:
    return (name for name, module in model.named_modules() if _is_linear(module))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _mlp_names(model: nn.Module, barriers: dict[str, str]) -> set[str]:
    return {name for name in _linears(model) if name not in barriers and _in_mlp(name)}


def _in_mlp(name: str) -> bool:
    """Whether a linear's path says that it is part of an MLP on text tokens."""
    parts = name.split(".")
    if _has_attention(parts) or any(word in part for part in parts for word in OTHER_MODALITIES):
        return False
    if any(part in ROUTERS for part in parts):
        return False
    if any(part in MLP_PARTS for part in parts[:-1]):
        return True
    in_block = any(part.isdigit() for part in parts)
    bert = len(parts) > 1 and parts[-1] == "dense" and parts[-2] in {"intermediate", "output"}
    return in_block and (parts[-1] in MLP_LEAVES or bert)


def _has_attention(parts: Sequence[str]) -> bool:
    return any("attn" in part or "attention" in part for part in parts)


def _matching(model: nn.Module, patterns: Sequence[str], barriers: dict[str, str]) -> set[str]:
    names = [name for name, _ in model.named_modules() if name]
    linears = set(_linears(model))
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, sorted(linears), n=3, cutoff=0.0)
            raise UserError(f"model.layers: '{pattern}' matches no module; linear layers are called {', '.join(near)}")
        usable = [name for name in found if name in linears and name not in barriers]
        if not usable:
            blocked = next((f"'{name}' is a {barriers[name]}" for name in found if name in barriers), None)
            kind = f"'{found[0]}' is a {type(model.get_submodule(found[0])).__name__}, not a linear layer"
            below = [name for name in sorted(linears) if name.startswith(f"{found[0]}.")]
            hint = f"; try '{pattern}.*'" if below and not blocked else ""
            raise UserError(f"model.layers: '{pattern}' matches nothing that can be tracked: {blocked or kind}{hint}")
        chosen.update(usable)
    return chosen


def _barriers(model: nn.Module) -> dict[str, str]:
    """Linears that cannot be tracked, even when asked for: {name: reason}."""
    owners: dict[int, str] = {}
    barriers: dict[str, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owner = owners.setdefault(id(parameter), name)
            if owner != name and _is_linear(module):
                head = "language-model head" if module is _head(model) else "linear"
                barriers[name] = f"{head} that shares its weight with '{owner}'"
        if _is_linear(module):
            weight = module.weight
            if not (isinstance(weight, nn.Parameter) and weight.dtype.is_floating_point and weight.dim() == 2):
                barriers[name] = "linear with quantised or packed weights"
            elif "experts" in name.split(".")[:-1]:
                # An expert sees some tokens of some sequences, flattened: no token says whose it is.
                barriers[name] = "linear of an expert: routed tokens are not tracked yet"
    return barriers


def _head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _reason(name: str, module: nn.Module, model: nn.Module) -> str:
    """Why a module with parameters is not tracked, in the words of the coverage table."""
    kind = type(module).__name__
    parts = name.lower().split(".")
    leaf = parts[-1]
    if module is _head(model):
        return "language-model head"
    if isinstance(module, nn.Embedding) or "embedding" in kind.lower():
        return "embedding"
    if "norm" in kind.lower() or "norm" in leaf or leaf.startswith("ln_"):
        return "normalisation"
    if any(word in part for part in parts for word in OTHER_MODALITIES):
        return "another modality: does not act on text tokens"
    if "router" in kind.lower() or any(part in ROUTERS for part in parts):
        return f"router: a choice of experts ({kind}), not an MLP layer"
    if "expert" in kind.lower() or leaf == "experts":
        return f"fused experts (type {kind}): not tracked yet"
    if _has_attention(parts):
        return "attention: not an MLP layer"
    if _is_linear(module):
        return "MLP layer not named in model.layers" if _in_mlp(name) else "linear outside the MLPs"
    return f"type {kind}: not a linear layer"
