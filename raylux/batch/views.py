"""What a batch lays down for people and other programs: a table per file, tables and a page across all queries.

All of it is made from the answers and may be written again at any time.
"""

from __future__ import annotations

import io
import urllib.parse

import pandas as pd

from raylux.errors import MissingStageError
from raylux.report.html import write_html
from raylux.results import Run
from raylux.store import Manifest, RunFolder

# Sequences of a query in the table of its file.
_TOP = 100
_FOLDER = "answers"


def write_missing(run: Run, folder: RunFolder) -> None:
    """Write ``answers/FILE.parquet`` of each answered file that has none."""
    there = set(folder.files.names(_FOLDER))
    for answer in run.answers:
        name = urllib.parse.quote(answer.unit, safe="") + ".parquet"
        if name not in there:
            _put(folder, f"{_FOLDER}/{name}", _table(run, answer), csv=False)


def write_summary(run: Run, folder: RunFolder) -> None:
    """Write the tables across queries as ``report/across-*.csv`` and ``.parquet``."""
    found = run.across()
    for name, table in (("sequences", found.sequences), ("clusters", found.clusters)):
        _put(folder, f"report/across-{name}", table, csv=True)


def write_page(run: Run, folder: RunFolder) -> None:
    """Write ``report/index.html`` of all queries that have scores."""
    scored = set(run.best()["query"])
    names = [name for name in run.queries if name in scored]
    write_html(run, folder.files.where("report/index.html"), across=run.across(), queries=names)


def _table(run: Run, answer: Manifest) -> pd.DataFrame:
    """The best sequences of each query of a file: query, then the columns of ``Run.top``, and the unit."""
    frames = []
    for query in answer.meta["ids"]:
        try:
            frame = run.top(query, _TOP)
        except MissingStageError:  # it was given up
            continue
        renamed = frame.rename(columns={name: f"kept.{name}" for name in ("query", "unit") if name in frame})
        renamed.insert(0, "query", query.removeprefix(f"{answer.unit}/"))
        frames.append(renamed.assign(unit=run.unit))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"query": [], "sequence": []})


def _put(folder: RunFolder, key: str, table: pd.DataFrame, csv: bool) -> None:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    folder.files.put(key if key.endswith(".parquet") else f"{key}.parquet", buffer.getvalue())
    if csv:
        folder.files.put(f"{key}.csv", table.to_csv(index=False).encode())
