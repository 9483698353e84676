"""docs/results/two-stage.md and its plot, from the figures of the cases that were run."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.plots import pyplot

_RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"
FIGURES = _RESULTS / "two-stage.json"
PAGE = _RESULTS / "two-stage.md"
PLOT = _RESULTS / "two-stage.png"

_COLUMNS = (
    "pivots | k of a layer | error | fixed number | by error | dropped on the way | forming | balance, sketch "
    "| pivots' products | sketches' products | rescoring | **all**"
).split(" | ")


def write(figures: Mapping[str, dict[str, Any]]) -> None:
    """Figures, page and plot."""
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    _plot(figures)
    PAGE.write_text(text(figures), encoding="utf-8")


def text(figures: Mapping[str, dict[str, Any]]) -> str:
    """The page."""
    sections = "\n".join(_section(case) for case in figures.values())
    commands = "\n".join(f"    {case['command']}" for case in figures.values())
    return f"""# Two-stage scoring: what a cheap first pass saves, and why no run has one

{commands}

Wanted: 1,000 queries against at least 4,096 candidates, each query's best 100 found with a recall of 0.99, all of them
exactly scored, for 15 % of the exact contraction. **Missed**: {_reached(figures)}.
With a first pass that cost nothing and never erred, forming what must be rescored would take {_least(figures)} on A,
and rescoring the best 100 another {_fewest(figures)}. With more queries the share falls: {_more(figures)}.

![What it costs](two-stage.png)

{_TEXT}
{sections}
{_time(figures)}
{_NEXT}"""


_TEXT = """## How

A score is ⟨V, G⟩, the preconditioned query against the sequence's gradient G = Σ g aᵀ, layer by layer.

1. **Balance.** The 16 largest eigendirections of A and of S are scaled up in the queries and down in the tokens,
   which leaves scores as they are and makes ‖V‖ ‖G‖ small against them: the error of a sketch is that product over
   √k. Without it a sketch of the same error has 25 to 200 times the size (layers of A, by mean squares). For queries
   this is free (an elementwise factor in the eigenbasis); tokens cost 2·T·16·(P + M) multiplications.
2. **Sketch.** G's entries go with random signs into k buckets: P·M additions, whatever k is. The products with the
   queries' sketches cost Q·k instead of Q·P·M. k is larger in layers that err more; the mean is in the table.
3. **Rescore.** The sketches' own norms say how far a score may be off, pair by pair: ‖V‖ ‖G‖ / √k. A pair is rescored
   if it is within so many of its standard errors of its query's threshold (*by error*), which takes fewer pairs than
   the same number for every query (*fixed number*). Better still, rescore the layer that errs most first, put its
   exact scores in place of its estimates, and drop the pairs that have fallen too far behind (*dropped on the way*).
4. **Pivots** (one row): 16 combinations of the queries of each layer whose scores are computed exactly and taken out
   of what is sketched. They lower the error too little to pay for themselves.

Costs are multiplications, in percent of the exact contraction Σ (T + Q)·P·M; forward, backward and the query stage
are the same either way and not counted. Each gradient is formed once, which takes thresholds that are known from the
first units (those of all candidates were used here); forming twice costs its column once more. *Error*: of the first
pass, over the spread of a query's scores, median. The three shares are of all pairs, each the least that has the
recall, found by looking at the exact scores: a run would have to set the number of standard errors beforehand.
"""

_NEXT = """## Why it is not in the engine, and what would change that

- **On A at 1,000 queries and 4,096 candidates forming is the floor.** It is T/(T + Q) of the exact contraction, and
  nearly every sequence is among somebody's best. The saving grows with Q, and with N at a fixed number of best ones.
- **Real text has no small sketch.** On A, whose language is a small grammar, E‖V‖² E‖G‖² is 7 to 210 squared spreads
  a layer once balanced; on the demo 450 to 1,400 (three of its layers), 330 to 920 with every entry balanced, and a
  layer has 43,008 entries: an error of 0.3 spreads would take sketches larger than the gradients (it falls with √k).
  Nor would truncation do: 90 % of what the eigenbasis' coordinates hold one by one takes 82 to 84 % of them (two
  layers). The scores themselves are far from low rank (above). Candidates that the model was not trained on, most of
  those here, have gradients with 7 to 11 times the mean square of the fitted ones (whose labels are the model's own).
- **Multiplications are not seconds.** The gathered products of rescoring are bound by memory: see above. Two stages
  then take longer than one until the share of rescored pairs is well below the inverse of that factor.
- **Next**: rescore in blocks that are dense (queries clustered by their sketches, the union of their candidates as
  one matrix product), or a fused kernel that keeps a slice of all queries in cache; thresholds by stream with the
  number of standard errors set from the pairs already rescored; a first pass on Kronecker sketches of the tokens, so
  that what is never rescored is never formed (where N is so large that many sequences are nobody's best).
- **Tried and worse**: truncation to leading coordinates (an earlier attempt: 52 % for the same recall); count sketches
  in the standard basis, balanced entry by entry alone (an error of 1.5 spreads at k = 16,384, first three layers of A);
  16 to 64 pivots with those (0.8 spreads at best); 64 balanced directions instead of 16 on the wide side of A's c_fc
  (errors fall by 10 to 20 %, balancing costs three times as much).
"""


def _section(case: Mapping[str, Any]) -> str:
    rows = [
        [
            str(row["pivots"]),
            f"{row['size']:,}",
            f"{row['error']:.2f}",
            *(f"{row[name]:.1%}" for name in ("fixed", "adaptive", "eliminated")),
            f"{row['cost']['form']:.1%}",
            f"{row['cost']['balance'] + row['cost']['sketch']:.1%}",
            *(f"{row['cost'][name]:.1%}" for name in ("pivots", "dots", "rescore")),
            f"**{_total(row):.1%}**",
        ]
        for row in case["rows"]
    ]
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *rows]
    kept = ", ".join(f"{value:.0%} at r = {float(share):.0%} of Q" for share, value in case["energies"].items())
    told = (
        f"{case['sequences']:,} candidates of {case['tokens']:.0f} tokens; recall on {case['queries']:,} queries, "
        f"cost at 1,000. Curvature of {case['fitted']} sequences; {case['layers']} layers with {case['entries']:,} "
        f"entries. To rescore 99 % of all best pairs, {case['covering']:.0%} of the candidates must be formed. The "
        f"best r combinations of the queries, exactly scored, keep of the scores' variance: {kept}."
        f"{case.get('note', '')}"
    )
    return f"""## {_title(case)}

{textwrap.fill(" ".join(told.split()), 118)}

{_table(lines)}

{_elsewhere(case)}
"""


def _elsewhere(case: Mapping[str, Any]) -> str:
    """The cheapest setting at other numbers of queries and candidates."""
    names = list(case["rows"][0]["elsewhere"])
    best = {name: min(case["rows"], key=lambda row, name=name: row["elsewhere"][name]) for name in names}
    lines = [["queries", "candidates", "k", "pivots", "all"], ["---"] * 5]
    for name, row in best.items():
        queries, count = map(int, name.split())
        told = f"{count:,}" + ("" if count == case["sequences"] else " (computed)")
        lines.append([f"{queries:,}", told, f"{row['size']:,}", str(row["pivots"]), f"{row['elsewhere'][name]:.1%}"])
    return f"""The cheapest setting for other sizes. Other numbers of queries change costs alone; ten times the
candidates are computed from each query's best 10 of those measured, as the best 100 of ten times as many.

{_table(lines)}"""


def _time(figures: Mapping[str, dict[str, Any]]) -> str:
    told = next(iter(figures.values()))["gathered"]
    lines = [
        ["pairs rescored", "time per pair, of a pair in a matrix product", "rescoring takes, of all pairs' product"]
    ]
    lines += [["---"] * 3]
    lines += [[f"{float(x):.1%}", f"{y:.0f} ×", f"{float(x) * y:.0%}"] for x, y in told.items()]
    return f"""## Time

Gathered products in torch, float32, one thread of a Xeon with AVX-512 that other processes shared (processor time),
65,536 entries, the fastest of three slicings:

{_table(lines)}
"""


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _title(case: Mapping[str, Any]) -> str:
    return {"A": "Workload A: GPT-2, 4 layers, d = 256", "demo": "The demo's model: Llama, 4 layers, d = 128"}.get(
        case["case"], case["case"]
    )


def _total(row: Mapping[str, Any]) -> float:
    return float(sum(row["cost"].values()))


def _reached(figures: Mapping[str, dict[str, Any]]) -> str:
    return ", ".join(f"{min(map(_total, case['rows'])):.1%} on {name}" for name, case in figures.items())


def _least(figures: Mapping[str, dict[str, Any]]) -> str:
    case = figures.get("A") or next(iter(figures.values()))
    return f"{case['rows'][0]['cost']['form'] * case['covering']:.1%}"


def _more(figures: Mapping[str, dict[str, Any]]) -> str:
    """The cheapest share at numbers of queries other than 1,000, on the first case."""
    name, case = next(iter(figures.items()))
    told = []
    for key in case["rows"][0]["elsewhere"]:
        queries, count = map(int, key.split())
        if count == case["sequences"] and queries != 1000:
            told.append(f"{min(row['elsewhere'][key] for row in case['rows']):.1%} at {queries:,}")
    return f"{', '.join(told)} on {name}"


def _fewest(figures: Mapping[str, dict[str, Any]]) -> str:
    """Rescoring a perfect first pass's pairs: 100 / N of Q / (T + Q)."""
    case = figures.get("A") or next(iter(figures.values()))
    return f"{100 / case['sequences'] * (1 - case['rows'][0]['cost']['form']):.1%}"


def _plot(figures: Mapping[str, dict[str, Any]]) -> None:
    """Cost against the size of the sketch, stacked by what it goes to, a panel for each case."""
    plt = pyplot()

    figure, axes = plt.subplots(1, len(figures), figsize=(5 * len(figures), 3.6), sharey=True, squeeze=False)
    for axis, (name, case) in zip(axes[0], figures.items(), strict=True):
        rows = [row for row in case["rows"] if not row["pivots"]]
        base = [0.0] * len(rows)
        for part in ("form", "balance", "sketch", "dots", "rescore"):
            heights = [100 * row["cost"][part] for row in rows]
            axis.bar([f"{row['size']:,}" for row in rows], heights, bottom=base, label=part)
            base = [x + y for x, y in zip(base, heights, strict=True)]
        axis.axhline(15, color="black", linewidth=0.8, linestyle="--")
        axis.set(title=f"{name}: recall@100 = 0.99", xlabel="k, mean of a layer")
    axes[0][0].set_ylabel("% of the exact contraction")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)
    plt.close(figure)
