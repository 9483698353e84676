"""Models of random weights and token sequences on disk, as raylux reads anybody's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from jobs.bench.batches import IGNORED
from jobs.bench.workloads import grammar, word_tokenizer, write_lines
from raylux.config import Config
from raylux.modelfiles import quiet

_IDS = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
_STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@dataclass(frozen=True)
class Shape:
    """What is run: a model, a corpus that is fitted on and scored whole, and queries.

    Attributes:
        family: "gpt2" (biases, an MLP of four times the width) or "llama" (gated, no biases).
        layers: blocks.
        width: of the residual stream.
        heads: of attention.
        vocabulary: tokens.
        shortest: tokens of a sequence, at least; ``longest``: at most.
        sequences: of the corpus.
        queries: each of ``asked`` tokens.
        scale: standard deviation of the weights.
    """

    family: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    shortest: int
    longest: int
    sequences: int
    queries: int
    asked: int = 32
    scale: float = 0.02

    def model(self) -> PreTrainedModel:
        """With random weights, the same every time; norms and biases random too."""
        common = {"vocab_size": self.vocabulary, **_IDS}
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            if self.family == "gpt2":
                sizes = {"n_layer": self.layers, "n_embd": self.width, "n_head": self.heads}
                made: Any = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=self.longest, **_STILL, **common))
            else:
                made = LlamaForCausalLM(
                    LlamaConfig(
                        hidden_size=self.width, intermediate_size=self.width * 2, num_hidden_layers=self.layers,
                        num_attention_heads=self.heads, num_key_value_heads=self.heads,
                        max_position_embeddings=self.longest, tie_word_embeddings=True, **common,
                    )
                )  # fmt: skip
            config = made.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = type(made)(config)
            for parameter in model.parameters():
                centre = float(parameter.dim() == 1 and bool((parameter == 1).all()))
                parameter.data = torch.randn_like(parameter).mul_(self.scale).add_(centre)
        return model.eval()

    def write(self, base: Path) -> None:
        """Model, tokenizer, corpus and queries."""
        base.mkdir(parents=True, exist_ok=True)
        with quiet():
            self.model().save_pretrained(base / "model")
            word_tokenizer(self.vocabulary).save_pretrained(base / "tokenizer")
        rows = grammar(self.sequences, self.shortest, self.longest, self.vocabulary, 2)
        write_lines(base / "corpus.jsonl", ({"id": f"s{n}", "input_ids": row} for n, row in enumerate(rows)))
        asked = grammar(self.queries, self.asked, self.asked, self.vocabulary, 3)
        half = self.asked // 2
        write_lines(
            base / "queries.jsonl",
            ({"id": f"q{n}", "input_ids": row, "labels": [IGNORED] * half + row[half:]} for n, row in enumerate(asked)),
        )

    def config(self, base: Path, run: Path, device: str, *overrides: str) -> Config:
        """Everything fitted on and everything scored, in process."""
        sections: dict[str, dict[str, Any]] = {
            "run": {"folder": str(run)},
            "model": {"path": str(base / "model"), "tokenizer": str(base / "tokenizer"), "device": device},
            "corpus": {"path": str(base / "corpus.jsonl"), "id": "id", "max_length": self.longest},
            "queries": {"path": str(base / "queries.jsonl")},
            "fit": {"sequences": self.sequences},
            "prefilter": {"kind": "none"},
            "engine": {"backend": "local"},
        }
        return Config.parse(sections, overrides)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """max|Δ| / RMS(wanted)."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.abs(found - wanted).max() / np.sqrt(np.mean(wanted**2)))
