"""docs/results/benchmark.md and its plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.bench.figures import CPU, JOB, WALL, Spread, cost, job, peak, seconds, stage
from jobs.bench.found import Found
from jobs.bench.points import GB, Row, rows
from jobs.bench.records import KRONFLUENCE, RAYLUX, Measured
from jobs.bench.rounds import FLOAT32
from jobs.plots import pyplot

"""The heading from which on a page is written by hand."""

CLOCKS = {"A": CPU, "B": WALL, "C": WALL, "S": CPU}
WHAT = {
    "A": "GPT-2, 4 layers, d = 256, 5,000 tokens; 128 sequences of 128 tokens, fitted and scored",
    "B": "GPT-2, 6 layers, d = 512, 8,000 tokens; 32 sequences of 256 tokens, fitted and scored",
    "S": "A's model; 64 sequences of 256 tokens",
    "C": "SmolLM2-135M on the first 64 Wikipedia leads of `configs/smollm2-wiki.yaml`, 8 queries",
    "tiny": "GPT-2, 2 layers, d = 64, 100 tokens; 12 sequences of 24 tokens",
}


def table(header: str, lines: Sequence[Sequence[str]]) -> str:
    """Markdown; ``header`` has its cells parted by `` | ``."""
    names = header.split(" | ")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [names, ["---"] * len(names), *lines])


def points(found: Found) -> str:
    """Floor, aim, measured, verdict."""
    lines = []
    for row in rows(found):
        floor = f"{row.floor:g}" + (f" ({row.floor32:g} in float32)" if row.floor32 is not None else "")
        cells = [row.title, f"{'≥' if row.least else '≤'} {floor}", "" if row.aim is None else f"{row.aim:g}"]
        cells += [_text(row, name) for name in (RAYLUX, FLOAT32, KRONFLUENCE)]
        lines.append([*cells, _verdict(row)])
    return table("point | floor | aim | raylux | raylux float32 | kronfluence | verdict", lines)


def _text(row: Row, variant: str) -> str:
    return row.values[variant].text(row.digits) if variant in row.values else ""


def _verdict(row: Row) -> str:
    ours, exact = row.verdict(RAYLUX), row.verdict(FLOAT32)
    if not ours and not exact:
        return "not measured"
    return f"{ours}; float32: {exact}" if ours and exact else ours or f"float32: {exact}"


def stages(found: Found, workload: str) -> str:
    """A line per variant and number of queries: every stage in F, and the whole."""
    lines = []
    for variant in found.variants("speed", workload):
        runs = found.of("speed", workload, variant)
        for size in runs[0].spec.sizes:
            for clock in (CPU, WALL):
                each = [_spread(runs, name, size, clock) for name in JOB]
                whole = Spread.of(job(run, size, clock) for run in runs)
                assert whole is not None
                lines.append(
                    [
                        variant,
                        str(size),
                        clock,
                        *each,
                        f"**{whole.text()}**",
                        _against(found, workload, variant, size, clock),
                    ]
                )
    names = "covariance | eigenbases | Λ | query | score | rest | whole job | of kronfluence's"
    return table(f"program | Q | clock | {names}", lines)


def _spread(runs: Sequence[Measured], name: str, queries: int, clock: str) -> str:
    if not any(x.name == name for run in runs for x in run.stages):
        return "in score" if name == "query" else ""
    spread = Spread.of(stage(run, name, queries, clock) for run in runs)
    return "" if spread is None else spread.text()


def _against(found: Found, workload: str, variant: str, size: int, clock: str) -> str:
    """Ratios to kronfluence's job of the same round."""
    theirs = found.of("speed", workload, KRONFLUENCE)
    if variant == KRONFLUENCE or not theirs:
        return ""
    pairs = zip(found.of("speed", workload, variant), theirs, strict=False)
    spread = Spread.of(job(ours, size, clock) / job(peer, size, clock) for ours, peer in pairs)
    return "" if spread is None else spread.text()


def costs(found: Found) -> str:
    """Fixed cost and cost of one more query; memory; seconds of F."""
    lines = []
    for workload in found.workloads("speed"):
        clock = CLOCKS.get(workload, CPU)
        for variant in found.variants("speed", workload):
            runs = found.of("speed", workload, variant)
            fitted = [pair for pair in (cost(run, clock) for run in runs) if pair is not None]
            fixed, more = (Spread.of(pair[place] for pair in fitted) for place in (0, 1))
            most = max(runs[0].spec.sizes)
            held = [Spread.of(peak(run, most, kind) / GB for run in runs) for kind in ("uss", "rss")]
            lines.append(
                [workload, variant, clock, fixed.text() if fixed else "", more.text(3) if more else "", str(most)]
                + [spread.text() if spread and spread.median else "" for spread in held]
            )
    return table(
        "workload | program | clock | fixed, F | one more query, F | Q | peak private memory, GB | peak resident, GB",
        lines,
    )


def calls(found: Found) -> str:
    """What a whole command of raylux takes beside its stages."""
    lines = []
    for workload in found.workloads("speed"):
        for variant in found.variants("speed", workload):
            if variant == KRONFLUENCE:
                continue
            runs = found.of("speed", workload, variant)
            size = runs[0].spec.sizes[0]
            spreads = []
            for part in (_call, _load, _beside):
                spreads.append(Spread.of(part(run, size) for run in runs))
            lines.append([workload, variant, str(size), *[spread.text() if spread else "" for spread in spreads]])
    return table(
        "workload | program | Q | whole command, s | of it loading the model, s | of it beside the stages, s", lines
    )


def _call(run: Measured, size: int) -> float:
    return seconds(run, ("call",), size, WALL)


def _load(run: Measured, size: int) -> float:
    return seconds(run, ("load",), size, WALL)


def _beside(run: Measured, size: int) -> float:
    return _call(run, size) - _load(run, size) - seconds(run, JOB, size, WALL)


def agreement(found: Found) -> str:
    """How scores agree."""
    lines = []
    for x in found.compared:
        numbers = f"{x.agreement.pearson:.7f}", f"{x.agreement.error:.1e}", f"{x.agreement.top:.3f}"
        lines.append([x.workload, str(x.queries), x.found, x.exact, x.labels, *numbers])
    return table(
        "workload | Q | scores of | against | labels of the fit | Pearson | max abs. difference / RMS | top-10 overlap",
        lines,
    )


def bares(found: Found) -> str:
    """Seconds of F, by workload."""
    lines = []
    for workload in found.workloads("speed"):
        runs = [run for variant in found.variants("speed", workload) for run in found.of("speed", workload, variant)]
        cpu, wall = (
            Spread.of(x for run in runs for x in run.bare_cpu),
            Spread.of(x for run in runs for x in run.bare_wall),
        )
        if cpu and wall:
            threads = sorted({run.spec.threads for run in runs})
            lines.append([workload, WHAT.get(workload, ""), ", ".join(map(str, threads)), cpu.text(), wall.text()])
    return table("workload | what | threads | F, CPU seconds | F, wall seconds", lines)


def choices(found: Found) -> str:
    """The frozen plan of each variant of raylux."""
    lines = []
    for workload in found.workloads("speed"):
        for variant in found.variants("speed", workload):
            plan = found.of("speed", workload, variant)[0].choices
            if plan:
                lines.append([workload, variant, ", ".join(f"{key} {_short(value)}" for key, value in plan.items())])
    return table("workload | program | its plan", lines)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def page(found: Found) -> str:
    """The whole page."""
    speed = found.workloads("speed")
    parts = [
        f"""# raylux beside kronfluence, and both in bare passes

    {found.command}

F is one bare forward and backward pass, weight gradients included, over the workload's sequences in the same process:
the median of some passes before and some after. raylux (in process, by its own commands) and kronfluence 1.0.1 take
turns, a process for each measurement; figures are medians over the rounds, in brackets the least and the greatest.
**raylux** is raylux as it is by default, **raylux float32** the same with every product in float32.

![Stages in F](benchmark.png)

## The points

{points(found)}
"""
    ]
    for workload in speed:
        parts.append(
            f"## Workload {workload}, by stage, in F\n\n{WHAT.get(workload, '')}.\n\n{stages(found, workload)}\n"
        )
    parts.append(f"## Fixed cost, one more query, memory\n\n{costs(found)}\n")
    if found.compared:
        parts.append(f"## Do the numbers agree?\n\n{agreement(found)}\n")
    parts.append(f"""## Whole commands

{calls(found)}

Beside the stages: reading config, model structure, corpus and queries, hashing them, writing the run folder's settings.
""")
    parts.append(f"""## How it was measured

{bares(found)}

{choices(found)}

- Machine: {found.machine}.
- A query is a whole sequence of the workload's length, its measurement the sequence's log-probability (kronfluence: its
  loss). Every sequence is fitted and scored. Preconditioned queries are dense in both programs.
- Both fit on sampled labels; where scores are compared with kronfluence's, on those of the data set, as the two draw
  differently. λ is a tenth of the mean eigenvalue of each layer in both.
- kronfluence computes in float32, eigendecompositions in float64. It takes the workload's batch of sequences together;
  queries in batches of that size, all of them held before it goes through the sequences once. raylux takes its own
  choices. Loading the model is counted in neither; it stands under *whole commands*.
- kronfluence has no stage of its own for queries: it is in its score. raylux runs one command for each number of
  queries, so that each may share passes between fit and scores; kronfluence fits once for all. *Rest*: what raylux does
  in and between its stages beside their work (choosing the precision of products, the ledger).
- CPU seconds are those of all threads of the process. Memory is sampled from outside, resident every 0.1 s, private
  every 0.5 s and where resident grows; a process has torch,
  transformers, raylux and what the bare passes left in it.
- Fixed cost and one more query: a line through the whole jobs by least squares.
""")
    return "\n".join(parts)


def plot(found: Found, path: Path) -> None:
    """Bars of a whole job, stacked by stage, in F; floors as lines.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    groups = [
        (workload, size)
        for workload in found.workloads("speed")
        if workload in ("A", "B", "C", "tiny")
        for size in found.of("speed", workload, found.variants("speed", workload)[0])[0].spec.sizes
    ]
    floors = {("A", 8): 2.5, ("B", 32): 5.0, ("A", 256): 6.0}
    colours = dict(zip(JOB, ("#3b6ea5", "#8fb3d9", "#6aa56a", "#e0b050", "#c0653a", "#999999"), strict=True))
    figure, axes = plt.subplots(figsize=(1.5 + 2.5 * max(2, len(groups)), 4.6), layout="constrained")
    ticks, labels = [], []
    for place, (workload, size) in enumerate(groups):
        variants = found.variants("speed", workload)
        for index, variant in enumerate(variants):
            x = place * 4.0 + index
            _bar(axes, x, found.of("speed", workload, variant), size, CLOCKS.get(workload, CPU), colours)
            ticks.append(x)
            labels.append(variant.replace(" ", "\n"))
        axes.text(place * 4.0 + (len(variants) - 1) / 2, -0.2, f"{workload}, Q = {size}\n({CLOCKS.get(workload, CPU)})",
                  ha="center", va="top", transform=axes.get_xaxis_transform())  # fmt: skip
        if (workload, size) in floors:
            ours = sum(name != KRONFLUENCE for name in variants)
            axes.hlines(floors[workload, size], place * 4.0 - 0.5, place * 4.0 + ours - 0.5, "black", "dashed")
    axes.set_xticks(ticks, labels, fontsize=8)
    axes.set_ylabel("F (bare forward + backward passes)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    names = [*colours, "floor with bf16 products"]
    lines = [*handles, plt.Line2D([], [], color="black", linestyle="dashed")]
    # Beside the bars: they may fill the whole height.
    figure.legend(lines, names, loc="outside right upper", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bar(axes: Any, x: float, runs: Sequence[Measured], size: int, clock: str, colours: dict[str, str]) -> None:
    base = 0.0
    for name, colour in colours.items():
        spread = Spread.of(stage(run, name, size, clock) for run in runs)
        height = spread.median if spread else 0.0
        axes.bar(x, height, 0.8, bottom=base, color=colour)
        base += height
    whole = Spread.of(job(run, size, clock) for run in runs)  # not the sum of its stages' medians
    axes.text(x, base, f"{whole.median:.2f}" if whole else "", ha="center", va="bottom", fontsize=8)
