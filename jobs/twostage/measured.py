"""One case scored both ways: all pairs, and the best of each query in two stages; what was found, and what it took."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.twostage.cases import Case
from raylux import api
from raylux.config import Config
from raylux.cost.two_stage import COUNTED, Pace, Seen, estimates_cost, pace, relative_cost
from raylux.engine.bars import FINE, Bars
from raylux.engine.stages.thresholds import Estimates, read_pilot
from raylux.ledger import CONTRACTION, WAVES
from raylux.results import Run
from raylux.store import ESTIMATED, PILOT, CorpusReader

# What is done whichever way pairs are scored. Laying out queries is not told apart from what else is done: that counts.
_MODEL = frozenset({"forward", "backward", "load", "write", "label"})
# Of the best, what the study asks for.
WANTED = 0.99
# Standard errors of the curve, as large as they turned out to be.
MARGINS = (0.0, 0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0)
_USUAL = (
    "prefilter.kind=none", "query.max_error=0", "score.token_top=0", "engine.backend=local", "engine.threads=1",
    "engine.keep_captured=never",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Of the curve: recall and cost where estimates are allowed ``margin`` standard errors.

    Attributes:
        margin: see above; as the run's pilot found them.
        recall: share of the best pairs that would be scored.
        share: of all pairs, that would be.
        formed: of all sequences, with such a pair.
        cost: multiplications, of those of all pairs' contraction.
        time: the same by the ``pace`` of the run's products.
    """

    margin: float
    recall: float
    share: float
    formed: float
    cost: float
    time: float


def measure(case: Case, folder: Path, fitted: int, best: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run both, in a folder that is gone on with.

    Args:
        case: what is scored.
        folder: of its files and runs.
        fitted: sequences of the fit.
        best: K.
        overrides: of the config of every run.

    Returns:
        Sizes, seconds of CPU by kind of work, shares and recall, the curve.
    """
    sections = case.write(folder)

    def config(name: str, *more: str) -> Config:
        named = {**sections, "run": {"folder": str(folder / name)}, "fit": {"sequences": fitted}}
        return Config.parse(named, [*_USUAL, *overrides, *more])

    two, every = folder / "two", folder / "every"
    if not every.exists():
        api.run_stages(config("two"), ("corpus", "fit", "query"))
        # Objects of a run are never written to again; its log is.
        subprocess.run(["cp", "-al", two, every], check=True)
        log = every / "progress.jsonl"
        log.write_bytes(_unlinked(log))
    runs = api.run_stages(config("every"), ("score",)), api.run_stages(config("two", f"score.best={best}"), ("score",))
    exact, found = (run.scores().sel(query=runs[0].queries).to_numpy().astype(np.float64) for run in runs)
    kth = -np.sort(-exact, 1)[:, best - 1 : best]
    there, among = ~np.isnan(found), exact >= kth
    off = np.abs(np.where(there, found - exact, 0.0)).max() / np.sqrt(np.mean(exact**2))
    tokens = float(CorpusReader(runs[1].store).lengths[runs[1].rows].mean())
    return {
        "queries": len(exact),
        "sequences": exact.shape[1],
        "tokens": tokens,
        "fitted": fitted,
        "best": best,
        "layers": len(_shapes(runs[1])),
        "entries": sum(outputs * inputs for outputs, inputs in _shapes(runs[1]).values()),
        "seen": {name: (own.rows, own.columns, own.first) for name, own in _seen(runs[1]).items()},
        "share": float(there.mean()),
        "recall": float(there[among].mean()),
        "least": float(min(x[y].mean() for x, y in zip(there, among, strict=True))),
        "promised": _promised(runs[1]),
        "off": float(off),
        "plain": all(block.stage != ESTIMATED for block in runs[1].blocks),
        "seconds": {name: _seconds(run) for name, run in zip(("every", "two"), runs, strict=True)},
        "cost": _of_run(runs[1], there, tokens),
        "opened": _opened(*_estimates(runs[1])[::2]),
        "curve": [vars(point) for point in _curve(runs[1], exact, kth, tokens)],
    }


def _unlinked(path: Path) -> bytes:
    """The bytes of a file, which goes: what is written in its place is another file."""
    data = path.read_bytes()
    path.unlink()
    return data


def _curve(run: Run, exact: np.ndarray, kth: np.ndarray, tokens: float) -> list[Point]:
    """By the estimates that the run has: those of all pairs, or where it gave up, of its pilot.

    What came first opened as many pairs as it did in the run, whichever margin is allowed afterwards.
    """
    estimate, error, refined = _estimates(run)
    there, scale = ~np.isnan(estimate), run.scale
    estimate, error = estimate * scale, error * scale
    opened = _opened(estimate, refined)
    points = []
    for margin in sorted({*MARGINS, _least(estimate, error, refined, exact, kth)}):
        with np.errstate(invalid="ignore"):
            chosen = refined & (estimate + margin * error >= kth)
        among = there & (exact >= kth)
        recall, share = float(chosen[among].mean()), float(chosen[there].mean())
        formed = float((chosen & there).any(0)[there.any(0)].mean())
        costs = (
            _cost(run, tokens, len(exact), share, formed, opened, each) for each in (COUNTED, pace(_products(run)))
        )
        points.append(Point(margin, recall, share, formed, *costs))
    return points


def _least(estimate: np.ndarray, error: np.ndarray, refined: np.ndarray, exact: np.ndarray, kth: np.ndarray) -> float:
    """The margin that finds ``WANTED`` of the best; none of the curve's own where that cannot be had."""
    with np.errstate(divide="ignore", invalid="ignore"):
        needed = np.where(refined, (kth - estimate) / error, np.inf)[~np.isnan(estimate) & (exact >= kth)]
    found = float(np.sort(needed)[math.ceil(WANTED * len(needed)) - 1])
    return max(found, 0.0) if math.isfinite(found) else MARGINS[0]


def _estimates(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What scores are taken to be [Q, N], NaN where there is none; their errors; which are by all that is seen.

    Of the pilot both steps are known: what comes first decides here, as it did in the last wave.
    """
    pilot = read_pilot(run.store, run.queries)
    assert pilot is not None, "all queries are in it"
    shape, fit = (len(run.queries), run.scores().shape[1]), pilot.fits[FINE]
    values, sizes, refined = np.full(shape, np.nan), np.full(shape[1], np.nan), np.zeros(shape, bool)
    places, named = {query: place for place, query in enumerate(run.queries)}, _last_bars(run)
    for block in run.blocks:
        if block.stage in (PILOT, ESTIMATED):
            own = [places[query] for query in block.queries]
            held = Estimates.read(run.store.group(block.key), range(len(own)))
            where, bars = np.ix_(own, block.rows), Bars.of(block.queries, named)
            values[where], sizes[block.rows] = held.values, held.sizes
            refined[where] = held.refined if held.first is None else held.opened(bars)
    return fit.scores(values), fit.errors[:, None] * sizes, refined


def _last_bars(run: Run) -> dict[str, list[list[float]]]:
    """Of the last wave; nothing where there was none, which all reach."""
    rules = {name: x.meta["bars"] for name, x in run.store.units(WAVES).items() if "bars" in x.meta}
    return rules[max(rules)] if rules else {}


def _opened(estimate: np.ndarray, refined: np.ndarray) -> float:
    """Share of the pairs with an estimate that what comes first leaves open."""
    return float(refined[~np.isnan(estimate)].mean())


def _looked_at(run: Run) -> float:
    """Share of the pairs with an estimate that were looked at closely, all of the pilot among them."""
    blocks = [block for block in run.blocks if block.stage in (PILOT, ESTIMATED)]
    held = [Estimates.read(run.store.group(block.key), range(len(block.queries))).refined for block in blocks]
    return float(np.concatenate([own.reshape(-1) for own in held]).mean())


def _of_run(run: Run, there: np.ndarray, tokens: float) -> float:
    """Multiplications of the run, its pilot among them; those of a run that gave two stages up are of no meaning."""
    formed = float(there.any(0).mean())
    return _cost(run, tokens, len(there), float(there.mean()), formed, _looked_at(run), COUNTED)


def _cost(run: Run, tokens: float, queries: int, share: float, formed: float, opened: float, own: Pace) -> float:
    shapes, seen = _shapes(run), _seen(run)
    layers = list(shapes.values())
    estimates, refined = estimates_cost(layers, tokens, queries, [seen[name] for name in shapes], opened)
    return relative_cost(layers, tokens, queries, share, own, estimates=estimates, refined=refined, formed=formed)


def _products(run: Run) -> str:
    """The precision of products of all pairs."""
    known = run.store.units(CONTRACTION).get("products")
    return str(known.meta["dtype"] if known else run.settings["plan"]["contraction"])


def _shapes(run: Run) -> dict[str, tuple[int, int]]:
    """(P, M) of each layer, by the Λ of the run."""
    return {
        name: run.store.group(x.meta["key"]).shape("matrix")  # type: ignore[misc]
        for name, x in run.store.units("fit.moments").items()
    }


def _seen(run: Run) -> dict[str, Seen]:
    """What estimates see of each layer."""
    block = next(block for block in run.blocks if block.stage == PILOT)
    return {name: Seen.of(numbers) for name, numbers in run.store.group(block.key).attrs["seen"].items()}


def _promised(run: Run) -> float | None:
    """The recall that the run itself told."""
    told = [x.meta for x in run.store.units("score.waves").values() if "recall" in x.meta]
    return told[-1]["recall"] if told else None


def _seconds(run: Run) -> dict[str, float]:
    """Seconds of CPU of the scores by kind of work; ``contraction``: all but the model's own, loading and writing."""
    found: dict[str, float] = {}
    for stage in run.profile():
        if stage.stage.startswith("score"):
            for kind, (_, cpu) in stage.work.kinds.items():
                found[kind] = found.get(kind, 0.0) + cpu
    return {**found, "contraction": sum(x for kind, x in found.items() if kind not in _MODEL)}
