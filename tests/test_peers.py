"""Factors and scores against kronfluence (``make test-peers``): the same numbers from code that shares nothing.

Where the conventions differ, and what the comparison does about it:

- kronfluence wraps ``nn.Linear`` only, so it gets a copy of the model with each ``Conv1D`` of GPT-2 replaced by
  the linear layer of the same map. raylux gets the model as it is.
- It keeps sums and counts, raylux means: its sums are divided by its own counts (real tokens for A and S,
  sequences for Λ; the last position counts as a token in both, with a zero gradient).
- Its labels are the data set's where ``use_empirical_fisher`` is set: raylux's ``fit.labels=dataset``.
- Its score is ∇m(query)ᵀ (G+λ)⁻¹ ∇L(sequence) with m the query's loss. raylux's is ∇f ᵀ (G+λ)⁻¹ ∇log p(sequence)
  with f = −m and log p = −L: the same number, sign included, before it is divided by N (``score.unit=raw``).
- Eigenvectors are free up to sign and to rotation within equal eigenvalues, so bases are compared through the
  operator that they make with Λ.
- Its K-FAC leaves A ⊗ S at the scale of a token, raylux's is that of a sequence, T̄ times as much. With λ a
  share of the mean eigenvalue, kronfluence's K-FAC scores are T̄ times raylux's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

import raylux
from jobs.bench import batches
from jobs.bench.batches import IGNORED, Rows, summed_loss
from jobs.bench.peer import Kronfluence
from jobs.bench.workloads import grammar
from raylux.curvature import Spectral
from raylux.ledger import COVARIANCE, EIGEN, MOMENTS
from raylux.store import RunFolder

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning:kronfluence")]

VOCABULARY, LENGTH, TRAIN, QUERIES = 100, 24, 48, 6
# max|Δ|/RMS and Pearson. Float64 leaves rounding in an inverse of condition 1e4 or so and nothing else.
LIMITS = {torch.float32: (1e-3, 0.999999), torch.float64: (1e-10, 1 - 1e-12)}


# data and model


def sample(count: int, shortest: int, seed: int) -> list[list[int]]:
    """Sequences of up to ``LENGTH`` tokens."""
    return grammar(count, shortest, LENGTH, VOCABULARY, seed)


def batch_of(rows: Sequence[Sequence[int]], prompts: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Padded on the right to ``LENGTH``; labels from position ``prompts[i]`` on (default 1)."""
    firsts = prompts or [1] * len(rows)
    labels = [[IGNORED] * first + list(row[first:]) for row, first in zip(rows, firsts, strict=True)]
    return batches.batch_of(rows, labels, LENGTH)


@pytest.fixture(scope="module")
def trained() -> GPT2LMHeadModel:
    """A GPT-2 trained until it predicts far better than by frequency."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH, **still)
        )
        rows = sample(512, shortest=8, seed=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(120):
            batch = batch_of([rows[(32 * step + place) % len(rows)] for place in range(32)])
            loss = summed_loss(model, batch) / (batch["labels"] != IGNORED).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert float(loss.detach()) < 0.6 * np.log(VOCABULARY)
    return model.eval()


# the two programs


@dataclass(frozen=True)
class Case:
    """Sequences and queries; ``prompts`` is the number of tokens of each query that are not counted."""

    train: list[list[int]]
    queries: list[list[int]]
    prompts: list[int]

    @property
    def asked(self) -> Rows:
        """The queries as kronfluence takes them."""
        return Rows(batch_of(self.queries, self.prompts))

    @staticmethod
    def make(padded: bool) -> Case:
        shortest = 6 if padded else LENGTH
        queries = sample(QUERIES, shortest, seed=3)
        return Case(sample(TRAIN, shortest, seed=2), queries, [max(1, len(row) // 2) for row in queries])


def run_raylux(model: PreTrainedModel, case: Case, folder: Path, kind: str = "ekfac", token_top: int = 0) -> raylux.Run:
    words = {str(token): token for token in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")))
    queries = [
        {"input_ids": row, "labels": [IGNORED] * prompt + row[prompt:]}
        for row, prompt in zip(case.queries, case.prompts, strict=True)
    ]
    overrides = ["fit.labels=dataset", "score.unit=raw", "query.max_error=0", f"curvature.kind={kind}"]
    overrides += ["engine.contraction_dtype=float32"]
    overrides += [f"score.token_top={token_top}", "score.layers=true"]
    train = [{"input_ids": row} for row in case.train]
    return raylux.attribute(model, tokenizer, train, queries, folder=folder / "run", overrides=overrides)


def run_peer(model: PreTrainedModel, case: Case, folder: Path, kind: str = "ekfac") -> Kronfluence:
    layers = [f"transformer.h.{layer}.mlp.{leaf}" for layer in range(2) for leaf in ("c_fc", "c_proj")]
    peer = Kronfluence(model, layers, Rows(batch_of(case.train)), folder, 16, kind, empirical=True)
    peer.fit()
    return peer


# comparisons


def assert_close(ours: Any, theirs: Any, limits: tuple[float, float]) -> None:
    """max|Δ|/RMS and Pearson."""
    x, y = np.asarray(ours, np.float64).ravel(), np.asarray(theirs, np.float64).ravel()
    assert x.shape == y.shape
    rms = np.sqrt(np.mean(y**2))
    assert rms > 0
    assert np.abs(x - y).max() <= limits[0] * rms
    assert np.corrcoef(x, y)[0, 1] >= limits[1]


@dataclass(frozen=True)
class Pair:
    """The two programs on one case, EK-FAC."""

    dtype: torch.dtype
    case: Case
    run: raylux.Run
    peer: Kronfluence

    def theirs(self, name: str = "scores", **changes: Any) -> dict[str, np.ndarray]:
        return self.peer.scores(self.case.asked, name, **changes)

    @property
    def limits(self) -> tuple[float, float]:
        return LIMITS[self.dtype]

    def ours(self, stage: str, unit: str, array: str) -> Tensor:
        folder = RunFolder(self.run.folder)
        return torch.from_numpy(folder.group(folder.manifest(stage, unit).meta["key"]).read(array)).double()


@pytest.fixture(
    scope="module",
    params=[(torch.float32, False), (torch.float32, True), (torch.float64, False), (torch.float64, True)],
    ids=["float32-equal", "float32-padded", "float64-equal", "float64-padded"],
)
def pair(request: pytest.FixtureRequest, trained: GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    dtype, padded = request.param
    folder = tmp_path_factory.mktemp("peers")
    model, case = copy.deepcopy(trained).to(dtype), Case.make(padded)
    # Every sequence of every query: what is compared below, beside the totals, is the share of each token.
    return Pair(dtype, case, run_raylux(model, case, folder, token_top=TRAIN), run_peer(model, case, folder))


def test_covariances(pair: Pair) -> None:
    theirs = pair.peer.factors
    for layer in pair.run.settings["model"]["layers"]:
        group = pair.run.settings["model"]["groups"][layer]
        for side, unit in (("activation", f"A:{group}"), ("gradient", f"S:{layer}")):
            total = theirs[f"{side}_covariance"][layer].double()
            count = theirs[f"num_{side}_covariance_processed"][layer]
            assert int(count) == sum(map(len, pair.case.train))
            assert_close(pair.ours(COVARIANCE, unit, "matrix"), total / count, pair.limits)


def test_eigenvalues_and_lambda(pair: Pair) -> None:
    theirs = pair.peer.factors
    for layer in pair.run.settings["model"]["layers"]:
        group = pair.run.settings["model"]["groups"][layer]
        for side, unit in (("activation", f"A:{group}"), ("gradient", f"S:{layer}")):
            # Rounding leaves tiny negative ones there; raylux sets them to zero.
            values = theirs[f"{side}_eigenvalues"][layer].double().sort().values.clamp(min=0)
            assert_close(pair.ours(EIGEN, unit, "values"), values, pair.limits)
        lam = theirs["lambda_matrix"][layer].double() / theirs["num_lambda_processed"][layer]
        ours = pair.ours(MOMENTS, layer, "matrix")
        assert_close(ours.flatten().sort().values, lam.flatten().sort().values, pair.limits)
        # The operators: G V for random V, each in its own basis.
        operators = [
            Spectral(ours, pair.ours(EIGEN, f"A:{group}", "vectors"), pair.ours(EIGEN, f"S:{layer}", "vectors")),
            Spectral(
                lam, theirs["activation_eigenvectors"][layer].double(), theirs["gradient_eigenvectors"][layer].double()
            ),
        ]
        v = torch.randn(8, *ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert_close(operators[0].multiply(v), operators[1].multiply(v), pair.limits)


def test_scores(pair: Pair) -> None:
    theirs = pair.theirs()["all_modules"]
    ours = pair.run.scores()
    assert ours.attrs["unit"] == "raw"
    assert_close(ours, theirs, pair.limits)
    assert (np.sign(theirs) > 0).any() and (np.sign(theirs) < 0).any()


def test_scores_by_layer(pair: Pair) -> None:
    theirs = pair.theirs("layers", compute_per_module_scores=True)
    for place, query in enumerate(pair.run.queries):
        ours = pair.run.layer_scores(query)
        for layer in ours["layer"].to_numpy():
            assert_close(ours.sel(layer=layer), theirs[layer][place], pair.limits)


def test_scores_by_token(pair: Pair) -> None:
    # kronfluence's array is [queries, sequences, padded tokens]; padding carries no gradient.
    theirs = pair.theirs("tokens", compute_per_token_scores=True)["all_modules"]
    ours = np.zeros_like(theirs)
    for place, query in enumerate(pair.run.queries):
        for row, name in enumerate(pair.run.sequences["sequence"]):
            shares = pair.run.token_scores(query, name)["influence"].to_numpy()
            ours[place, row, : len(shares)] = shares
    assert_close(ours, theirs, pair.limits)


@pytest.mark.parametrize("kind", ["kfac", "diagonal", "identity"])
@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
def test_other_kinds(kind: str, padded: bool, trained: GPT2LMHeadModel, tmp_path: Path) -> None:
    case = Case.make(padded)
    ours = run_raylux(trained, case, tmp_path, kind).scores()
    theirs = run_peer(trained, case, tmp_path, kind).scores(case.asked)["all_modules"]
    if kind == "kfac":
        theirs = theirs / (sum(map(len, case.train)) / len(case.train))
    assert_close(ours, theirs, LIMITS[torch.float32])
