"""F: a bare forward and backward pass, weight gradients included, over a workload's sequences."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from jobs.bench.batches import batch_of, summed_loss
from jobs.bench.workloads import Case
from raylux import models
from raylux.config import CorpusSection, ModelSection
from raylux.corpus import Sequences, load_corpus


@dataclass(frozen=True)
class Inputs:
    """A case as raylux reads it: the model's files, its config section, the tokenizer, and the sequences."""

    files: models.ModelFiles
    section: ModelSection
    tokenizer: Any
    vocabulary: int
    context: int | None
    corpus: Sequences

    def model(self) -> PreTrainedModel:
        """Its weights, frozen, in eval mode."""
        return models.load_model(self.files, self.section.dtype, "cpu")

    @property
    def rows(self) -> list[tuple[Any, Any]]:
        """Tokens and labels of each sequence."""
        return [self.corpus.row(place) for place in range(len(self.corpus))]


def read(case: Case) -> Inputs:
    """The inputs of a case."""
    section, corpus = ModelSection(**case.sections["model"]), CorpusSection(**case.sections["corpus"])
    files = models.find_model(section)
    tokenizer, config = models.load_tokenizer(files), models.load_config(files)
    vocabulary, context = models.vocabulary_size(config), models.context_length(config)
    sequences = load_corpus(corpus, tokenizer, vocabulary, context)
    return Inputs(files, section, tokenizer, vocabulary, context, sequences)


def passes(inputs: Inputs, size: int, count: int) -> tuple[list[float], list[float]]:
    """Wall and CPU seconds of ``count`` passes in batches of ``size`` sequences; the first batch is run once before."""
    model = inputs.model().requires_grad_(True)
    rows = inputs.rows
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    batches = [batch_of([row for row, _ in part], [labels for _, labels in part]) for part in parts]
    summed_loss(model, batches[0]).backward()
    walls, cpus = [], []
    for _ in range(count):
        wall, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            model.zero_grad(set_to_none=True)
            summed_loss(model, batch).backward()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return walls, cpus
