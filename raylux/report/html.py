"""One HTML page of a run: per query the sequences with the largest influence. Nothing beside it is needed."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from raylux.errors import MissingStageError
from raylux.report.profile import bars
from raylux.report.tables import number
from raylux.shown import redacted
from raylux.store import Files

if TYPE_CHECKING:
    from raylux.api import Run
    from raylux.report.across import Across

_TEXT_LIMIT = 2000
_EVERY = 1 << 30
# A page of more would be slow to open.
MOST_QUERIES = 200
_MOST_ROWS = 20
_FIXED = {"rank", "sequence", "influence", "prefilter", "text"}


def write_html(
    run: Run,
    path: str,
    k: int = 20,
    negative: int = 3,
    across: Across | None = None,
    queries: Sequence[str] | None = None,
) -> str:
    """Write the page and return its path.

    Args:
        run: a run whose scores are there.
        path: a local path or an fsspec URL; a page that is there is replaced as a whole.
        k: sequences per query, best first.
        negative: sequences of the strongest negative influence below them.
        across: what is said across queries; default: nothing.
        queries: whose sequences are shown; default: all, but no more than the first ``MOST_QUERIES``.

    Raises:
        UserError: it cannot be written there.
    """
    place, _, name = path.rpartition("/")
    Files(place or ".").put(name, render(run, k, negative, across, queries).encode())
    return path


def render(
    run: Run, k: int = 20, negative: int = 3, across: Across | None = None, queries: Sequence[str] | None = None
) -> str:
    """The page as text, arguments as ``write_html``. Everything that comes from model, corpus or queries is escaped."""
    template = templates().get_template("page.html.j2")
    records = run.query_records
    names = list(run.queries if queries is None else queries)
    return template.render(
        config=run.config,
        unit=run.unit,
        train_size=run.train_size,
        given_up=len(run.quarantined),
        bars=bars(run.profile()),
        queries=[_query(run, name, records.get(name, {}), k, negative) for name in names[:MOST_QUERIES]],
        more=len(names[MOST_QUERIES:]),
        across=None if across is None else _across(run, across),
        calibration=run.calibration if run.unit in ("nats", "raw") else None,
        verified=_verified(run),
    )


def templates() -> Environment:
    """The pages' templates; what is put into them is escaped."""
    environment = Environment(
        loader=PackageLoader("raylux.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    environment.filters["place"] = lambda text: visible(redacted(text))
    return environment


def visible(text: Any, limit: int = _TEXT_LIMIT) -> str:
    """The text without characters that a page cannot show or that reorder what stands beside it."""
    # Cut first: of a long text only what is shown is looked at.
    whole = str(text)
    kept = whole[:limit]
    if not (kept.isascii() and kept.isprintable()):
        kept = "".join(c if c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cs", "Cf"} else "�" for c in kept)
    return kept if len(whole) <= limit else kept + " …"


def _across(run: Run, found: Across) -> dict[str, Any]:
    """What is said across queries: the sequences of most queries with their texts, and the clusters."""
    best = found.sequences[found.sequences["queries"] > 1].head(_MOST_ROWS)
    texts = run.sequences.set_index("sequence")["text"].reindex(best["sequence"]).fillna("")
    together = found.clusters[found.clusters["size"] > 1]
    return {
        "queries": found.queries,
        "sequences": [{**row, "text": text} for row, text in zip(best.to_dict("records"), texts.tolist(), strict=True)],
        "clusters": [
            {"members": part["query"].tolist(), "alike": float(part["alike"].mean()), "shared": part["shared"].iloc[0]}
            for _, part in list(together.groupby("cluster"))[:_MOST_ROWS]
        ],
        "alone": int((found.clusters["size"] == 1).sum()),
    }


def _verified(run: Run) -> dict[str, Any] | None:
    """Measured changes beside predicted ones, the tops of a query and the random ones; None where nothing is there."""
    frame = run.verification()
    if not len(frame):
        return None
    named = ("predicted", "calibrated", "solved", "measured", "low", "high", "whole", "whole_leverage")
    own = frame[frame["chosen"] != "cross"]
    return {
        "rows": [{**row, **{name: number(row[name]) for name in named}} for row in own.to_dict("records")],
        "agreements": run.agreements(),
        "attrs": frame.attrs,
    }


# Keys of a query that are shown as what was asked, or are too long to be.
_SAID = ("id", "prompt", "completion", "text", "label", "features")


def _query(run: Run, name: str, record: dict[str, Any], k: int, negative: int) -> dict[str, Any]:
    try:
        everything = run.top(name, run.config.score.best or _EVERY)
    except MissingStageError:  # every unit of it was given up
        everything = pd.DataFrame({"influence": np.zeros(0)})
    best, rest = everything.head(k), everything.iloc[k:]
    worst = rest[rest["influence"] < 0].tail(negative)
    kept = [column for column in everything.columns if column not in _FIXED]
    largest = float(everything["influence"].abs().max()) if len(everything) else 0.0
    asked = {key: value for key, value in record.items() if key not in _SAID}
    return {
        "id": name,
        "prompt": record.get("prompt", record.get("text")),
        "completion": record.get("completion", record.get("label")),
        "asked": asked,
        "kept": kept,
        "rows": [_row(values, kept, largest) for values in best.to_dict("records")],
        "between": len(rest) - len(worst),
        "worst": [_row(values, kept, largest) for values in worst.to_dict("records")],
    }


def _row(values: dict[Any, Any], kept: list[str], largest: float) -> dict[str, Any]:
    influence = float(values["influence"])
    share = abs(influence) / largest if largest > 0 else 0.0
    return {
        "rank": values["rank"],
        "influence": number(influence),
        "negative": influence < 0,
        "bar": round(100 * share),
        "prefilter": number(float(values["prefilter"]), signed=False) if "prefilter" in values else "–",
        "sequence": values["sequence"],
        "kept": [values[column] for column in kept],
        "text": values.get("text", ""),
    }
