"""The whole pipeline against brute force: autograd gradients of one sequence at a time, dense matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import raylux
from raylux.engine.plan import choose_fit_rows
from raylux.ledger import LABELS
from raylux.store import CorpusReader, RunFolder
from tests import reference
from tests.architectures import build
from tests.reference import Example, Question

TOLERANCE = 1e-9
VOCAB = 64
NAMES = ("anna", "boris", "carla", "dmitri", "eve")
PLACES = ("paris", "oslo", "rome", "lima")
# Lengths from 6 to 23 tokens: several score buckets, padded fit batches.
TEXTS = tuple(
    f"{NAMES[n % 5]} lives in {PLACES[n % 4]} and number {n % 7} is"
    + " very" * (n % 9)
    + f" dear to {NAMES[(n + 2) % 5]}" * (n % 3)
    for n in range(18)
)
ASKED = (("anna lives in", "paris"), ("boris and carla", "very dear to rome"))
# Small units and batches: sums over several units, batches with padding and with filler.
LOW_RANK = ("query.max_error=0.05", "query.low_rank=always")
PARTS = ("fit.unit_tokens=70", "engine.batch_tokens=64", "score.unit_size=7", "query.max_error=0")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>"]))
    assert words.get_vocab_size() <= VOCAB
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")


@cache
def gpt2() -> PreTrainedModel:
    return build("gpt2", torch.float64, VOCAB)


def encode(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def example(prompt: str, completion: str) -> Example:
    before, after = encode(prompt), encode(completion)
    return Example([*before, *after], [-100] * len(before) + after)


def logprob(prompt: str, completion: str) -> Question:
    return Question(((1.0, example(prompt, completion)),))


def attribute(
    model: PreTrainedModel,
    *overrides: str,
    train: Sequence[str | Mapping[str, Any]] = TEXTS,
    queries: Sequence[Mapping[str, Any] | tuple[str, str]] = ASKED,
) -> raylux.Run:
    return raylux.attribute(model, tokenizer(), train, queries, overrides=[*PARTS, *overrides])


def corpus_of(run: raylux.Run) -> list[Example]:
    reader = CorpusReader(RunFolder(run.folder))
    return [Example(row.tokens, row.labels) for row in reader.rows(range(len(reader)))]


def fitted_on(run: raylux.Run, labels_of: raylux.Run | None = None) -> list[Example]:
    """What the factors were fitted on: corpus rows with the labels that were drawn for them."""
    corpus, ids = corpus_of(run), run.sequences["sequence"].tolist()
    rows = choose_fit_rows(ids, run.config.fit.sequences, run.config.fit.seed)
    if run.config.fit.labels == "dataset":
        return [corpus[row] for row in rows]
    store = RunFolder((labels_of or run).folder)
    drawn = store.group(store.manifest(LABELS, "labels").meta["key"]).read("labels")
    parts = np.split(drawn, np.cumsum([len(corpus[row].tokens) for row in rows])[:-1])
    return [Example(corpus[row].tokens, part) for row, part in zip(rows, parts, strict=True)]


def expected_of(
    model: PreTrainedModel, run: raylux.Run, questions: Sequence[Question], labels_of: raylux.Run | None = None
) -> dict[str, np.ndarray]:
    """Layer -> scores [Q, N], in the run's unit."""
    setting = run.config.curvature
    layers = run.settings["model"]["layers"]
    corpus = corpus_of(run)
    fit = fitted_on(run, labels_of) if setting.kind not in ("identity", "cosine") else []
    found = reference.influences(model, layers, fit, corpus, questions, setting.kind, setting.damping,
                                 blocks=setting.blocks)  # fmt: skip
    scale = 1 / len(corpus) if run.unit == "nats" else 1.0
    return {name: scale * values for name, values in found.items()}


def check(
    model: PreTrainedModel,
    run: raylux.Run,
    questions: Sequence[Question],
    tolerance: float = TOLERANCE,
    labels_of: raylux.Run | None = None,
) -> None:
    """Every score of every query, and every layer's where kept, against brute force."""
    expected = expected_of(model, run, questions, labels_of)
    scores = run.scores()
    assert scores.dims == ("query", "sequence")
    assert scores["sequence"].values.tolist() == run.sequences["sequence"].tolist()
    total = sum(expected.values())
    for place, query in enumerate(run.queries):
        assert reference.difference(scores.sel(query=query), total[place]) <= tolerance  # type: ignore[index]
        if run.config.score.layers:
            layers = run.layer_scores(query)
            for name, values in expected.items():
                assert reference.difference(layers.sel(layer=name), values[place]) <= tolerance


QUESTIONS = tuple(logprob(*pair) for pair in ASKED)


class TestGpt2:
    @pytest.mark.parametrize("damping", ["auto", "0.01"])
    @pytest.mark.parametrize("kind", ["ekfac", "kfac", "tekfac", "tkfac", "eshampoo", "shampoo", "diagonal"])
    def test_dataset_labels(self, kind: str, damping: str) -> None:
        run = attribute(gpt2(), f"curvature.kind={kind}", f"curvature.damping={damping}", "fit.labels=dataset")
        assert run.unit == "nats"
        check(gpt2(), run, QUESTIONS)

    @pytest.mark.parametrize("kind", ["identity", "cosine"])
    def test_without_curvature(self, kind: str) -> None:
        run = attribute(gpt2(), f"curvature.kind={kind}")
        assert run.unit == {"identity": "dot", "cosine": "cosine"}[kind]
        check(gpt2(), run, QUESTIONS)

    def test_sampled_labels(self) -> None:
        """Drawn labels come from the run folder; that they are drawn right is test_sampling's."""
        ekfac = attribute(gpt2(), "score.layers=true", "fit.seed=4")
        check(gpt2(), ekfac, QUESTIONS)
        kfac = attribute(gpt2(), "curvature.kind=kfac", "fit.seed=4", "score.unit=raw")
        check(gpt2(), kfac, QUESTIONS)
        # The diagonal makes one pass and keeps no labels: they are those of any run with this seed.
        diagonal = attribute(gpt2(), "curvature.kind=diagonal", "fit.seed=4")
        check(gpt2(), diagonal, QUESTIONS, labels_of=ekfac)

    def test_labels_are_drawn_where_a_label_counts(self) -> None:
        run = attribute(gpt2())
        drawn, corpus = fitted_on(run), {tuple(one.tokens): one for one in corpus_of(run)}
        for one in drawn:
            known = np.asarray(corpus[tuple(one.tokens)].labels)
            assert ((np.asarray(one.labels) == -100) == (known == -100)).all()
            assert ((np.asarray(one.labels) < VOCAB) & (np.asarray(one.labels) >= -100)).all()
        assert any(list(one.labels[1:]) != list(one.tokens[1:]) for one in drawn)

    def test_fewer_sequences_to_fit_on(self) -> None:
        run = attribute(gpt2(), "fit.sequences=5", "fit.labels=dataset", "score.train_size=1000")
        assert len(fitted_on(run)) == 5
        found, expected = run.scores().values * 1000, sum(expected_of(gpt2(), run, QUESTIONS).values())
        assert reference.difference(found, np.asarray(expected) * len(TEXTS)) <= TOLERANCE

    def test_measurements(self) -> None:
        prompt = "anna lives in"
        queries = [
            {"prompt": prompt, "completion": "paris"},
            {"prompt": prompt, "completion": "rome and oslo"},
            {"prompt": prompt, "completion": "paris", "contrast": "rome and oslo", "measurement": "contrast"},
            {"prompt": prompt, "completion": "paris", "measurement": "loss"},
        ]
        run = attribute(gpt2(), "fit.labels=dataset", queries=queries)
        one, other = example(prompt, "paris"), example(prompt, "rome and oslo")
        questions = [
            Question(((1.0, one),)),
            Question(((1.0, other),)),
            Question(((1.0, one), (-1.0, other))),
            Question(((-1.0, one),)),
        ]
        check(gpt2(), run, questions)
        scores = run.scores().values
        assert reference.difference(scores[2], scores[0] - scores[1]) <= 1e-12
        assert reference.difference(scores[3], -scores[0]) <= 1e-12
        values = [-sum(w * float(reference.loss(gpt2(), part)) for w, part in q.parts) for q in questions]
        np.testing.assert_allclose(run.measurements["measurement"], values, rtol=1e-10)

    def test_packed(self) -> None:
        run = attribute(gpt2(), "corpus.pack=true", "corpus.max_length=16", "score.layers=true")
        corpus = corpus_of(run)
        assert {len(one.tokens) for one in corpus[:-1]} == {16}
        flat = [token for one in corpus for token in one.tokens]
        assert encode(TEXTS[0]) == flat[: len(encode(TEXTS[0]))]
        check(gpt2(), run, QUESTIONS)

    def test_tokenized_rows_with_masked_labels(self) -> None:
        train = []
        for place, text in enumerate(TEXTS):
            tokens = encode(text)
            kept = place % len(tokens)
            labels = [-100] * kept + tokens[kept:] if place % 3 else list(tokens)
            train.append({"id": f"row{place}", "input_ids": tokens, "labels": labels})
        run = attribute(gpt2(), train=train)
        for one, row in zip(corpus_of(run), train, strict=True):
            assert list(one.tokens) == row["input_ids"]
            assert list(one.labels) == [-100, *row["labels"][1:]]  # type: ignore[misc]
        check(gpt2(), run, QUESTIONS)

    def test_some_layers_only(self) -> None:
        run = attribute(gpt2(), "model.layers=[transformer.h.1.mlp.c_proj, transformer.h.0.attn.c_attn]")
        assert run.settings["model"]["layers"] == ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]
        check(gpt2(), run, QUESTIONS)

    def test_the_corpus_is_what_the_tokenizer_says(self) -> None:
        run = attribute(gpt2(), "curvature.kind=identity")
        assert [list(one.tokens) for one in corpus_of(run)] == [encode(text) for text in TEXTS]
        assert all(list(one.labels) == [-100, *one.tokens[1:]] for one in corpus_of(run))


class TestOthers:
    def test_gated_mlp_with_its_shared_input(self) -> None:
        """RMS norms round to float32: a last bit of a float64 that padding changes can move an input of a
        layer by one float32 rounding, 6e-8, and the damped solve passes on at most a small multiple."""
        model = build("llama", torch.float64, VOCAB)
        run = attribute(model, "score.layers=true")
        groups = run.settings["model"]["groups"]
        assert groups["model.layers.0.mlp.up_proj"] == "model.layers.0.mlp.gate_proj"
        check(model, run, QUESTIONS, tolerance=1e-6)

    @pytest.mark.parametrize("name", ["neox", "opt"])
    def test_others_that_compute_in_float64(self, name: str) -> None:
        model = build(name, torch.float64, VOCAB)
        queries = [{"input_ids": part.tokens, "labels": part.labels} for q in QUESTIONS for _, part in q.parts]
        run = attribute(model, queries=queries)
        check(model, run, QUESTIONS)

    def test_float32_is_near(self) -> None:
        """The same run in float32: 1e-4 end to end (DESIGN's tolerance)."""
        run = attribute(build("gpt2", torch.float32, VOCAB), "fit.labels=dataset")
        expected = sum(expected_of(gpt2(), run, QUESTIONS).values())
        for place, query in enumerate(run.queries):
            assert reference.difference(run.scores().sel(query=query), expected[place]) <= 1e-4  # type: ignore[index]


class TestIdentities:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
    @pytest.mark.parametrize("low_rank", [False, True], ids=["dense", "low-rank"])
    def test_layers_and_tokens_sum_to_the_total(self, dtype: torch.dtype, tolerance: float, low_rank: bool) -> None:
        overrides = ["score.layers=true", f"score.token_top={len(TEXTS)}"]
        run = attribute(
            build("llama", dtype, VOCAB),
            *overrides,
            *(LOW_RANK if low_rank else ()),
        )
        for query in run.queries:
            scores = run.scores().sel(query=query)
            assert reference.difference(run.layer_scores(query).sum("layer"), scores) <= tolerance
            tokens = [run.token_scores(query, name) for name in scores["sequence"].values]
            assert [len(table) for table in tokens] == [len(encode(text)) for text in TEXTS]
            assert reference.difference([table["influence"].sum() for table in tokens], scores) <= tolerance

    def test_batches_units_and_order_of_the_corpus(self) -> None:
        runs = [
            attribute(gpt2(), "fit.labels=dataset"),
            attribute(gpt2(), "engine.batch_tokens=1", "fit.unit_tokens=1", "score.unit_size=1", "fit.labels=dataset"),
            attribute(
                gpt2(), "engine.batch_tokens=4096", "fit.unit_tokens=9999", "score.unit_size=99", "fit.labels=dataset"
            ),
            attribute(gpt2(), "fit.labels=dataset", train=TEXTS[::-1]),
        ]
        first = runs[0].scores().values
        for run in runs[1:3]:
            assert reference.difference(run.scores().values, first) <= TOLERANCE
        assert reference.difference(runs[3].scores().values[:, ::-1], first) <= TOLERANCE

    def test_low_rank_keeps_its_bound(self) -> None:
        dense = attribute(gpt2(), "fit.labels=dataset")
        exact = dense.scores().values
        run = attribute(gpt2(), "fit.labels=dataset", "query.max_error=0.2", "query.low_rank=always")
        scores = run.scores().values
        error = np.sqrt(((scores - exact) ** 2).mean(1) / (exact**2).mean(1))
        assert (error <= 0.2).all()
        assert (error > 1e-9).any()
