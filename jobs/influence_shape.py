"""How influence is spread: over sequences (sparsity, tails), over layers, and over the ranks of s_test.

A small Llama is trained on Wikipedia leads; every lead is scored for held-out ones, without a prefilter. What Grosse et
al. 2023 say of their models (5.2) is measured on it: how much the best sequences carry, whether the tail follows a
power law, where in the model the influence lies, what a rank keeps, and what a prefilter would have missed.

    python jobs/influence_shape.py --write
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from jobs import pages
from jobs.lds import methods
from jobs.lds.retrain import FIRST_SEED
from jobs.lds.study import Settings as Drawn
from jobs.lds.study import Study
from jobs.shape import page
from jobs.shape.ranks import rank_scores
from raylux.demo.training import train_model

NAME = "influence-shape"

RANKS = (1, 2, 4, 8, 16, 32)
CONTEXT = Drawn().training(FIRST_SEED).context


@dataclass(frozen=True)
class Settings:
    """Equal settings give equal numbers on the same machine.

    Attributes:
        train: sequences, N.
        queries: held-out ones.
        ranked: sequences on which ranks are compared.
        epochs: with ``vocabulary``, ``layers`` and ``width`` as in ``TrainingSettings``.
        vocabulary: see ``epochs``.
        layers: see ``epochs``.
        width: see ``epochs``.
        seed: chooses texts and queries.
    """

    train: int = 6000
    queries: int = 24
    ranked: int = 500
    epochs: int = 6
    vocabulary: int = 2048
    layers: int = 4
    width: int = 128
    seed: int = 0

    def drawn(self) -> Drawn:
        """As the study of ``jobs/datamodel.py`` draws its texts and trains its model; of subsets it has one."""
        return Drawn(
            seed=self.seed, train=self.train, queries=self.queries, subsets=1, repeats=1, vocabulary=self.vocabulary,
            layers=self.layers, width=self.width, epochs=self.epochs,
        )  # fmt: skip


def measure(settings: Settings, folder: Path) -> page.Found:
    """Train, score everything, and look at ranks on some of it.

    Raises:
        UserError: there are not enough leads, or their package is missing.
    """
    study = _uncut(Study.of(settings.drawn()))
    model = train_model(study.texts, study.tokenizer, study.settings.training(FIRST_SEED))
    options = [
        "score.layers=true",
        "query.basis=standard",
        "query.low_rank=auto",
        f"score.train_size={len(study.texts)}",
    ]
    run = methods.run(study, model, folder / "ekfac", methods.EKFAC, [*options, "score.unit=nats"])
    some = np.sort(np.random.default_rng(settings.seed).choice(len(study.texts), settings.ranked, replace=False))
    return page.Found(
        scores=methods.array(study, run),
        layers=np.stack([run.layer_scores(query).to_numpy() for query in run.queries]),
        names=[str(name) for name in run.layer_scores(run.queries[0])["layer"].to_numpy()],
        dots=methods.scores(study, model, folder / "identity", "identity"),
        filters={kind: methods.prefiltered(study, kind) for kind in ("idf", "bm25")},
        ranked=rank_scores(run, model, some, RANKS),
        ranks=RANKS,
        logprob=run.measurements["measurement"].to_numpy(float),
    )


def _uncut(study: Study) -> Study:
    """Without the few texts that are longer than the model's context (other scripts): each is one sequence."""
    rows = study.tokenizer(study.texts, verbose=False)["input_ids"]
    texts = [text for text, row in zip(study.texts, rows, strict=True) if len(row) <= CONTEXT]
    return replace(study, texts=texts)


def measured(options: dict[str, Any], command: str) -> pages.Page:
    """The study's page and plot."""
    settings = Settings(**options)
    pages.require(
        settings.queries >= 1 and settings.train >= 300 and 2 <= settings.ranked <= settings.train,
        "--queries is at least 1, --train at least 300, --ranked from 2 to --train",
    )
    with tempfile.TemporaryDirectory() as folder:
        found = measure(settings, Path(folder))
    return pages.Page(page.page(settings.drawn(), found, command), partial(page.plot, found))


def main(arguments: Sequence[str] | None = None) -> int:
    """The study as a program."""
    return pages.run(pages.parser(__doc__, NAME, fields(Settings)), arguments, NAME, measured)


if __name__ == "__main__":
    sys.exit(main())
