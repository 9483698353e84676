"""What a run found, read from its folder: tables, arrays, and what is still missing."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from raylux import calibrated, health, normalised, ranking, shares, status
from raylux.calibrated import Calibration
from raylux.config import Config
from raylux.curvature import KINDS
from raylux.engine.stages import answers
from raylux.engine.stages.queries import records
from raylux.errors import MissingStageError, UserError
from raylux.evaluate import Agreement
from raylux.health import Quarantined
from raylux.ledger import QUERY
from raylux.normalised import Normalise
from raylux.ranking import Rows
from raylux.report.across import Across, across
from raylux.report.profile import StageTime, parsed, stage_times
from raylux.report.watching import Seen, seen
from raylux.shown import redacted
from raylux.status import StageStatus
from raylux.store import (
    Holder,
    Manifest,
    RunFolder,
    ScoreBlock,
    answer_blocks,
    present_holder,
    read_table,
    score_blocks,
)
from raylux.store.lazy import lazy_scores

SIGN = "positive: training on the sequence raises the measurement"


class Run:
    """A run folder, opened to look at.

    Raises:
        UserError: there is no run at ``folder``.
    """

    def __init__(self, folder: str, keep: object = None) -> None:
        self.folder = folder
        self.store = RunFolder(folder)
        self.settings = self.store.settings()
        self.config = Config.parse(self.settings["config"], where=f"{redacted(folder)}/run.yaml")
        # A temporary folder lives as long as the run that lies in it.
        self._keep = keep
        # Of files that were answered: what never changes need not be read again (``refreshed``).
        self._answered: dict[str, Manifest] = {}
        self._best: dict[str, pd.DataFrame] = {}

    def __repr__(self) -> str:
        return f"Run({redacted(self.folder)!r}, {len(self.queries)} queries, {len(self.rows)} sequences scored)"

    def refreshed(self) -> Run:
        """The same run as it is now; its corpus and the answers that were there are not read again."""
        run = Run(self.folder, self._keep)
        run._answered, run._best = self._answered, self._best
        if "sequences" in vars(self):
            vars(run)["sequences"] = self.sequences
        return run

    # what was asked

    @cached_property
    def query_records(self) -> dict[str, dict[str, Any]]:
        """Query id -> what its file said; those of a batch's files after the run's own."""
        own = {entry["id"]: entry["record"] for entry in records(self.store)}
        return own | {
            query: asked["record"]
            for answer in self.answers
            for query, asked in zip(answer.meta["ids"], answer.meta["queries"], strict=True)
        }

    @property
    def queries(self) -> list[str]:
        """Ids of all queries of the run, in the order they were first asked."""
        return list(self.query_records)

    @cached_property
    def measurements(self) -> pd.DataFrame:
        """Per query: the measurement f on the model as it is (nats) and the norm of its gradient (of ``trackstar``: in
        its metric).
        """
        rows = [
            {"query": query, **head}
            for manifest in self.store.units(QUERY).values()
            for query, head in zip(manifest.meta["queries"], manifest.meta["heads"], strict=True)
        ]
        rows += [
            {"query": query, **asked["head"]}
            for answer in self.answers
            for query, asked in zip(answer.meta["ids"], answer.meta["queries"], strict=True)
            if asked["head"]
        ]
        return pd.DataFrame(rows, columns=["query", "measurement", "norm"]).set_index("query")

    def solves(self) -> pd.DataFrame:
        """Per query how it was solved: solver, products with G, residual ‖v − (G + λ)x‖/‖v‖, whether that is within
        ``curvature.tolerance``, and slope: the multiple of the direct solution that is nearest in the norm of G + λ.

        Empty where ``curvature.solver`` is ``direct``. The column ``residuals`` has those after each product.
        """
        columns = ["query", "solver", "products", "residual", "solved", "slope", "residuals"]
        rows = [
            (query, solver["name"], len(seen), seen[-1] if seen else 0.0,
             not seen or seen[-1] <= solver["tolerance"], slope, seen)
            for manifest in self.store.units(QUERY).values()
            if (solver := manifest.meta.get("solver"))
            for query, seen, slope in zip(
                manifest.meta["queries"], solver["residuals"], solver["slopes"], strict=True
            )
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=columns).set_index("query")

    # sign and unit

    @property
    def unit(self) -> str:
        """nats: predicted change of f by one more copy of the sequence; raw: not divided by N; dot; cosine."""
        kind = KINDS[self.config.curvature.kind]
        if kind.normalised:
            return "cosine"
        return self.config.score.unit if kind.predicts else "dot"

    @property
    def segment(self) -> float | None:
        """Learning rates of the segment of training that the run stands for, summed; None: it stands for none."""
        return self.config.curvature.segment

    @property
    def carried(self) -> bool:
        """Whether its queries come through the segment or stage of training after it."""
        return bool(self.config.query.later)

    @property
    def train_size(self) -> int:
        """N: ``score.train_size``, or the number of sequences of the corpus."""
        return self.config.score.train_size or len(self.sequences)

    @property
    def scale(self) -> float:
        """What a stored score is multiplied by: 1/N where it is in nats."""
        return 1.0 / self.train_size if self.unit == "nats" else 1.0

    # what was found

    @cached_property
    def sequences(self) -> pd.DataFrame:
        """The corpus, one row per sequence: sequence, document, text, kept columns.

        Raises:
            MissingStageError: no corpus yet.
        """
        if "corpus" not in self.store.committed("corpus"):
            raise MissingStageError(f"{self.folder}: no corpus yet; run `{self.command('fit')}`")
        return read_table(self.store)

    @cached_property
    def rows(self) -> np.ndarray:
        """Corpus rows that have a score for some query, ascending."""
        blocks = [block.rows for block in self.blocks]
        return np.unique(np.concatenate(blocks)) if blocks else np.zeros(0, np.int64)

    def scores(self, normalise: Normalise = "none") -> xr.DataArray:
        """Influence of every scored sequence on every query: dims (query, sequence), read when looked at.

        NaN where a pair was not computed, as those that ``score.best`` left out. Attributes: unit, sign, train_size,
        curvature.

        Args:
            normalise: divide each sequence's scores by the length of its gradient, as ``raylux.normalised`` says.

        Raises:
            UserError: there is no such way, or the scores are cosines.
            MissingStageError: the lengths were not measured (``score.self_influence``).
        """
        return self.lazy(self.queries, self.rows, self.blocks, normalise)

    def lazy(
        self, queries: Sequence[str], rows: np.ndarray, blocks: Sequence[ScoreBlock], normalise: Normalise
    ) -> xr.DataArray:
        """``scores`` of some queries on some corpus rows, as they stand in some blocks."""
        norms = {str(name): float(norm) for name, norm in self.measurements["norm"].items()}
        return lazy_scores(
            self.store,
            queries,
            rows,
            self.sequences["sequence"].to_numpy()[rows],
            self.scale,
            self.meaning(normalise),
            norms if self.unit == "cosine" else None,
            "float64" if self.settings["plan"]["dtype"] == "float64" else "float32",
            self._keep,
            blocks,
            normalised.divisor(self, normalise, rows),
        )

    @cached_property
    def squares(self) -> tuple[np.ndarray, np.ndarray]:
        """As ``raylux.normalised.squares``: empty where no self-influence was measured."""
        return normalised.squares(self.store)

    def self_influence(self) -> pd.DataFrame:
        """How much each scored sequence teaches the model itself, in corpus order; v = ∇log p of it.

        Columns: sequence; self_influence vᵀ(G + λ)⁻¹v, in the run's unit: in nats what one more copy of a sequence
        adds to its own log p; norm ‖v‖; step ‖(G + λ)⁻¹v‖, in nats divided by N: how far that copy moves the weights;
        the kept columns; text.

        Raises:
            MissingStageError: none was measured (``score.self_influence``).
        """
        return normalised.table(self)

    def top(
        self,
        query: str,
        k: int = 10,
        by: Rows = "sequence",
        normalise: Normalise = "none",
    ) -> pd.DataFrame:
        """The k sequences (or documents, summed) with the largest influence on a query.

        Columns: rank, sequence (or document), influence, prefilter (NaN where the sequence was not among this
        query's own candidates), the kept columns, text.

        ``normalise``: as ``scores`` has it.

        Raises:
            UserError: no such query, documents asked of a packed corpus or of normalised scores, more than
                ``score.best``; as ``scores``.
            MissingStageError: the query has no scores yet; as ``scores``.
        """
        ranking.check_best(self, k, by)
        result = ranking.best(self.scored(query, by, normalise), k)
        result.attrs.update(self.meaning(normalise))
        return result

    def best(self) -> pd.DataFrame:
        """The sequences with the largest influence on each query that has scores: query, sequence, influence.

        Best first, at most ``BEST`` of a query; without reading more than that of the answers of a batch.
        """
        frames = [pd.DataFrame({"query": [], "sequence": [], "influence": np.zeros(0)})]
        for entry in records(self.store):
            with contextlib.suppress(MissingStageError):  # not scored, or not yet
                count = min(answers.BEST, self.config.score.best or answers.BEST)
                frames.append(self.top(entry["id"], count).assign(query=entry["id"]))
        for answer in self.answers:
            if answer.unit not in self._best:
                self._best[answer.unit] = ranking.best_of(self, answer)
            frames.append(self._best[answer.unit])
        return pd.concat([frame[["query", "sequence", "influence"]] for frame in frames if len(frame)] or frames)

    def across(self, k: int = 10) -> Across:
        """What the queries have in common: sequences among the ``k`` best of many, and queries that share them."""
        return across(self.best(), k)

    def layer_scores(self, query: str) -> xr.DataArray:
        """Influence by layer: dims (layer, sequence) over the scored sequences; layers sum to the total.

        Raises:
            MissingStageError: no per-layer scores were kept.
        """
        return shares.by_layer(self, query)

    def token_scores(self, query: str, sequence: str) -> pd.DataFrame:
        """Influence by token of one sequence: position, token_id, token, influence; tokens sum to the total.

        The share of a token is that of its outer product g aᵀ: it is about predicting the token after it.

        Raises:
            UserError: no such sequence.
            MissingStageError: none were kept for this pair.
        """
        return shares.by_token(self, query, sequence)

    def word_scores(self, query: str, sequence: str) -> pd.DataFrame:
        """Influence by word of one sequence, largest first: token_id, token, count, influence; words sum to the total.

        Where the word embedding alone is tracked (``model.layers``) a word's share is ⟨G_w(query), G_w(sequence)⟩, and
        words that the two do not share have none: the decomposition of TracIn-WE (Yeh et al. 2022). Otherwise as
        ``token_scores``, summed over the places where a token stands.

        Raises:
            UserError: as ``token_scores``.
            MissingStageError: as ``token_scores``.
        """
        return shares.by_word(self, query, sequence)

    # how far it can be trusted

    @cached_property
    def calibration(self) -> Calibration | None:
        """By how much scores are to be multiplied, as ``raylux.calibrate`` found; None where it was not asked."""
        return calibrated.calibration(self.store, self.train_size)

    def verification(self) -> pd.DataFrame:
        """What ``raylux.verify`` measured beside what was predicted, as ``calibrated.verification``; may be empty."""
        return calibrated.verification(self)

    def agreements(self) -> dict[str, Agreement]:
        """How changes that were measured follow each kind of prediction; empty where nothing was."""
        return calibrated.agreements(self.verification())

    # what is there

    def status(self) -> list[StageStatus]:
        """Every stage: done or not, what is there, and the command that makes the rest."""
        return status.stages(self)

    @cached_property
    def quarantined(self) -> list[Quarantined]:
        """Units that were given up, in the order of their names; empty where everything was computed."""
        return health.quarantined(self.store)

    def profile(self) -> list[StageTime]:
        """Where the time went, by stage and kind of work; empty where progress.jsonl is not there."""
        return stage_times(self._events() or [])

    def watched(self) -> Seen | None:
        """How far the run is, by what its driver has told so far; None where progress.jsonl is not there."""
        events = self._events()
        return None if events is None else seen(events)

    def driver(self) -> Holder | None:
        """The driver that works on the run now; None where its last one is done, or has certainly ended."""
        return present_holder(self.store.files)

    def _events(self) -> list[dict[str, Any]] | None:
        try:
            return parsed(self.store.files.get("progress.jsonl"))
        except FileNotFoundError:
            return None

    def mixed_numerics(self) -> dict[str, list[str]]:
        """What differed between the machines that computed the run's units, as torch -> its versions; empty: nothing.

        Only where it is empty another run of the same config is promised equal bits.
        """
        return health.mixed_numerics(self.store)

    def problems(self, checksums: bool = True) -> list[str]:
        """What is missing or damaged in the run folder, one line each; empty if all is well.

        Args:
            checksums: read every object and compare its checksum; otherwise existence and size alone.
        """
        return self.store.check(checksums)

    # common

    @cached_property
    def answers(self) -> list[Manifest]:
        return answers.answers(self.store, self._answered)

    def answer(self, query: str) -> Manifest | None:
        """The answer that a query is of; None for one of the run's own."""
        return next((answer for answer in self.answers if query in answer.meta["ids"]), None)

    @cached_property
    def blocks(self) -> list[ScoreBlock]:
        """``own_blocks``, then those of all answers."""
        return [*self.own_blocks, *answer_blocks(self.store, self.answers)]

    @cached_property
    def own_blocks(self) -> list[ScoreBlock]:
        """Of the run's own queries (and of files that are not answered yet)."""
        return score_blocks(self.store)

    def meaning(self, normalise: Normalise = "none") -> dict[str, Any]:
        """What tables and arrays say of a score: unit, sign, train_size, curvature."""
        return {
            "unit": normalised.unit(normalise, self.unit),
            "sign": SIGN,
            "train_size": self.train_size,
            "curvature": self.config.curvature.kind,
        }

    def command(self, stage: str) -> str:
        return f"raylux {stage} {self.settings.get('config_path') or 'CONFIG'}"

    def known(self, query: str) -> None:
        """Raises UserError where the run has no such query."""
        if query not in self.query_records:
            raise UserError(f"{self.folder}: no query '{query}'; it has {', '.join(self.queries[:10]) or 'none'}")

    def scored(self, query: str, by: Rows = "sequence", normalise: Normalise = "none") -> pd.DataFrame:
        """Every scored sequence (or document) of a query, in corpus order: the columns of ``top`` without the rank.

        Raises:
            UserError: as ``top``.
            MissingStageError: as ``top``.
        """
        return ranking.scored(self, query, by, normalise)
