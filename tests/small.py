"""A small model, its tokenizer, a corpus and queries on disk, and what a run left, as arrays to compare."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import raylux
from raylux.api import STAGES, run_stages
from raylux.config import Config
from raylux.ledger import COVARIANCE, EIGEN, MOMENTS, PROJECTED, QUERY, TOKENS
from raylux.store import RunFolder
from raylux.store.arrays import Group
from tests.architectures import build

WORDS = (
    "anna bought the red boat at lake saima in june and sold it to her brother who paints houses near old church of "
    "turku where bells ring each noon while ships from riga bring salt wool tar ropes grain for merchants that speak "
    "dutch german swedish or latin with a monk named olaf whose garden has apples plums herbs"
).split()
SEQUENCES = 60
QUERIES = (
    {"id": "a", "prompt": "anna bought the red", "completion": "boat at lake saima"},
    {"id": "b", "prompt": "her brother", "completion": "paints houses"},
    {"id": "c", "prompt": "ships from riga", "completion": "bring salt wool", "measurement": "loss"},
    {"id": "d", "prompt": "a monk named", "completion": "olaf", "contrast": "anna", "measurement": "contrast"},
)
# Several fit units, score units, batches and lengths, however small the corpus is.
CUT = ("fit.unit_tokens=400", "score.unit_size=13", "engine.batch_tokens=256", "score.layers=true", "score.token_top=4")

_S_TEST = ("words", "offsets", "vectors", "rank", "place", "dense", "left", "right")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of ``WORDS``; no token is added to a text."""
    vocabulary = {word: place for place, word in enumerate(["<eos>", "<unk>", *sorted(set(WORDS))])}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")


def texts(count: int = SEQUENCES, seed: int = 3) -> list[str]:
    """Texts of 3 to 60 words, so of many padded lengths, that share some words with each query and not others."""
    draw = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        start, length = int(draw.integers(len(WORDS))), int(draw.integers(3, 61))
        words = [WORDS[(start + step) % len(WORDS)] for step in range(length // 2)]
        result.append(" ".join([*words, *draw.choice(WORDS[start:] + WORDS[:9], length - len(words))]))
    return result


def write_lines(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Inputs:
    """Files of a run under one folder."""

    base: Path

    @property
    def model(self) -> Path:
        return self.base / "model"

    @property
    def corpus(self) -> Path:
        return self.base / "corpus.jsonl"

    @property
    def queries(self) -> Path:
        return self.base / "queries.jsonl"

    def ask(self, *ids: str) -> None:
        """Rewrite the query file with these of ``QUERIES``; none: all."""
        write_lines(self.queries, [query for query in QUERIES if not ids or query["id"] in ids])

    def sections(self, run: Path | str, **more: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """A config as a file would say it."""
        sections: dict[str, dict[str, Any]] = {
            "run": {"folder": str(run)},
            "model": {"path": str(self.model), "device": "cpu"},
            "corpus": {"path": str(self.corpus), "id": "id", "keep": ["shelf"], "max_length": 64},
            "queries": {"path": str(self.queries)},
            "prefilter": {"kind": "none"},
            "engine": {"backend": "local"},
        }
        for name, keys in more.items():
            sections[name] = {**sections.get(name, {}), **keys}
        return sections

    def config(self, run: Path | str, *overrides: str) -> Config:
        """In process, without a prefilter, cut small, unless overridden."""
        return Config.parse(self.sections(run), [*CUT, *overrides])

    def run(self, folder: Path | str, *overrides: str, restart: str | None = None) -> raylux.Run:
        """Every stage but the report, which has tests of its own."""
        return run_stages(self.config(folder, *overrides), STAGES[:-1], quiet=True, restart=restart)


def make_inputs(base: Path, architecture: str = "llama", **sizes: Any) -> Inputs:
    """Write model, tokenizer, corpus (ids ``s0`` …) and all queries."""
    inputs = Inputs(base)
    base.mkdir(parents=True, exist_ok=True)
    build(architecture, **sizes).save_pretrained(inputs.model)
    tokenizer().save_pretrained(inputs.model)
    write_lines(
        inputs.corpus,
        [{"id": f"s{place}", "shelf": place % 3, "text": text} for place, text in enumerate(texts())],
    )
    inputs.ask()
    return inputs


def objects(folder: Path) -> dict[str, int]:
    """Every file of a run but its log, its lease and its page: path -> time of its last change."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.parent.name != "lease"
        and path.name not in ("run.yaml", "progress.jsonl", "index.html")
    }


def contents(folder: Path | str, queries: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """All numbers of a run by name: factors, s_test, scores, by layer and by token.

    Scores by layer and by token are as they are stored, each array read once. Score arrays stand in the order of the
    sequences' ids; per-token scores are those of each query's two best.
    """
    store, run = RunFolder(str(folder)), raylux.open_run(folder)
    found = factors(store)
    wanted = queries or tuple(run.queries)
    for manifest in store.units(QUERY).values():
        asked = [(place, query) for place, query in enumerate(manifest.meta["queries"]) if query in wanted]
        for layer, key in manifest.meta["layers"].items():
            found |= {f"s_test {query} {layer} {name}": x for query, name, x in _s_test(store.group(key), asked)}
    scores, names = run.scores().load(), run.sequences["sequence"].to_numpy()
    order = np.argsort(names[run.rows], kind="stable")
    layers, tokens = _by_layer(run, wanted), _by_token(store, wanted)
    for query in wanted:
        total = scores.sel(query=query).to_numpy()
        found[f"total {query}"] = total[order]
        if run.config.score.layers:
            found[f"layers {query}"] = layers[query][:, order]
        if run.config.score.token_top:
            best = np.argsort(-total, kind="stable")[: min(2, np.isfinite(total).sum())]
            for row in run.rows[best]:
                found[f"tokens {query} {names[row]}"] = tokens[query, int(row)]
    return found


def _by_layer(run: raylux.Run, queries: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Query -> [L, n] over ``run.rows``; only queries that have such scores."""
    found: dict[str, np.ndarray] = {}
    for block in run.blocks:
        if not block.layers or set(queries).isdisjoint(block.queries):
            continue
        values, at = run.store.group(block.key).read("layers"), np.searchsorted(run.rows, block.rows)
        for query, own in zip(block.queries, values, strict=True):
            if query in queries:
                found.setdefault(query, np.full((len(own), len(run.rows)), np.nan))[:, at] = own
    return found


def _by_token(store: RunFolder, queries: tuple[str, ...]) -> dict[tuple[str, int], np.ndarray]:
    """(query, corpus row) -> the shares of its tokens."""
    found = {}
    for manifest in store.units(TOKENS).values():
        if manifest.meta["query"] in queries:
            group = store.group(manifest.meta["key"])
            parts = np.split(group.read("shares"), group.read("offsets")[1:-1])
            found |= {
                (manifest.meta["query"], int(row)): x for row, x in zip(manifest.meta["rows"], parts, strict=True)
            }
    return found


def factors(store: RunFolder) -> dict[str, np.ndarray]:
    """The numbers of the fit by name."""
    found: dict[str, np.ndarray] = {}
    for stage in (COVARIANCE, EIGEN, MOMENTS, PROJECTED):
        for unit, manifest in store.units(stage).items():
            group = store.group(manifest.meta["key"])
            for name in ("matrix", "values", "vectors", "panel"):
                if name in group:
                    found[f"{stage} {unit} {name}"] = group.read(name)
    return found


def _s_test(group: Group, asked: list[tuple[int, str]]) -> Iterator[tuple[str, str, np.ndarray]]:
    """(query, name, array) of a layer's s_test of some queries, each with its place in the block."""
    arrays = {name: group.read(name) for name in _S_TEST if name in group}
    for place, query in asked:
        if "words" in arrays:
            part = slice(*arrays["offsets"][place : place + 2])
            yield query, "words", arrays["words"][part]
            yield query, "vectors", arrays["vectors"][part]
            continue
        rank, at = int(arrays["rank"][place]), int(arrays["place"][place])
        if rank < 0:
            yield query, "dense", arrays["dense"][at]
        else:
            yield query, "left", arrays["left"][at][:, :rank]
            yield query, "right", arrays["right"][at][:, :rank]


def differing(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> list[str]:
    """Names whose bits differ, or that only one has; NaN equals NaN."""
    return [
        name
        for name in {**found, **wanted}
        if name not in found or name not in wanted or not np.array_equal(found[name], wanted[name], equal_nan=True)
    ]


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """max|Δ| / RMS(wanted); the same pairs are missing in both."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    there = ~np.isnan(wanted)
    assert (np.isnan(found) == ~there).all() and there.any()
    return float(np.abs(found - wanted)[there].max() / np.sqrt(np.mean(wanted[there] ** 2)))
