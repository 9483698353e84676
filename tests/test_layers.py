"""Which layers are tracked, with which shape, what share of the model that is, and why the rest is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raylux.errors import UserError
from raylux.layers import TrackedLayer, coverage
from tests.architectures import CONTEXT, HIDDEN, LAYERS, NAMES, WIDTH, build

# name: (pattern of a tracked layer's path, leaves with (outputs, inputs), bias, conv1d), in module order.
D, F = WIDTH, HIDDEN
EXPECTED = {
    "gpt2": ("transformer.h.{}.mlp.{}", {"c_fc": (F, D + 1), "c_proj": (D, F + 1)}, True, True),
    "llama": ("model.layers.{}.mlp.{}", {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}, False, False),
    "neox": ("gpt_neox.layers.{}.mlp.{}", {"dense_h_to_4h": (F, D + 1), "dense_4h_to_h": (D, F + 1)}, True, False),
    "qwen2": ("model.layers.{}.mlp.{}", {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}, False, False),
    "qwen3": ("model.layers.{}.mlp.{}", {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}, False, False),
    "opt": ("model.decoder.layers.{}.{}", {"fc1": (F, D + 1), "fc2": (D, F + 1)}, True, False),
}

# Parameters counted by hand: vocabulary 128, width 16, MLP 24, 4 heads of 4, 2 of them for keys and values.
EMBED = 128 * D
NORM = 2 * D  # scale and shift; RMS norms have the scale only
ATTENTION = 4 * D * D
KV_ATTENTION = 2 * D * D + 2 * D * (D // 2)
BIASED_MLP = D * F + F + F * D + D
GATED_MLP = 3 * D * F
TOTAL = {
    "gpt2": EMBED + CONTEXT * D + LAYERS * (2 * NORM + ATTENTION + 4 * D + BIASED_MLP) + NORM,
    "llama": EMBED + LAYERS * (2 * D + KV_ATTENTION + GATED_MLP) + D,
    "neox": 2 * EMBED + LAYERS * (2 * NORM + ATTENTION + 4 * D + BIASED_MLP) + NORM,
    "qwen2": 2 * EMBED + LAYERS * (2 * D + KV_ATTENTION + 2 * D + GATED_MLP) + D,
    "qwen3": EMBED + LAYERS * (2 * D + KV_ATTENTION + 2 * 4 + GATED_MLP) + D,
    "opt": EMBED + (CONTEXT + 2) * D + LAYERS * (2 * NORM + ATTENTION + 4 * D + BIASED_MLP) + NORM,
}
TIED = {"gpt2": "transformer.wte", "llama": "model.embed_tokens", "qwen3": "model.embed_tokens"}
TIED["opt"] = "model.decoder.embed_tokens"


@pytest.mark.parametrize("name", NAMES)
def test_every_mlp_linear_is_tracked_with_its_shape(name: str) -> None:
    pattern, leaves, bias, conv1d = EXPECTED[name]
    expected = tuple(
        TrackedLayer(pattern.format(block, leaf), inputs, outputs, bias, conv1d)
        for block in range(LAYERS)
        for leaf, (outputs, inputs) in leaves.items()
    )
    found = coverage(build(name))
    assert found.tracked == expected
    assert all(layer.shape == (layer.outputs, layer.inputs) for layer in found.tracked)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_share_count_tied_weights_once(name: str) -> None:
    found = coverage(build(name))
    mlp = BIASED_MLP if EXPECTED[name][2] else GATED_MLP
    assert found.parameters == TOTAL[name]
    assert found.share == pytest.approx(LAYERS * mlp / TOTAL[name], abs=1e-15)
    # Nothing falls between the two lists.
    assert sum(s.parameters for s in found.skipped) + sum(t.parameters for t in found.tracked) == TOTAL[name]


@pytest.mark.parametrize("name", NAMES)
def test_each_skip_has_its_reason(name: str) -> None:
    skipped = coverage(build(name)).skipped
    by_kind = {"embed": "embedding", "wte": "embedding", "wpe": "embedding", "norm": "normalisation"}
    for layer in skipped:
        leaf = layer.name.rsplit(".", 1)[-1]
        for part, reason in by_kind.items():
            if part in leaf:
                assert layer.reason == reason, layer
        if ".attn." in layer.name or "attention." in layer.name or "self_attn." in layer.name:
            assert layer.reason.startswith(("attention", "normalisation")), layer
    head = next(layer for layer in skipped if layer.name == "lm_head")
    if name in TIED:
        assert head.reason == f"language-model head that shares its weight with '{TIED[name]}'"
        assert head.parameters == 0
    else:
        assert (head.reason, head.parameters) == ("language-model head", EMBED)


@pytest.mark.parametrize("name", NAMES)
def test_a_tracked_shape_is_the_shape_of_the_weight(name: str) -> None:
    model = build(name)
    for layer in coverage(model).tracked:
        module = model.get_submodule(layer.name)
        assert isinstance(module, Conv1D if layer.conv1d else nn.Linear)
        a_M = torch.randn(layer.inputs - int(layer.bias))
        assert module(a_M).shape == (layer.outputs,)


def test_mlp_biases_are_counted_where_a_config_adds_them() -> None:
    tracked = coverage(build("llama", mlp_bias=True)).tracked
    assert [layer.shape for layer in tracked[:3]] == [(F, D + 1), (F, D + 1), (D, F + 1)]
    assert all(layer.bias for layer in tracked)


def test_structure_without_weights_gives_the_same_coverage() -> None:
    model = build("gpt2")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    empty.tie_weights()
    assert coverage(empty) == coverage(model)


# --- other architectures: which leaves are tracked ----------------------------------------------------------------

_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 64, "rotary_dim": 4, "bos_token_id": 0}
_GPT |= {"eos_token_id": 0}
OTHERS = {
    "gemma": ({**_SMALL, "head_dim": 4}, {"gate_proj", "up_proj", "down_proj"}),
    "gemma2": ({**_SMALL, "head_dim": 4}, {"gate_proj", "up_proj", "down_proj"}),
    "mistral": (_SMALL, {"gate_proj", "up_proj", "down_proj"}),
    "phi": (_SMALL, {"fc1", "fc2"}),
    "phi3": (_SMALL, {"gate_up_proj", "down_proj"}),
    "falcon": (_SMALL, {"dense_h_to_4h", "dense_4h_to_h"}),
    "bloom": ({"hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 64}, {"dense_h_to_4h", "dense_4h_to_h"}),
    "gptj": (_GPT, {"fc_in", "fc_out"}),
    "mpt": ({"d_model": 16, "n_heads": 4, "n_layers": 2, "vocab_size": 64}, {"up_proj", "down_proj"}),
    "gpt_neo": (
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": 64,
        },
        {"c_fc", "c_proj"},
    ),
}


def _empty(kind: str, sizes: dict) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(kind: str) -> None:
    sizes, leaves = OTHERS[kind]
    tracked = coverage(_empty(kind, sizes)).tracked
    assert {layer.name.rsplit(".", 1)[-1] for layer in tracked} == leaves
    assert len(tracked) == 2 * len(leaves)
    assert not [layer.name for layer in tracked if "attn" in layer.name or "attention" in layer.name]


def test_experts_that_are_left_fused_are_named_beside_the_shared_expert_and_the_router() -> None:
    sizes = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}
    found = coverage(_empty("qwen2_moe", {**_SMALL, **sizes}))
    assert {layer.name.split(".mlp.")[1] for layer in found.tracked} == {
        "shared_expert.gate_proj",
        "shared_expert.up_proj",
        "shared_expert.down_proj",
    }
    reasons = {layer.name: layer.reason for layer in found.skipped}
    assert reasons["model.layers.0.mlp.experts"].startswith("fused experts (type Qwen2MoeExperts) of a kind that ")
    assert reasons["model.layers.0.mlp.gate"].startswith("router: ")
    assert reasons["model.layers.0.mlp.shared_expert_gate"].startswith("router: ")


def test_a_model_of_fused_experts_alone_is_refused_by_that_reason() -> None:
    sizes = {**_SMALL, "num_local_experts": 4}
    with pytest.raises(UserError, match=r"MixtralForCausalLM: its MLPs are experts of a kind .*self_attn\.q_proj"):
        coverage(_empty("mixtral", sizes))


# --- patterns ------------------------------------------------------------------------------------------------------


def test_patterns_choose_layers_in_module_order() -> None:
    found = coverage(build("llama"), ("model.layers.1.mlp.*", "*.0.self_attn.o_proj"))
    assert [layer.name for layer in found.tracked] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    reasons = {layer.name: layer.reason for layer in found.skipped}
    assert reasons["model.layers.0.mlp.up_proj"] == "MLP layer not named in model.layers"


def test_a_star_tracks_every_linear_but_the_tied_head() -> None:
    found = coverage(build("llama"), ("*",))
    assert len(found.tracked) == LAYERS * 7
    assert "lm_head" in {layer.name for layer in found.skipped}


def test_an_untied_head_may_be_tracked_when_asked_for() -> None:
    assert coverage(build("qwen2"), ("lm_head",)).tracked == (TrackedLayer("lm_head", D, 128, False, False),)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("model.layers.*.mlp.gate", r"'model\.layers\.\*\.mlp\.gate' matches no module; .*mlp\.gate_proj"),
        ("model.norm", r"'model\.norm' is a LlamaRMSNorm, not a linear layer"),
        ("model.layers.0.mlp", r"'model\.layers\.0\.mlp' is a LlamaMLP, not a linear.*try 'model\.layers\.0\.mlp\.\*'"),
        ("lm_head", r"'lm_head' is a language-model head that shares its weight with 'model\.embed_tokens'"),
    ],
)
def test_a_pattern_that_tracks_nothing_is_an_error(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        coverage(build("llama"), ("model.layers.*.mlp.*", pattern))
    assert "\n" not in str(caught.value)


# --- shapes that no architecture above has ---------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))


class _NoMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 4)


def test_a_model_without_mlp_is_refused_and_says_what_could_be_named() -> None:
    with pytest.raises(UserError, match=r"_NoMlp: no MLP layers found to track; name other .*'attn'"):
        coverage(_NoMlp())
    with pytest.raises(UserError, match="nor any other linear layer"):
        coverage(nn.Sequential(nn.Embedding(4, 4)))


def test_a_module_used_twice_is_one_layer() -> None:
    block = _Block()
    found = coverage(nn.ModuleList([block, block]))
    assert [layer.name for layer in found.tracked] == ["0.mlp.0", "0.mlp.2"]
    assert found.parameters == 20 + 30 + 28


def test_two_layers_that_share_a_weight_are_not_taken_for_two() -> None:
    first, second = _Block(), _Block()
    second.mlp[0].weight = first.mlp[0].weight
    found = coverage(nn.ModuleList([first, second]))
    assert "1.mlp.0" not in {layer.name for layer in found.tracked}
    reasons = {layer.name: layer.reason for layer in found.skipped}
    assert reasons["1.mlp.0"] == "linear that shares its weight with '0.mlp.0'"
