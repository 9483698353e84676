"""kronfluence on a causal language model, stage by stage (``make peers`` installs it).

It wraps ``nn.Linear`` only, so it gets a copy of the model with each ``Conv1D`` of GPT-2 replaced by the linear layer
of the same map. Everything is computed in the model's precision, the eigendecompositions in float64 (its default);
λ is a tenth of the mean eigenvalue of a layer, as raylux's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from jobs.bench.batches import IGNORED, Rows, shifted, summed_loss


def as_linear(model: nn.Module) -> nn.Module:
    """A copy in which each Conv1D is the ``nn.Linear`` of the same map."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            rows, columns = module.weight.shape
            linear = nn.Linear(rows, columns, dtype=module.weight.dtype)
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
    return model


def task(layers: Sequence[str]) -> Any:
    """kronfluence's description of a language model: the summed loss, labels sampled where it asks for that."""
    from kronfluence.task import Task

    class LanguageModel(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            if not sample:
                return summed_loss(model, batch)
            logits, labels = shifted(model, batch)
            with torch.no_grad():
                drawn = torch.multinomial(logits.softmax(-1), 1).reshape(-1)
                drawn[labels == IGNORED] = IGNORED
            return nn.functional.cross_entropy(logits, drawn, ignore_index=IGNORED, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return summed_loss(model, batch)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(layers)

        def get_attention_mask(self, batch: Any) -> Tensor:
            return batch["attention_mask"]

    return LanguageModel()


class Kronfluence:
    """Factors and scores of one model on one set of sequences.

    Args:
        model: left as it is.
        layers: names of the modules to track.
        train: the sequences, fitted and scored.
        folder: where it keeps its files.
        batch: sequences that it takes together.
        kind: of curvature.
        empirical: labels of the data set instead of sampled ones.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        train: Rows,
        folder: Path,
        batch: int,
        kind: str = "ekfac",
        empirical: bool = False,
    ) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments

        dtype = next(model.parameters()).dtype
        described = task(layers)
        prepared = prepare_model(as_linear(model), described)
        self.analyzer = Analyzer("peer", prepared, described, cpu=True, disable_tqdm=True, output_dir=str(folder))
        self.train, self.batch = train, batch
        self.factor_args = FactorArguments(
            strategy=kind,
            use_empirical_fisher=empirical,
            activation_covariance_dtype=dtype,
            gradient_covariance_dtype=dtype,
            per_sample_gradient_dtype=dtype,
            lambda_dtype=dtype,
        )
        self.score_args = ScoreArguments(
            damping_factor=None, per_sample_gradient_dtype=dtype, precondition_dtype=dtype, score_dtype=dtype
        )

    def covariances(self) -> None:
        self.analyzer.fit_covariance_matrices("factors", self.train, self.batch, factor_args=self.factor_args)

    def eigenbases(self) -> None:
        self.analyzer.perform_eigendecomposition("factors", self.factor_args)

    def moments(self) -> None:
        self.analyzer.fit_lambda_matrices("factors", self.train, self.batch, factor_args=self.factor_args)

    def fit(self) -> None:
        """All factors, with whatever the kind of curvature needs."""
        self.analyzer.fit_all_factors(
            "factors", self.train, per_device_batch_size=self.batch, factor_args=self.factor_args
        )

    @property
    def factors(self) -> dict[str, dict[str, Tensor]]:
        """By kind of factor and layer."""
        analyzer = self.analyzer
        return {
            **analyzer.load_covariance_matrices("factors"),
            **analyzer.load_eigendecomposition("factors"),
            **analyzer.load_lambda_matrices("factors"),
        }

    def scores(
        self, queries: Rows, name: str = "scores", query_batch: int | None = None, **changes: Any
    ) -> dict[str, np.ndarray]:
        """[queries, sequences] by module, or one entry ``all_modules``.

        Args:
            queries: whose loss is the measurement.
            name: of its file.
            query_batch: queries that run together; all queries are held before the sequences are gone through once.
            changes: other score arguments.
        """
        arguments = copy.copy(self.score_args)
        size = query_batch or len(queries)
        arguments.query_gradient_accumulation_steps = -(-len(queries) // size)
        for key, value in changes.items():
            setattr(arguments, key, value)
        self.analyzer.compute_pairwise_scores(
            name,
            "factors",
            queries,
            self.train,
            per_device_query_batch_size=size,
            per_device_train_batch_size=self.batch,
            score_args=arguments,
        )
        return {module: x.double().numpy() for module, x in self.analyzer.load_pairwise_scores(name).items()}
