"""The word embedding as a tracked layer (TracIn-WE): against autograd, its words, and what it cannot serve."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import raylux
from raylux.errors import UserError
from raylux.influence.words import WordGradient, WordQueries
from raylux.layers import coverage
from raylux.planning import find_shape
from tests import reference
from tests import test_exact as exact
from tests.apart import processes
from tests.architectures import build
from tests.reference import Example, Question, difference
from tests.small import Inputs, contents, differing, make_inputs

WORDS = 'model.layers=["*.embed_in"]'
BOTH = 'model.layers=["*.embed_in", "*.0.mlp.*"]'


@cache
def model() -> PreTrainedModel:
    return build("neox", torch.float64, exact.VOCAB)


def embedding_gradient(of: PreTrainedModel, example: Example) -> np.ndarray:
    """[V, P] by autograd."""
    weight = of.get_input_embeddings().weight
    weight.requires_grad_(True)
    try:
        (gradient,) = torch.autograd.grad(reference.loss(of, example), weight)
    finally:
        weight.requires_grad_(False)
    return gradient.numpy()


def asked(of: PreTrainedModel, question: Question) -> np.ndarray:
    return -sum(weight * embedding_gradient(of, part) for weight, part in question.parts)  # type: ignore[return-value]


def expected(of: PreTrainedModel, run: raylux.Run) -> np.ndarray:
    """[Q, N] dot products of whole gradients."""
    sequences = [-embedding_gradient(of, row) for row in exact.corpus_of(run)]
    return np.array([[float((asked(of, q) * g).sum()) for g in sequences] for q in exact.QUESTIONS])


@pytest.fixture(scope="module")
def run() -> raylux.Run:
    return exact.attribute(model(), WORDS, "curvature.kind=identity", "score.self_influence=true")


def test_scores_are_dot_products_of_the_whole_gradients(run: raylux.Run) -> None:
    assert run.unit == "dot"
    assert difference(run.scores(), expected(model(), run)) <= exact.TOLERANCE
    norms = [np.linalg.norm(asked(model(), q)) for q in exact.QUESTIONS]
    np.testing.assert_allclose(run.measurements["norm"], norms, rtol=1e-10)
    own = [float((embedding_gradient(model(), row) ** 2).sum()) for row in exact.corpus_of(run)]
    np.testing.assert_allclose(run.self_influence()["self_influence"], own, rtol=1e-10)


def test_cosines_beside_other_layers() -> None:
    run = exact.attribute(model(), BOTH, "curvature.kind=cosine", "score.layers=true")
    layers = run.settings["model"]["layers"]
    assert layers[0] == "gpt_neox.embed_in" and len(layers) == 3
    rest = [reference.gradients(model(), layers[1:], row) for row in exact.corpus_of(run)]
    others = [reference.question_gradient(model(), layers[1:], q) for q in exact.QUESTIONS]
    sequences = [{layers[0]: embedding_gradient(model(), row), **more}
                 for row, more in zip(exact.corpus_of(run), rest, strict=True)]  # fmt: skip
    queries = [{layers[0]: asked(model(), q), **more} for q, more in zip(exact.QUESTIONS, others, strict=True)]

    def length(found: dict[str, np.ndarray]) -> float:
        return float(np.sqrt(sum((x**2).sum() for x in found.values())))

    total = np.array([[-sum((q[n] * g[n]).sum() for n in layers) / length(q) / length(g) for g in sequences]
                      for q in queries])  # fmt: skip
    assert difference(run.scores(), total) <= exact.TOLERANCE


def test_words_sum_to_the_score_and_only_shared_ones_count(run: raylux.Run) -> None:
    query, (_, part) = run.queries[0], exact.QUESTIONS[0].parts[0]
    best = run.top(query, 3)
    rows = run.sequences["sequence"].tolist()
    for sequence, influence in zip(best["sequence"], best["influence"], strict=True):
        words = run.word_scores(query, sequence)
        assert words["influence"].sum() == pytest.approx(influence, rel=1e-10)
        row = exact.corpus_of(run)[rows.index(sequence)]
        g_query, g_row = asked(model(), exact.QUESTIONS[0]), -embedding_gradient(model(), row)
        for word, count, share in zip(words["token_id"], words["count"], words["influence"], strict=True):
            assert abs(share - float((g_query[word] * g_row[word]).sum())) <= 1e-10 * abs(influence)
            assert count == list(row.tokens).count(word)
            if word not in list(part.tokens):
                assert share == 0
        assert (np.diff(words["influence"]) <= 0).all() and words.attrs["unit"] == "dot"


def test_a_padding_token_in_the_text_learns_nothing(run: raylux.Run) -> None:
    other = build("neox", torch.float64, exact.VOCAB)
    padding = exact.encode("lives")[0]
    embedding: Any = other.get_input_embeddings()
    embedding.padding_idx = padding
    row = exact.corpus_of(run)[0]
    assert padding in list(row.tokens) and not embedding_gradient(other, row)[padding].any()
    from raylux.batches import TokenRow, fit_batches
    from raylux.capture import Capture

    layers = coverage(other, ["*.embed_in"]).tracked
    (batch,) = fit_batches([TokenRow(np.asarray(row.tokens), np.asarray(row.labels))], 64)
    captured = Capture(other, layers).run(batch)
    found = WordGradient.of(captured.inputs[layers[0].name][0], captured.grads[layers[0].name][0])
    dense = np.zeros((exact.VOCAB, 16))
    dense[found.ids] = found.vectors
    assert difference(dense, embedding_gradient(other, row)) < 1e-10


def test_over_checkpoints_it_is_tracin(run: raylux.Run) -> None:
    """Σ_k η_k ⟨G_k(query), G_k(sequence)⟩ over two checkpoints, by ``raylux.combine``."""
    second = build("neox", torch.float64, exact.VOCAB, seed=1)
    runs = [run, exact.attribute(second, WORDS, "curvature.kind=identity")]
    found = raylux.combine(runs, [5e-4, 1e-4]).scores()
    total = 5e-4 * expected(model(), runs[0]) + 1e-4 * expected(second, runs[1])
    assert difference(found, total) <= exact.TOLERANCE


# ------------------------------------------------------------------------------------------- pieces


def gradients(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(0, 6, (4 + n, 1), generator=draw), torch.randn(4 + n, 5, generator=draw, dtype=torch.float64))
        for n in range(count)
    ]


def whole(ids: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(9, 5, dtype=torch.float64)
    for word, own in zip(ids[:, 0], g, strict=True):
        total[word] += own
    return total


def test_dots_are_sums_over_pairs_of_places_with_one_word() -> None:
    (ids, g), (other, h) = gradients(2, 0)
    pairs = sum(float(g[s] @ h[t]) for s in range(len(ids)) for t in range(len(other)) if ids[s] == other[t])
    assert WordGradient.of(ids, g).dot(WordGradient.of(other, h)) == pytest.approx(pairs, rel=1e-12)
    nothing = WordGradient.of(ids[:0], g[:0])
    assert nothing.dot(WordGradient.of(other, h)) == WordGradient.of(other, h).dot(nothing) == 0.0


def test_queries_score_a_batch_as_each_by_itself() -> None:
    queries = [WordGradient.of(*one) for one in gradients(3, 1)]
    parts = gradients(4, 2)
    built = WordQueries(queries)
    for ids, g in parts:
        found = built.scores([(ids[None], g[None])])[0]
        wanted = [float((whole(ids, g)[query.ids] * query.vectors).sum()) for query in queries]
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
        for place in range(3):
            assert built.token_scores(place, ids[None], g[None]).sum() == pytest.approx(wanted[place], rel=1e-12)


# -------------------------------------------------------------------------------------------- bits


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "neox")


def test_bits_over_workers_and_queries(inputs: Inputs, tmp_path: Path) -> None:
    """Beside layers whose queries are compressed, and their scores on probes counted with the words'."""
    both = (BOTH, "curvature.kind=identity", "query.low_rank=always", "query.max_error=0.05", "query.max_rank=4")
    usual = contents(inputs.run(tmp_path / "usual", *both).folder)
    over = ("engine.backend=ray", "engine.workers=2", "engine.shards=2")
    with processes():
        found = inputs.run(tmp_path / "processes", *both, *over)
    assert differing(contents(found.folder), usual) == []
    inputs.ask("b")
    inputs.run(tmp_path / "grown", *both)
    inputs.ask()
    assert differing(contents(inputs.run(tmp_path / "grown", *both).folder), usual) == []


def test_half_precision_is_near(inputs: Inputs, tmp_path: Path) -> None:
    usual, half = (
        inputs.run(tmp_path / dtype, WORDS, "curvature.kind=identity", f"engine.contraction_dtype={dtype}").scores()
        for dtype in ("float32", "bfloat16")
    )
    assert difference(half, usual) < 0.05


def test_a_plan_counts_words_and_not_the_vocabulary(inputs: Inputs, tmp_path: Path) -> None:
    base = inputs.config(tmp_path / "run", WORDS, "curvature.kind=identity")
    shape = find_shape(base)[0]
    assert [layer.shape for layer in shape.tracked] == [(16, 64)] and shape.tracked[0].words


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", ["ekfac", "diagonal", "gauss_newton"])
def test_kinds_with_curvature_refuse_it(inputs: Inputs, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=f"curvature.kind={kind}: 'gpt_neox.embed_in' is the word embedding.*identity"):
        inputs.run(tmp_path / "run", WORDS, f"curvature.kind={kind}")
    assert not (tmp_path / "run").exists()


def test_tied_embeddings_are_refused() -> None:
    with pytest.raises(UserError, match=r"'transformer.wte' is a word embedding tied to 'lm_head'"):
        coverage(build("gpt2", vocab=13), ["*.wte"])


def test_a_pattern_for_linears_does_not_mean_the_embedding() -> None:
    assert not any(layer.words for layer in coverage(model(), ["*"]).tracked)
    found = coverage(model(), ["gpt_neox.embed_in", "*.0.mlp.*"])
    assert [layer.words for layer in found.tracked] == [True, False, False]
    assert found.tracked[0].shape == (16, exact.VOCAB)


def test_positions_are_no_words() -> None:
    with pytest.raises(UserError, match=r"matches nothing that can be tracked: 'transformer\.wpe' is a Embedding"):
        coverage(build("gpt2", vocab=13), ["*.wpe"])
