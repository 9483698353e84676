"""Which layers the influence covers, and why the others are left out.

A tracked layer is a linear map, y = W a with W of shape [P, M]: ``nn.Linear``, or the ``Conv1D`` of GPT-2,
which keeps its weight as [in, out], or a convolution of a module in memory (``raylux.patches``). With a bias, the bias
is the last column of W and the input gets a last coordinate of one, so M counts it. By default every linear of an MLP
is tracked, and every matrix of every expert where the MLPs are mixtures (``raylux.experts`` takes fused ones apart); of
a classifier the linears of its head too, and of a module in memory every linear and convolution. Of a model with a LoRA
adapter the adapter's own matrices are tracked, and nothing else.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from raylux.adapters import has_adapter, is_adapter
from raylux.classes import is_classifier
from raylux.errors import UserError
from raylux.experts import ExpertLinear, SplitExperts
from raylux.modules import features_of
from raylux.patches import CONVOLUTIONS, Patches

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
# Why the weights beside an adapter are not tracked.
_FROZEN = "linear of the base model, which was frozen: the adapter's own matrices are tracked"
OTHER_MODALITIES = ("vision", "visual", "audio", "image", "speech")


@dataclass(frozen=True)
class TrackedLayer:
    """One tracked layer: its module path and the shape [P, M] of its weight, bias column included.

    Attributes:
        share: of all tokens that it sees, on average; less than 1 for an expert of a mixture.
        pool: of an expert: what its block calls this matrix of all its experts, which share a least damping.
        patches: of a convolution.
        words: it is the word embedding: its inputs are token ids, and M is how many there are.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool
    conv1d: bool
    share: float = 1.0
    pool: str | None = None
    patches: Patches | None = None
    words: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(P, M): outputs, and inputs with the bias coordinate."""
        return self.outputs, self.inputs

    @property
    def parameters(self) -> int:
        """Weights and biases of the layer."""
        return self.outputs * self.inputs

    @property
    def routed(self) -> bool:
        """Whether it is an expert's, which sees the tokens that are routed to it."""
        return self.pool is not None


@dataclass(frozen=True)
class SkippedLayer:
    """A module with parameters of its own that is not tracked; ``parameters`` counts a shared tensor once.

    ``wanted``: it would be tracked if it could be, which is an error where the config is strict.
    """

    name: str
    type: str
    parameters: int
    reason: str
    wanted: bool = False


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

    def check(self, strict: bool) -> None:
        """Raises UserError where ``strict`` and a layer that is wanted cannot be tracked."""
        missing = [layer for layer in self.skipped if layer.wanted]
        if strict and missing:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"model.strict: '{missing[0].name}' cannot be tracked ({missing[0].reason}){more}; set "
                "model.strict=false to do without, or name the layers you want in model.layers"
            )


def matrices(layers: Sequence[TrackedLayer]) -> list[TrackedLayer]:
    """Those whose gradients are held as matrices: all but the word embedding."""
    return [layer for layer in layers if not layer.words]


def coverage(model: nn.Module, patterns: Sequence[str] | None = None, strict: bool = False) -> Coverage:
    """Choose the tracked layers of a model.

    Args:
        model: a causal LM or a classifier; its weights are not read, so a model on the meta device will do.
        patterns: globs of module paths (``*`` also crosses dots); None: every linear of an MLP and of a classifier's
            head, or of the adapter.
        strict: part of an MLP, or what a pattern names, that cannot be tracked is an error.

    Raises:
        UserError: a pattern matches nothing, or nothing that can be tracked; the model has no MLP layer; ``strict``.
    """
    barriers, adapted = _barriers(model), has_adapter(model)
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
            tracked.append(tracked_layer(name, module, model))
        elif own:
            reason = barriers.get(name) or _reason(name, module, model)
            wanted = _wanted(name, module, patterns, barriers, adapted)
            skipped.append(SkippedLayer(name, type(module).__name__, fresh, reason, wanted))
    found = Coverage(tuple(tracked), tuple(skipped), sum(p.numel() for p in model.parameters()))
    found.check(strict)
    return found


def _no_layers(model: nn.Module, barriers: dict[str, str]) -> str:
    kind = type(model).__name__
    usable = [name for name in _linears(model) if name not in barriers]
    if not usable:
        return f"{kind}: no MLP layers found to track, nor any other linear layer"
    experts = any("expert" in type(module).__name__.lower() for module in model.modules())
    why = "its MLPs are experts of a kind that cannot be tracked" if experts else "no MLP layers found to track"
    return f"{kind}: {why}; name other linear layers in model.layers, such as '{usable[0]}'"


def _wanted(
    name: str, module: nn.Module, patterns: Sequence[str] | None, barriers: dict[str, str], adapted: bool
) -> bool:
    """Whether a module that is not tracked would be, by the patterns or by its place, if it could."""
    if adapted and not is_adapter(name):
        return False  # it was not trained
    if is_adapter(name) and patterns is None:
        return True
    if patterns is not None:
        return name in barriers and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    return (name in barriers and (_in_mlp(name) or _is_expert(name))) or _are_fused_experts(name, module)


def _is_expert(name: str) -> bool:
    return "experts" in name.split(".")[:-1]


def _are_fused_experts(name: str, module: nn.Module) -> bool:
    return "expert" in type(module).__name__.lower() or name.split(".")[-1] == "experts"


def tracked_layer(name: str, module: nn.Module, model: nn.Module | None = None) -> TrackedLayer:
    """Describe a linear, ``Conv1D``, convolution or word embedding; an expert's with the ``model`` that it is of."""
    conv1d = _is_conv1d(module)
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    rows, columns = len(weight), weight[0].numel()
    if isinstance(module, nn.Embedding):
        return TrackedLayer(name, rows, columns, False, False, words=True)
    outputs, inputs = (columns, rows) if conv1d else (rows, columns)
    bias = module.bias is not None
    patches = Patches.of(module) if isinstance(module, CONVOLUTIONS) else None
    layer = TrackedLayer(name, inputs + int(bias), outputs, bias, conv1d, patches=patches)
    if model is None or not isinstance(module, ExpertLinear):
        return layer
    block, _, leaf = name.rsplit(".", 2)
    return replace(layer, share=token_share(model, name, module), pool=f"{block}.*.{leaf}")


def token_share(model: nn.Module, name: str, module: nn.Module) -> float:
    """The share of all tokens that a linear sees on average: all, but for an expert's."""
    if not isinstance(module, ExpertLinear):
        return 1.0
    block = model.get_submodule(name.rsplit(".", 2)[0])
    assert isinstance(block, SplitExperts)
    return block.share


def _linears(model: nn.Module) -> Iterator[str]:
    return (name for name, module in model.named_modules() if _is_linear(module, model))


def _is_linear(module: nn.Module, model: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or _is_conv1d(module):
        return True
    return features_of(model) is not None and isinstance(module, CONVOLUTIONS)


def _is_conv1d(module: nn.Module) -> bool:
    # Who has one has transformers, which a factor shard, without a model, need not import.
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _mlp_names(model: nn.Module, barriers: dict[str, str]) -> set[str]:
    every = has_adapter(model) or features_of(model) is not None
    return {
        name
        for name in _linears(model)
        if name not in barriers
        and (every or _in_mlp(name) or _in_head(name, model) or isinstance(model.get_submodule(name), ExpertLinear))
    }


def _in_head(name: str, model: nn.Module) -> bool:
    """Whether a linear is part of what a classifier has beyond the encoder that it is built on."""
    return is_classifier(model) and not name.startswith(f"{getattr(model, 'base_model_prefix', '')}.")


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
        # Where a pattern takes linears it does not mean the embedding: few kinds of curvature can serve it.
        usable = usable or _words_among(model, found, pattern)
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
    adapted = has_adapter(model)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owner = owners.setdefault(id(parameter), name)
            if owner != name and _is_linear(module, model):
                head = "language-model head" if module is _head(model) else "linear"
                barriers[name] = f"{head} that shares its weight with '{owner}'"
        if adapted and _is_linear(module, model) and not is_adapter(name):
            barriers[name] = _FROZEN
        elif isinstance(module, CONVOLUTIONS) and _is_linear(module, model):
            if module.groups > 1:
                barriers[name] = "convolution in groups"
        elif _is_linear(module, model):
            weight = module.weight
            if not (isinstance(weight, nn.Parameter) and weight.dtype.is_floating_point and weight.dim() == 2):
                barriers[name] = "linear with quantised or packed weights"
            elif _is_expert(name) and not isinstance(module, ExpertLinear):
                # An expert sees some tokens of some sequences, flattened: no token says whose it is.
                barriers[name] = "linear of an expert that is no part of transformers' fused experts"
    return barriers


def _words_among(model: nn.Module, names: Sequence[str], pattern: str) -> list[str]:
    """The word embedding, if it is one of some modules. Raises UserError where it is and cannot be tracked."""
    getter = getattr(model, "get_input_embeddings", None)
    module = getter() if callable(getter) else None
    name = next((name for name in names if module is not None and model.get_submodule(name) is module), None)
    if name is None or not isinstance(module, nn.Embedding):
        return []
    sharing = [
        other
        for other, one in model.named_modules()
        if one is not module and any(p is module.weight for p in one.parameters(recurse=False))
    ]
    why = None
    if has_adapter(model):
        why = "of the base model, which was frozen"
    elif sharing:
        why = f"tied to '{sharing[0]}': its gradient has both uses in it, and is no sum over words"
    elif type(module) is not nn.Embedding or module.max_norm is not None:
        why = f"of a kind ({type(module).__name__}) that scales or bounds its rows"
    if why:
        raise UserError(f"model.layers: '{pattern}' cannot be tracked: '{name}' is a word embedding {why}")
    return [name]


def _head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _reason(name: str, module: nn.Module, model: nn.Module) -> str:
    """Why a module with parameters is not tracked, in the words of the coverage table."""
    kind = type(module).__name__
    parts = name.lower().split(".")
    leaf = parts[-1]
    if is_adapter(name):
        named = "adapter's matrix not named in model.layers"
        return named if _is_linear(module, model) else "adapter of something that is no linear layer"
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
    if _are_fused_experts(name.lower(), module):
        return f"fused experts (type {kind}) of a kind that cannot be taken apart"
    if _has_attention(parts):
        return "attention: not an MLP layer"
    if _is_linear(module, model):
        if features_of(model) is not None:
            return "layer not named in model.layers"
        inside = _in_mlp(name) or isinstance(module, ExpertLinear)
        if _in_head(name, model):
            return "classifier's head not named in model.layers"
        return "MLP layer not named in model.layers" if inside else "linear outside the MLPs"
    return f"type {kind}: not a linear layer"
