"""What the study of two-stage scoring runs on: a model, sequences to fit, candidates and very many queries.

``A`` is the benchmark's workload A with more of its language, ``demo`` the demo's model on its own corpus and further
Wikipedia leads, ``tiny`` the benchmark's smallest, to see that the job runs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jobs.bench.workloads import WORKLOADS, Workload
from raylux.batches import IGNORED, TokenRow
from raylux.demo.corpus import CorpusSettings, build_corpus, read_leads
from raylux.demo.training import TrainingSettings, train_cached
from raylux.errors import UserError
from raylux.models import ModelFiles, load_model, load_tokenizer
from raylux.sampling import sequence_key

# Leads beside those of the demo's corpus: shortest and longest, in characters.
_LEADS = (60, 800)


@dataclass(frozen=True)
class Study:
    """A model and its sequences.

    Attributes:
        model: frozen, in eval mode.
        rows: "fit" (whose labels are drawn from the model), "cand" and "query" -> sequences.
    """

    model: PreTrainedModel
    rows: dict[str, list[TokenRow]]


def prepare(name: str, sequences: int, queries: int, fitted: int) -> Study:
    """The study's case of that name.

    Args:
        name: A, demo or tiny.
        sequences: candidates, N; the first ``fitted`` of them are fitted.
        queries: Q.
        fitted: sequences whose covariances and Λ make the curvature.
    """
    if name == "demo":
        return _demo(sequences, queries, fitted)
    workload = WORKLOADS[name]
    assert isinstance(workload, Workload)
    folder = workload.prepare().sections["model"]
    model = load_model(ModelFiles(folder["path"], folder["tokenizer"]), "float32", "cpu")
    candidates = [_row(tokens, 1) for tokens in workload.text(sequences, 2)]
    asked = [_row(tokens, 1) for tokens in workload.text(queries, 3)]
    return Study(model, {"fit": candidates[:fitted], "query": asked, "cand": candidates})


def _demo(sequences: int, queries: int, fitted: int) -> Study:
    """The demo's documents and other leads as candidates; its questions and openings of leads not among them."""
    corpus = build_corpus(CorpusSettings())
    texts = [document.text for document in corpus.documents]
    settings = TrainingSettings()
    folder, _ = train_cached(texts, settings)
    files = ModelFiles(str(folder), str(folder))
    tokenizer = load_tokenizer(files)
    known = set(texts)
    others = sorted({" ".join(text.split()) for _, text in read_leads()} - known)
    others = [text for text in others if _LEADS[0] <= len(text) <= _LEADS[1]]
    random.Random(1).shuffle(others)
    used = max(0, sequences - len(texts))
    asked = [_asked(tokenizer, q.prompt, q.completion) for q in corpus.questions]
    asked += [_asked(tokenizer, *_opening(text)) for text in others[used:]]
    if len(asked) < queries:
        raise UserError(f"there are leads for {len(asked)} queries beside {sequences} candidates, {queries} wanted")
    encoded = tokenizer((texts + others)[:sequences], truncation=True, max_length=settings.context)["input_ids"]
    candidates = [_row(tokens, 1) for tokens in encoded]
    model = load_model(files, "float32", "cpu")
    return Study(model, {"fit": candidates[:fitted], "query": asked[:queries], "cand": candidates})


def _opening(text: str) -> tuple[str, str]:
    """A lead's first words as prompt, the next four as completion, as the demo asks."""
    words = text.split(" ")
    start = max(4, min(10, len(words) // 3))
    return " ".join(words[:start]), " " + " ".join(words[start : start + 4])


def _asked(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> TokenRow:
    return _row(tokenizer(prompt + completion)["input_ids"], len(tokenizer(prompt)["input_ids"]))


def _row(tokens: Sequence[int], start: int) -> TokenRow:
    """Tokens with a loss from place ``start`` on."""
    ids = np.array(tokens, np.int32)
    labels = ids.copy()
    labels[:start] = IGNORED
    return TokenRow(ids, labels, sequence_key(" ".join(map(str, tokens))))
