"""What a run found, read from its folder: tables, arrays, and what is still missing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from raylux import health
from raylux.config import Config
from raylux.curvature import KINDS
from raylux.engine.records import COVARIANCE, EIGEN, MOMENTS, QUERY, SCORE
from raylux.engine.stages.prefilter import candidates
from raylux.engine.stages.queries import records
from raylux.engine.stages.score import token_rows
from raylux.errors import MissingStageError, UserError
from raylux.health import Quarantined
from raylux.report.profile import StageTime, parsed, stage_times
from raylux.report.watching import Seen, seen
from raylux.shown import redacted
from raylux.store import Holder, RunFolder, ScoreBlock, lazy_scores, present_holder, read_table, score_blocks

SIGN = "positive: training on the sequence raises the measurement"


@dataclass(frozen=True)
class StageStatus:
    """One line of ``raylux inspect``: a stage, whether it is done, what is there, and what makes the rest."""

    name: str
    done: bool
    detail: str
    command: str


class Run:
    """A run folder, opened to look at.

    Raises:
        UserError: there is no run at ``folder``.
    """

    def __init__(self, folder: str, keep: object = None) -> None:
        self.folder = folder
        self._store = RunFolder(folder)
        self.settings = self._store.settings()
        self.config = Config.parse(self.settings["config"], where=f"{redacted(folder)}/run.yaml")
        # A temporary folder lives as long as the run that lies in it.
        self._keep = keep

    def __repr__(self) -> str:
        return f"Run({redacted(self.folder)!r}, {len(self.queries)} queries, {len(self.rows)} sequences scored)"

    # what was asked

    @cached_property
    def query_records(self) -> dict[str, dict[str, Any]]:
        """Query id -> what its file said."""
        return {entry["id"]: entry["record"] for entry in records(self._store)}

    @property
    def queries(self) -> list[str]:
        """Ids of all queries of the run, in the order they were first asked."""
        return list(self.query_records)

    @cached_property
    def measurements(self) -> pd.DataFrame:
        """Per query: the measurement f on the model as it is (nats) and the norm of its gradient."""
        rows = [
            {"query": query, **head}
            for manifest in self._store.units(QUERY).values()
            for query, head in zip(manifest.meta["queries"], manifest.meta["heads"], strict=True)
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
            for manifest in self._store.units(QUERY).values()
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
    def train_size(self) -> int:
        """N: ``score.train_size``, or the number of sequences of the corpus."""
        return self.config.score.train_size or len(self.sequences)

    @property
    def _scale(self) -> float:
        return 1.0 / self.train_size if self.unit == "nats" else 1.0

    # what was found

    @cached_property
    def sequences(self) -> pd.DataFrame:
        """The corpus, one row per sequence: sequence, document, text, kept columns.

        Raises:
            MissingStageError: no corpus yet.
        """
        if "corpus" not in self._store.committed("corpus"):
            raise MissingStageError(f"{self.folder}: no corpus yet; run `{self._command('fit')}`")
        return read_table(self._store)

    @cached_property
    def rows(self) -> np.ndarray:
        """Corpus rows that have a score for some query, ascending."""
        blocks = [block.rows for block in score_blocks(self._store)]
        return np.unique(np.concatenate(blocks)) if blocks else np.zeros(0, np.int64)

    def scores(self) -> xr.DataArray:
        """Influence of every scored sequence on every query: dims (query, sequence), read when looked at.

        NaN where a pair was not computed. Attributes: unit, sign, train_size, curvature.
        """
        names = self.sequences["sequence"].to_numpy()[self.rows]
        norms = {str(name): float(norm) for name, norm in self.measurements["norm"].items()}
        dtype = "float64" if self.settings["plan"]["dtype"] == "float64" else "float32"
        return lazy_scores(
            self._store,
            self.queries,
            self.rows,
            names,
            self._scale,
            self._attrs(),
            norms if self.unit == "cosine" else None,
            dtype,
            self._keep,
        )

    def top(self, query: str, k: int = 10, by: Literal["sequence", "document"] = "sequence") -> pd.DataFrame:
        """The k sequences (or documents, their sequences summed) with the largest influence on a query.

        Columns: rank, sequence (or document), influence, prefilter (NaN where the sequence was not among this
        query's own candidates), the kept columns, text.

        Raises:
            UserError: no such query, or documents asked of a packed corpus.
            MissingStageError: the query has no scores yet.
        """
        table = self._scored(query)
        if by == "document":
            table = self._by_document(table)
        best = table.sort_values("influence", ascending=False, kind="stable").head(k)
        best.insert(0, "rank", np.arange(1, len(best) + 1))
        result = best.reset_index(drop=True)
        result.attrs.update(self._attrs())
        return result

    def layer_scores(self, query: str) -> xr.DataArray:
        """Influence by layer: dims (layer, sequence) over the scored sequences; layers sum to the total.

        Raises:
            MissingStageError: no per-layer scores were kept.
        """
        self._known(query)
        layers = self.settings["model"]["layers"]
        values = np.full((len(layers), len(self.rows)), np.nan)
        blocks = [block for block in score_blocks(self._store) if block.layers and query in block.queries]
        if not blocks:
            raise MissingStageError(
                f"{self.folder}: no per-layer scores of '{query}'; run `{self._command('score')} score.layers=true`"
            )
        for block in blocks:
            part = self._store.group(block.key).read("layers", block.queries.index(query))
            values[:, np.searchsorted(self.rows, block.rows)] = part * self._scale
        names = self.sequences["sequence"].to_numpy()[self.rows]
        coords = {"layer": np.asarray(layers, object), "sequence": names}
        return xr.DataArray(values, coords, ("layer", "sequence"), name="influence", attrs=self._attrs())

    def token_scores(self, query: str, sequence: str) -> pd.DataFrame:
        """Influence by token of one sequence: position, token_id, token, influence; tokens sum to the total.

        The share of a token is that of its outer product g aᵀ: it is about predicting the token after it.

        Raises:
            UserError: no such sequence.
            MissingStageError: none were kept for this pair.
        """
        self._known(query)
        names = self.sequences["sequence"]
        found = np.flatnonzero(names.to_numpy() == sequence)
        if not len(found):
            raise UserError(f"{self.folder}: no sequence '{sequence}'")
        place = token_rows(self._store, query).get(int(found[0]))
        if place is None:
            top = self.config.score.token_top
            raise MissingStageError(
                f"{self.folder}: no per-token scores of '{sequence}' for '{query}' (kept for the {top} best); "
                f"run `{self._command('score')} score.token_top={max(2 * top, 10)}`"
            )
        key, index = place
        group = self._store.group(key)
        start, stop = group.read("offsets")[index : index + 2]
        tokens = group.read("tokens", slice(start, stop))
        shares = group.read("shares", slice(start, stop)) * self._scale
        result = pd.DataFrame(
            {"position": np.arange(len(tokens)), "token_id": tokens, "token": self._decode(tokens), "influence": shares}
        )
        result.attrs.update(self._attrs())
        return result

    # what is there

    def status(self) -> list[StageStatus]:
        """Every stage: done or not, what is there, and the command that makes the rest."""
        present = self._store.committed
        kind = KINDS[self.config.curvature.kind]
        layers = self.settings["model"]["layers"]
        leaders = set(self.settings["model"]["groups"].values())
        matrices = len(leaders) + len(layers)
        corpus = self._store.manifest("corpus", "corpus").meta if present("corpus") else None
        lines = [
            StageStatus(
                "corpus",
                corpus is not None,
                f"{corpus['sequences']:,} sequences, {corpus['tokens']:,} tokens{_dropped(corpus['dropped'])}"
                if corpus
                else "nothing yet",
                self._command("fit"),
            )
        ]
        parts, wanted = [], []
        if kind.basis:
            parts += [
                f"covariances {len(present(COVARIANCE))} of {matrices}",
                f"eigenbases {len(present(EIGEN))} of {matrices}",
            ]
            wanted += [len(present(COVARIANCE)) >= matrices, len(present(EIGEN)) >= matrices]
        if kind.moments:
            parts.append(f"Λ {len(present(MOMENTS))} of {len(layers)} layers")
            wanted.append(len(present(MOMENTS)) >= len(layers))
        lines.append(
            StageStatus("fit", all(wanted), ", ".join(parts) or f"nothing to fit for {kind.name}", self._command("fit"))
        )
        return lines + self._query_status()

    def _query_status(self) -> list[StageStatus]:
        asked = set(self.queries)
        setting = self.config.prefilter
        found = candidates(self._store, setting.kind, setting.top)
        filtered = setting.kind == "none" or (bool(asked) and asked <= set(found))
        union = len(np.unique(np.concatenate([rows for rows, _ in found.values()]))) if found else 0
        solved = {query for manifest in self._store.units(QUERY).values() for query in manifest.meta["queries"]}
        blocks = score_blocks(self._store)
        scored = self._complete(blocks, found)
        detail = "none: every sequence" if setting.kind == "none" else f"{union:,} candidates of {len(found)} queries"
        page = self._store.files.exists("report/index.html")
        # What was given up is missing for good: no command makes it, so the stage is done without it.
        unsolved, unscored = self._given_up(QUERY), self._given_up(SCORE)
        return [
            StageStatus("prefilter", filtered, detail, self._command("prefilter")),
            StageStatus(
                "query",
                bool(asked) and asked <= solved | unsolved,
                f"{len(solved)} of {len(asked)} queries solved{_solved_how(self.solves())}{_given_up(len(unsolved))}",
                self._command("query"),
            ),
            StageStatus(
                "score",
                bool(asked) and asked <= scored | unsolved,
                f"{len(scored)} of {len(asked)} queries, {len(self.rows):,} sequences{_given_up(len(unscored))}",
                self._command("score"),
            ),
            StageStatus("report", page, "report/index.html" if page else "nothing yet", self._command("report")),
        ]

    def _complete(self, blocks: list[ScoreBlock], found: dict[str, tuple[np.ndarray, np.ndarray]]) -> set[str]:
        """Queries that have a score for each of their own candidates (without a prefilter: for every sequence).

        A row is scored for all queries at once, so where all queries are complete the union of candidates is too.
        """
        lost = self._given_up(SCORE)
        gone = np.flatnonzero(self.sequences["sequence"].isin(list(lost))) if lost else np.zeros(0, np.int64)
        rows: dict[str, list[np.ndarray]] = {}
        for block in blocks:
            for query in block.queries:
                rows.setdefault(query, [gone]).append(block.rows)
        if self.config.prefilter.kind == "none":
            wanted = dict.fromkeys(rows, np.arange(len(self.sequences)))
        else:
            wanted = {query: found[query][0] for query in rows if query in found}
        return {query for query, own in wanted.items() if np.isin(own, np.concatenate(rows[query])).all()}

    @cached_property
    def quarantined(self) -> list[Quarantined]:
        """Units that were given up, in the order of their names; empty where everything was computed."""
        return health.quarantined(self._store)

    def _given_up(self, stage: str) -> set[str]:
        """Ids of what was quarantined in a stage."""
        return {name for unit in self.quarantined if unit.stage == stage for name in unit.sequences}

    def profile(self) -> list[StageTime]:
        """Where the time went, by stage and kind of work; empty where progress.jsonl is not there."""
        return stage_times(self._events() or [])

    def watched(self) -> Seen | None:
        """How far the run is, by what its driver has told so far; None where progress.jsonl is not there."""
        events = self._events()
        return None if events is None else seen(events)

    def driver(self) -> Holder | None:
        """The driver that works on the run now; None where its last one is done, or has certainly ended."""
        return present_holder(self._store.files)

    def _events(self) -> list[dict[str, Any]] | None:
        try:
            return parsed(self._store.files.get("progress.jsonl"))
        except FileNotFoundError:
            return None

    def mixed_numerics(self) -> dict[str, list[str]]:
        """What differed between the machines that computed the run's units, as torch -> its versions; empty: nothing.

        Only where it is empty another run of the same config is promised equal bits.
        """
        return health.mixed_numerics(self._store)

    def problems(self, checksums: bool = True) -> list[str]:
        """What is missing or damaged in the run folder, one line each; empty if all is well.

        Args:
            checksums: read every object and compare its checksum; otherwise existence and size alone.
        """
        return self._store.check(checksums)

    # common

    def _attrs(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "sign": SIGN,
            "train_size": self.train_size,
            "curvature": self.config.curvature.kind,
        }

    def _command(self, stage: str) -> str:
        return f"raylux {stage} {self.settings.get('config_path') or 'CONFIG'}"

    def _known(self, query: str) -> None:
        if query not in self.query_records:
            raise UserError(f"{self.folder}: no query '{query}'; it has {', '.join(self.queries[:10]) or 'none'}")

    def _scored(self, query: str) -> pd.DataFrame:
        """Every scored sequence of a query with its influence, in corpus order."""
        self._known(query)
        values = self.scores().sel(query=query).to_numpy() if len(self.rows) else np.zeros(0)
        there = ~np.isnan(values)
        if not there.any():
            raise MissingStageError(f"{self.folder}: no scores of '{query}'; run `{self._command('score')}`")
        rows = self.rows[there]
        table = self.sequences.iloc[rows]
        prefilter = np.full(len(self.sequences), np.nan)
        setting = self.config.prefilter
        found, similarity = candidates(self._store, setting.kind, setting.top).get(query, (rows[:0], np.zeros(0)))
        prefilter[found] = similarity
        kept = [name for name in table.columns if name not in ("sequence", "document", "text")]
        columns = {"sequence": table["sequence"], "influence": values[there], "prefilter": prefilter[rows]}
        columns |= {name: table[name] for name in kept} | {"document": table["document"], "text": table["text"]}
        frame = pd.DataFrame({name: np.asarray(column) for name, column in columns.items()})
        return frame if (frame["document"] != frame["sequence"]).any() else frame.drop(columns="document")

    def _by_document(self, table: pd.DataFrame) -> pd.DataFrame:
        if self.config.corpus.pack:
            raise UserError(f"{self.folder}: a packed corpus has no scores per document (corpus.pack is true)")
        if "document" not in table:
            return table.rename(columns={"sequence": "document"})
        rest = {
            name: "first" for name in table.columns if name not in ("document", "sequence", "influence", "prefilter")
        }
        grouped = table.groupby("document", sort=False).agg({"influence": "sum", "prefilter": "max", **rest})
        return grouped.reset_index()

    def _decode(self, tokens: np.ndarray) -> list[str]:
        from raylux.models import ModelFiles, load_tokenizer

        files = ModelFiles(self.settings["model"]["folder"], self.settings["model"]["tokenizer_folder"])
        tokenizer = load_tokenizer(files)
        return [str(tokenizer.decode([int(token)])) for token in tokens]


def _solved_how(solves: pd.DataFrame) -> str:
    if solves.empty:
        return ""
    short = int((~solves["solved"].astype(bool)).sum())
    text = f" by {solves['solver'].iloc[0]}, residual at most {solves['residual'].max():.1e}"
    return f"{text}; {short} above curvature.tolerance" if short else text


def _given_up(count: int) -> str:
    return f"; {count:,} quarantined" if count else ""


def _dropped(dropped: dict[str, int]) -> str:
    parts = [f"{count:,} {name.replace('_', ' ')}" for name, count in dropped.items() if count]
    return f"; dropped: {', '.join(parts)}" if parts else "; nothing dropped"
