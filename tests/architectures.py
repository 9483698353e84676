"""Tiny seeded models of the architectures that raylux is tried on.

Every parameter is random, biases and norms included (transformers starts them at 0 and 1, and a lost bias
would not show), and large enough that predictions are far from uniform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# Sizes that tell dimensions apart: width 16, MLP 24, 4 heads (2 for keys and values), 2 layers, 64 positions.
WIDTH, HIDDEN, HEADS, LAYERS, CONTEXT = 16, 24, 4, 2, 64
_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
_LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "use_cache": False,
    **_IDS,
}


def _gpt2(vocab: int, overrides: dict[str, Any]) -> PreTrainedModel:
    """Conv1D, biases everywhere, learned positions, tied embeddings."""
    sizes = {"n_embd": WIDTH, "n_inner": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, **{**sizes, **still, **_IDS, **overrides}))


def _llama(vocab: int, overrides: dict[str, Any]) -> PreTrainedModel:
    """Gated MLP without biases, tied embeddings as in SmolLM2."""
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **{"tie_word_embeddings": True, **_LLAMA, **overrides}))


def _neox(vocab: int, overrides: dict[str, Any]) -> PreTrainedModel:
    """Parallel attention and MLP, biases, untied embeddings (Pythia)."""
    sizes = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocab, **{**sizes, **overrides}))


def _qwen2(vocab: int, overrides: dict[str, Any]) -> PreTrainedModel:
    """Gated MLP, biases in the attention only, untied embeddings."""
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab, **{"tie_word_embeddings": False, **_LLAMA, **overrides}))


def _qwen3(vocab: int, overrides: dict[str, Any]) -> PreTrainedModel:
    """As Qwen2 without biases, with norms on queries and keys."""
    sizes = {"tie_word_embeddings": True, "head_dim": 4, **_LLAMA}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab, **{**sizes, **overrides}))


def _opt(vocab: int, overrides: dict[str, Any]) -> PreTrainedModel:
    """MLP linears that hang directly in the block, biases, tied embeddings, positions counted by the mask."""
    sizes = {
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "ffn_dim": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "dropout": 0.0,
        "use_cache": False,
    }
    return OPTForCausalLM(OPTConfig(vocab_size=vocab, **{**sizes, **_IDS, **overrides}))


# One block where nothing else is said: each expert has three layers, and each layer its files.
_MIXTURE = {**_LLAMA, "intermediate_size": 12, "num_hidden_layers": 1, "num_experts_per_tok": 2}


def _mixtral(vocab: int, overrides: dict[str, Any]) -> PreTrainedModel:
    """Two of four experts, their weights normalised after the choice."""
    sizes = {**_MIXTURE, "num_local_experts": 4, "tie_word_embeddings": False}
    return MixtralForCausalLM(MixtralConfig(vocab_size=vocab, **{**sizes, **overrides}))


def _qwen2_moe(vocab: int, overrides: dict[str, Any]) -> PreTrainedModel:
    """Two of four experts beside a shared one with a gate; the first block's MLP is dense."""
    sizes = {**_MIXTURE, "num_hidden_layers": 2, "mlp_only_layers": [0], "decoder_sparse_step": 1}
    sizes |= {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=vocab, **{**sizes, **overrides}))


def _qwen3_moe(vocab: int, overrides: dict[str, Any]) -> PreTrainedModel:
    """Two of five experts."""
    sizes = {**_MIXTURE, "num_experts": 5, "moe_intermediate_size": 12, "head_dim": 4}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=vocab, **{**sizes, **overrides}))


def _olmoe(vocab: int, overrides: dict[str, Any]) -> PreTrainedModel:
    """Two of six experts, of which a short sequence leaves some without a token."""
    sizes = {**_MIXTURE, "num_experts": 6}
    return OlmoeForCausalLM(OlmoeConfig(vocab_size=vocab, **{**sizes, **overrides}))


def _gpt_oss(vocab: int, overrides: dict[str, Any]) -> PreTrainedModel:
    """Two of four experts with biases, weights transposed, gate and up interleaved, a gate of its own."""
    sizes = {**_MIXTURE, "num_local_experts": 4, "head_dim": 4}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    return GptOssForCausalLM(GptOssConfig(vocab_size=vocab, **{**sizes, **rope, **overrides}))


_BUILDERS: dict[str, Callable[[int, dict[str, Any]], PreTrainedModel]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "neox": _neox,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "opt": _opt,
}
NAMES = tuple(_BUILDERS)
_MIXTURES: dict[str, Callable[[int, dict[str, Any]], PreTrainedModel]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
}
MIXTURES = tuple(_MIXTURES)


def build(
    name: str, dtype: torch.dtype = torch.float32, vocab: int = 128, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A small random causal LM, as ``load_model`` would return it: eval mode, frozen, no cache.

    The weights depend on name, sizes and seed alone: float64 holds the float32 values, and the global random
    state is left as it was. ``overrides`` are keys of the architecture's config.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (_BUILDERS | _MIXTURES)[name](vocab, overrides)
        for _, parameter in sorted(model.named_parameters()):
            centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            scale = 0.2 if parameter.dim() == 1 else 0.3
            parameter.data = centre + scale * torch.randn(parameter.shape)
    return model.to(dtype).eval().requires_grad_(False)
