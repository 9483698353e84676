"""A tiny run whose scores are known: EK-FAC influences by plain autograd, one sequence at a time.

A GPT-2 of a few thousand weights, a dozen sequences, two queries, everything in float64 and in this process. The
reference below shares nothing with the rest of raylux but the formula.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers import models as token_models
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from raylux.doctor.finding import FAIL, OK, Finding

TOLERANCE = 1e-6
_VOCABULARY, _WIDTH, _HIDDEN, _LENGTH = 24, 8, 12, 10
_DAMPING = 0.1  # times the mean eigenvalue of a layer
Pair = tuple[Tensor, Tensor]
"""a [T, M] and g [T, P] of one layer and sequence."""


def check() -> Finding:
    """Run it and compare; no file stays."""
    model, sequences, asked = _model(), _sequences(), _asked()
    found = _run(model, sequences, asked)
    expected = reference(model, sequences, asked)
    return judge(found, expected)


def judge(found: np.ndarray, expected: np.ndarray) -> Finding:
    """Whether scores [Q, N] are the expected ones."""
    error = float(np.abs(found - expected).max() / np.sqrt((expected**2).mean()))
    detail = f"tiny run in process: {found.size} scores differ from plain autograd by {error:.1e} (max/RMS)"
    if error <= TOLERANCE:  # a NaN is not
        return Finding("answer", OK, detail)
    advice = "do not trust scores computed here: install the tested versions (constraints.txt); report it if it stays"
    return Finding("answer", FAIL, f"{detail}, more than {TOLERANCE:.0e}", advice)


def _run(model: GPT2LMHeadModel, sequences: Sequence[Sequence[int]], asked: Sequence[Mapping[str, Any]]) -> np.ndarray:
    from raylux import api

    train = [{"id": str(place), "input_ids": list(tokens)} for place, tokens in enumerate(sequences)]
    setting = ["fit.labels=dataset", "query.max_error=0", "score.unit=raw", "score.token_top=0", "fit.unit_tokens=40"]
    with _cache_aside():
        run = api.attribute(model, _tokenizer(), train, asked, overrides=setting)
        return np.asarray(run.scores().to_numpy(), np.float64)


@contextmanager
def _cache_aside() -> Iterator[None]:
    """What the run remembers of its model goes with it, not into the user's cache."""
    before = os.environ.get("RAYLUX_CACHE")
    with tempfile.TemporaryDirectory(prefix="raylux-doctor-") as folder:
        os.environ["RAYLUX_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["RAYLUX_CACHE"]
            else:
                os.environ["RAYLUX_CACHE"] = before


def _model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=_VOCABULARY, n_embd=_WIDTH, n_inner=_HIDDEN, n_layer=2, n_head=2, n_positions=16, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval().requires_grad_(False)
    draw = np.random.default_rng(1)
    for parameter in model.parameters():
        parameter.copy_(torch.from_numpy(draw.normal(0.0, 0.3, tuple(parameter.shape))))
    return model


def _sequences() -> list[list[int]]:
    draw = np.random.default_rng(2)
    return [draw.integers(1, _VOCABULARY, 5 + place % (_LENGTH - 4)).tolist() for place in range(12)]


def _asked() -> list[dict[str, Any]]:
    draw = np.random.default_rng(3)
    rows = [draw.integers(1, _VOCABULARY, 7).tolist() for _ in range(2)]
    return [{"input_ids": row, "labels": [-100] * 4 + row[4:]} for row in rows]


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(_VOCABULARY)}
    core = Tokenizer(token_models.WordLevel(vocab=words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", eos_token="w0")


# --- by plain autograd ------------------------------------------------------------------------------------------


def reference(
    model: GPT2LMHeadModel, sequences: Sequence[Sequence[int]], asked: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """∇f(query)ᵀ (G + λI)⁻¹ ∇log p(sequence), G the EK-FAC of the sequences' own labels: [Q, N], not divided by N."""
    pairs = [_pairs(model, tokens, tokens) for tokens in sequences]
    questions = [_pairs(model, row["input_ids"], row["labels"]) for row in asked]
    total = torch.zeros(len(asked), len(sequences), dtype=torch.float64)
    for layer in pairs[0]:
        a = torch.cat([pair[layer][0] for pair in pairs])
        g = torch.cat([pair[layer][1] for pair in pairs])
        q_a, q_s = torch.linalg.eigh(a.T @ a).eigenvectors, torch.linalg.eigh(g.T @ g).eigenvectors
        grads = torch.stack([_rotated(pair[layer], q_a, q_s) for pair in pairs])
        queries = torch.stack([_rotated(pair[layer], q_a, q_s) for pair in questions])
        moments = (grads**2).mean(0)
        solved = queries / (moments + _DAMPING * moments.mean())
        # Gradients are those of losses, −f and −log p: the signs cancel.
        total += torch.einsum("qpm,npm->qn", solved, grads)
    return total.numpy()


def _rotated(pair: Pair, q_a: Tensor, q_s: Tensor) -> Tensor:
    a, g = pair
    return q_s.T @ (g.T @ a) @ q_a


def _pairs(model: GPT2LMHeadModel, tokens: Sequence[int], labels: Sequence[int]) -> dict[str, Pair]:
    """Layer -> its inputs with the 1 of the bias, and the gradients of the summed loss at its outputs."""
    seen: dict[str, Pair] = {}

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            traced = output if output.requires_grad else output.detach().requires_grad_(True)
            seen[name] = inputs[0].detach()[0], traced
            return traced

        return hook

    layers = {name: module for name, module in model.named_modules() if ".mlp.c_" in name}
    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    try:
        logits = model(input_ids=torch.tensor([list(tokens)])).logits[0, :-1]
    finally:
        for handle in handles:
            handle.remove()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(list(labels)[1:]), reduction="sum")
    gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
    ones = torch.ones(len(tokens), 1, dtype=torch.float64)
    return {
        name: (torch.cat([a, ones], 1), gradient[0])
        for (name, (a, _)), gradient in zip(seen.items(), gradients, strict=True)
    }
