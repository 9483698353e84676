"""Tables of a query's scored sequences: by document, and the best first."""

from __future__ import annotations

import numpy as np
import pandas as pd


def by_document(table: pd.DataFrame) -> pd.DataFrame:
    """A table of sequences with those of a document summed, in the order in which the documents come first."""
    if "document" not in table:
        return table.rename(columns={"sequence": "document"})
    rest = {name: "first" for name in table.columns if name not in ("document", "sequence", "influence", "prefilter")}
    grouped = table.groupby("document", sort=False).agg({"influence": "sum", "prefilter": "max", **rest})
    return grouped.reset_index()


def best(table: pd.DataFrame, k: int, by: str = "influence") -> pd.DataFrame:
    """The k rows with the largest influence (or what else is named), ranked; of equals the first in the table."""
    found = table.sort_values(by, ascending=False, kind="stable").head(k)
    found.insert(0, "rank", np.arange(1, len(found) + 1))
    return found.reset_index(drop=True)
