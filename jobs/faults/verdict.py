"""Whether a run that was killed again and again is as good as one that was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from raylux.config import Config
from raylux.engine.plan import choose_fit_rows
from raylux.ledger import COVARIANCE, EIGEN, LABELS, MOMENTS, QUARANTINE, QUERY, SCORE, SNAPSHOT, SQUARES, TOKENS
from raylux.store import CorpusReader, Manifest, RunFolder, read_table, score_blocks

_STAGES = (COVARIANCE, LABELS, EIGEN, MOMENTS, QUERY, SCORE, TOKENS, SQUARES)
_ARRAYS = (
    *("matrix", "labels", "values", "vectors"),
    *("rank", "place", "dense", "left", "right"),
    *("total", "layers", "norms", "shares", "offsets", "tokens", "squares"),
)


def differing(one: Path | str, other: Path | str) -> list[str]:
    """Names of the committed arrays of two runs whose bits differ, or that only one has."""
    found, wanted = dict(_arrays(RunFolder(str(one)))), dict(_arrays(RunFolder(str(other))))
    return [
        name
        for name in {**found, **wanted}
        if name not in found or name not in wanted or not _equal(found[name], wanted[name])
    ]


def count(folder: Path | str) -> int:
    """Committed arrays of a run."""
    return sum(1 for _ in _arrays(RunFolder(str(folder))))


def problems(folder: Path | str) -> list[str]:
    """What of a run's ledger does not say that each unit counts once, one line each."""
    run = RunFolder(str(folder))
    config = Config.model_validate(run.settings()["config"])
    return [*_scores(run), *_fit(run, config), *_queries(run), *_rest(run)]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _arrays(run: RunFolder) -> Iterator[tuple[str, np.ndarray]]:
    """Committed arrays by name; scores row by row, as who keeps what decides which rows share a unit."""
    for stage in _STAGES:
        for unit, manifest in run.units(stage).items():
            if stage == SCORE:
                yield from _rows(run, manifest)
                continue
            keys: dict[str, str] = manifest.meta["layers"] if stage == QUERY else {"": manifest.meta["key"]}
            for part, key in keys.items():
                group = run.group(key)
                for name in _ARRAYS:
                    if name in group:
                        yield f"{stage} {unit} {part} {name}", group.read(name)


def _rows(run: RunFolder, manifest: Manifest) -> Iterator[tuple[str, np.ndarray]]:
    group, asked = run.group(manifest.meta["key"]), ", ".join(manifest.meta["queries"])
    for name in _ARRAYS:
        if name in group:
            array = group.read(name)
            for place, row in enumerate(manifest.meta["rows"]):
                yield f"{SCORE} row {row} of {asked} {name}", array[..., place]


def _asked(run: RunFolder) -> list[str]:
    return [entry["id"] for manifest in run.units("queries").values() for entry in manifest.meta["queries"]]


def _scores(run: RunFolder) -> Iterator[str]:
    """Every corpus row × query stands in one block, without a prefilter."""
    asked = _asked(run)
    times = np.zeros((len(asked), len(CorpusReader(run))), np.int64)
    for block in score_blocks(run):
        places = np.array([asked.index(query) for query in block.queries])
        np.add.at(times, np.ix_(places, block.rows), 1)
    if (times != 1).any():
        yield f"scores: {int((times == 0).sum())} pairs are missing, {int((times > 1).sum())} stand in several blocks"


def _fit(run: RunFolder, config: Config) -> Iterator[str]:
    """The sums of the fit count its sequences and tokens, no more and no fewer."""
    rows = choose_fit_rows(read_table(run)["sequence"].tolist(), config.fit.sequences, config.fit.seed)
    tokens = int(CorpusReader(run).lengths[rows].sum())
    for stage in (COVARIANCE, MOMENTS):
        for unit, manifest in run.units(stage).items():
            if manifest.meta["sequences"] != len(rows):
                yield f"{stage} {unit}: {manifest.meta['sequences']} sequences instead of {len(rows)}"
            if stage == COVARIANCE and manifest.meta["rows"] != tokens:
                yield f"{stage} {unit}: {manifest.meta['rows']} tokens instead of {tokens}"


def _queries(run: RunFolder) -> Iterator[str]:
    for stage in (QUERY, TOKENS):
        times = Counter[str]()
        for manifest in run.units(stage).values():
            times.update(manifest.meta["queries"] if stage == QUERY else [manifest.meta["query"]])
        wrong = [query for query in _asked(run) if times[query] != 1]
        if wrong:
            yield f"{stage}: {', '.join(wrong[:5])}: in {times[wrong[0]]} blocks instead of one"


def _rest(run: RunFolder) -> Iterator[str]:
    quarantined = sorted(run.committed(QUARANTINE))
    if quarantined:
        yield f"quarantined, though nothing but kills happened: {', '.join(quarantined[:5])}"
    if run.committed(SNAPSHOT):
        yield f"snapshots of finished passes are still there: {', '.join(sorted(run.committed(SNAPSHOT)))}"
    for stage in _STAGES:
        for manifest in run.units(stage).values():
            yield from run.verify(manifest)
