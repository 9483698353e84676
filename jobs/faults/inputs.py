"""A real corpus, a small GPT-2 from a seed, queries, and a config that cuts the work into many small units."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from raylux.demo.corpus import read_leads
from raylux.demo.training import TrainingSettings, train_tokenizer
from raylux.modelfiles import quiet


@dataclass(frozen=True)
class Work:
    """How much there is to do; equal settings give equal files.

    Attributes:
        seed: chooses texts and weights.
        documents: openings of Wikipedia articles; the corpus is cut into sequences of ``context`` tokens at most.
        fitted: sequences that the curvature is fitted on, in units of ``unit_tokens`` tokens.
        unit_tokens: see ``fitted``.
        unit_size: sequences of a score unit.
        queries: solved 16 at a time.
        layers: of the model, with a width of ``width``.
        width: see ``layers``.
        context: see ``documents``.
        probes: sequences on which a query's compression is measured, a quarter of them its own.
        snapshot: seconds between snapshots.
    """

    seed: int = 0
    documents: int = 1000
    fitted: int = 1000
    unit_tokens: int = 400
    unit_size: int = 16
    queries: int = 64
    layers: int = 10
    width: int = 96
    context: int = 64
    probes: int = 16
    snapshot: float = 0.5


SHORT = Work(documents=640, fitted=600, unit_tokens=400, unit_size=8, queries=32, layers=5, width=32)


def write_inputs(base: Path, work: Work) -> dict[str, Any]:
    """Write model, corpus and queries; returns the sections of a config but for its run folder.

    Raises:
        UserError: the Wikipedia leads are not installed, or there are fewer.
    """
    base.mkdir(parents=True, exist_ok=True)
    draw = random.Random(work.seed)
    texts = [" ".join(text.split()) for _, text in read_leads() if 120 <= len(text) <= 400]
    chosen = draw.sample(texts, work.documents)
    asked = [_question(number, text) for number, text in enumerate(draw.sample(chosen, work.queries))]
    _lines(base / "corpus.jsonl", [{"id": f"w{number:05d}", "text": text} for number, text in enumerate(chosen)])
    _lines(base / "queries.jsonl", asked)
    tokenizer = train_tokenizer(chosen, TrainingSettings(vocabulary=512, context=work.context))
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(work.seed)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=work.context,
            n_embd=work.width,
            n_layer=work.layers,
            n_head=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        GPT2LMHeadModel(config).save_pretrained(base / "model")
        tokenizer.save_pretrained(base / "model")
    return _sections(base, work)


def write_config(path: Path, sections: dict[str, Any], run: Path | str, **engine: Any) -> Path:
    """A config file for one run folder."""
    data = {"run": {"folder": str(run)}, **sections, "engine": {**sections["engine"], **engine}}
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def _sections(base: Path, work: Work) -> dict[str, Any]:
    return {
        "model": {"path": str(base / "model"), "device": "cpu"},
        "corpus": {"path": str(base / "corpus.jsonl"), "id": "id", "max_length": work.context},
        "queries": {"path": str(base / "queries.jsonl")},
        "fit": {"sequences": work.fitted, "unit_tokens": work.unit_tokens, "snapshot": work.snapshot},
        "prefilter": {"kind": "none"},
        "query": {"probes": work.probes, "low_rank": "always"},
        "score": {"unit_size": work.unit_size, "token_top": 2},
        "engine": {"backend": "ray", "batch_tokens": 256, "timeout": 120},
    }


def _question(number: int, text: str) -> dict[str, str]:
    words = text.split()[:10]
    return {"id": f"q{number:03d}", "prompt": " ".join(words[:5]), "completion": " " + " ".join(words[5:])}


def _lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
