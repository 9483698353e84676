"""Two-stage scoring: all pairs estimated, and those scored exactly that may be among the best of their query.

Units come in waves, in an order that a hash of their names gives. The first one, the pilot, has both scores and
estimates of all its pairs: scores are fitted to estimates by it. A later wave leaves out the pairs that do not come
near their query's threshold, which is taken from all scores before it, and frozen; how near is told by all that were
found before (``evidence``). In the end each query's K-th best score is known, and where too few of the best were found
what may still be among them is scored too: thresholds on the way cost time where they were too low or too high, and no
score.

What a wave leaves out is written down before it starts, so that a run that was cut off goes on with the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raylux.config import ScoreSection
from raylux.cost.two_stage import assumed_seen, estimates_cost, pace, pilot, products, relative_cost
from raylux.curvature import Kind
from raylux.engine.bars import Bars
from raylux.engine.context import Context
from raylux.engine.estimating import Estimated
from raylux.engine.quarantine import lost_pairs
from raylux.engine.records import Contraction
from raylux.engine.stages import precision, prefilter
from raylux.engine.stages.evidence import closing, trust_of_wave
from raylux.engine.stages.fit import fitted
from raylux.engine.stages.pairs import ScoreJob, loaded_queries, missing_jobs
from raylux.engine.stages.query import answerable
from raylux.engine.stages.thresholds import Estimates, best_so_far, read_pilot
from raylux.engine.stages.units import settle
from raylux.engine.work import Job, results
from raylux.errors import UserError
from raylux.layers import TrackedLayer
from raylux.ledger import SCORE, WAVES
from raylux.store import CHOSEN, ESTIMATED, PILOT, ScoreBlock, score_blocks

# How many times what was before it a wave ends at: thresholds of few sequences let many pairs through.
_GROWTH = 2
# Jobs of a wave for each worker, at least, where they are put together.
_EACH = 2

Plain = Callable[[Context, Sequence[ScoreJob]], bool]
"""Scores jobs as ever."""


@dataclass(frozen=True)
class Rule:
    """What a wave leaves out.

    Attributes:
        bars: query -> which its pairs must reach (``Bars.named``); those that are not named want all of theirs.
        plain: nothing: all pairs are scored as ever.
    """

    bars: dict[str, list[list[float]]]
    plain: bool


def wanted(ctx: Context) -> bool:
    """Whether this run scores in two stages; what is answered apart has all its pairs."""
    return ctx.config.score.best is not None and not ctx.apart


def check(kind: Kind, score: ScoreSection, layers: Sequence[TrackedLayer]) -> None:
    """Raises UserError where scores are wanted in two stages that cannot be had so."""
    if score.best is None:
        return
    if kind.normalised or kind.projected or kind.joint:
        raise UserError(
            f"score.best: curvature.kind={kind.name} has no estimates of its scores; remove score.best, or take a "
            "kind layer by layer, as ekfac"
        )
    if score.layers:
        raise UserError("score.best: scores by layer are of all pairs; remove score.best or score.layers")
    odd = [layer.name for layer in layers if layer.words or layer.routed]
    if odd:
        raise UserError(
            f"score.best: '{odd[0]}' is a word embedding or an expert's layer, whose scores are not estimated; remove "
            "score.best, or name other layers in model.layers"
        )


def run(ctx: Context, plain: Plain) -> None:
    """Score what is missing, in waves, and then what they left out wrongly.

    Args:
        ctx: the run.
        plain: scores jobs without any estimate, for what is better off without.
    """
    while jobs := {job.name: job for job in missing_jobs(ctx, waves=True)}:
        number, waves = _round(ctx, jobs)
        for wave, names in enumerate(waves):
            left = [jobs[name] for name in names if name in jobs]
            if not left:
                continue
            rule = _rule(ctx, number, wave, left)
            if rule is not None and rule.plain:
                plain(ctx, missing_jobs(ctx))  # in units of the usual size, and not in waves
                break
            _run(ctx, left if rule is None else _merged(ctx, left), rule)
    _reach(ctx)


def missing(ctx: Context) -> bool:
    """Whether pairs that were left out have yet to be looked at."""
    return wanted(ctx) and _summary_name(ctx) not in ctx.folder.units(WAVES) and any(_estimated(ctx))


def _round(ctx: Context, jobs: dict[str, ScoreJob]) -> tuple[int, list[list[str]]]:
    """The number of a round that has some of the jobs, and the names of its waves' jobs; a new one if there is none."""
    rounds = {m.meta["number"]: m.meta["waves"] for m in ctx.folder.units(WAVES).values() if "waves" in m.meta}
    for number, waves in sorted(rounds.items()):
        if not jobs.keys().isdisjoint(name for wave in waves for name in wave):
            return number, waves
    number = len(rounds)
    waves = _waves(ctx, list(jobs.values()))
    ctx.folder.commit(WAVES, f"r{number:04d}", {}, number=number, waves=waves)
    return number, waves


def _waves(ctx: Context, jobs: Sequence[ScoreJob]) -> list[list[str]]:
    order = sorted(jobs, key=lambda job: hashlib.blake2b(job.name.encode(), digest_size=8).digest())
    rows = sum(len(job.rows) for job in order)
    assert ctx.config.score.best is not None
    first = pilot(rows, ctx.config.score.best)
    if not first:
        return [[], [job.name for job in order]]
    ends = [first, *sorted(_ends(rows, first))]
    waves: list[list[str]] = [[] for _ in ends]
    wave = done = 0
    for job in order:
        while done >= ends[wave] and wave < len(ends) - 1:
            wave += 1
        waves[wave].append(job.name)
        done += len(job.rows)
    return waves


def _ends(rows: float, first: float) -> Iterator[float]:
    """Where waves end after a pilot of ``first`` rows, the last one first."""
    while rows >= 2 * first:
        yield rows
        rows /= _GROWTH


def _merged(ctx: Context, jobs: Sequence[ScoreJob]) -> list[ScoreJob]:
    """Jobs as large as leaves some for each worker: workers read all queries for each company of sequences."""
    room = sum(len(job.rows) for job in jobs) // (_EACH * ctx.backend.workers)
    most, found = min(room, ctx.plan.score_unit_size), list[ScoreJob]()
    for job in jobs:
        last = found[-1] if found else None
        if last and last.queries == job.queries and len(last.rows) + len(job.rows) <= most:
            found[-1] = last.with_(job)
        else:
            found.append(job)
    return found


def _rule(ctx: Context, number: int, wave: int, jobs: Sequence[ScoreJob]) -> Rule | None:
    """What a wave leaves out, as it was written down, or is now; None: it is the pilot."""
    if not wave:
        return None
    name = f"r{number:04d}.{wave}"
    known = ctx.folder.units(WAVES).get(name)
    if known is None or "bars" not in known.meta:  # a run of before had margins in its place
        rule = _new_rule(ctx, {query for job in jobs for query in job.queries})
        known = ctx.folder.commit(WAVES, name, {}, **vars(rule))
    return Rule(known.meta["bars"], known.meta["plain"])


def _new_rule(ctx: Context, wanted: set[str]) -> Rule:
    ids = [query.id for query in answerable(ctx) if query.id in wanted]
    pilot = read_pilot(ctx.folder, ids)
    if pilot is None:
        return Rule({}, True)
    best, every = ctx.config.score.best, len(prefilter.union(ctx))
    assert best is not None
    found = best_so_far(ctx.folder, ids, best)
    trust = trust_of_wave(ctx.folder, ids, pilot, found, best, every, ctx.config.score.recall)
    # Thresholds become what is typical now, as waves go on.
    bars = trust.bars(found.typical(best, every))
    reach, opened = pilot.estimates.reach(bars), float(pilot.estimates.opened(bars).mean())
    layers = ctx.coverage.tracked
    shapes = [layer.shape for layer in layers]
    tokens = float(ctx.reader.lengths.mean())
    blocks = [pilot.seen.get(layer.name, assumed_seen(layer.shape, True)) for layer in layers]
    estimates, refined = estimates_cost(shapes, tokens, len(ids), blocks, opened)
    formed, share = float(reach.any(0).mean()), float(reach.mean())
    own = pace(_contraction(ctx).dtype)
    cost = relative_cost(shapes, tokens, len(ids), share, own, estimates=estimates, formed=formed, refined=refined)
    plain = cost >= 1
    if plain:
        ctx.reporter.say(
            f"score: {reach.mean():.0%} of the pairs may be among the {best} best of their query by what is estimated "
            "of them: all are scored exactly, which costs less"
        )
    return Rule(trust.bars(found.thresholds(best, every)).named(ids), plain)


def _run(
    ctx: Context, jobs: Sequence[ScoreJob], rule: Rule | None, chosen: dict[str, np.ndarray] | None = None
) -> None:
    """Score a wave; ``chosen``: of each job, the pairs [Q, n] that are, where nothing is to be estimated any more."""
    loaded = loaded_queries(ctx, {query for job in jobs for query in job.queries}, _contraction(ctx))
    bars = None if rule is None else Bars.of(loaded.ids, rule.bars)
    best = ctx.config.score.best
    assert best is not None
    sequences = float(ctx.reader.lengths.mean()), min(1.0, best / len(prefilter.union(ctx)))
    how = Estimated(fitted(ctx), ctx.config.curvature.kind, sequences, bars)
    shared = ctx.backend.share(loaded), ctx.backend.share(how)
    calls = (
        Job(job.name, (job.name, job.rows, job.queries, *shared, *([chosen[job.name]] if chosen else [])), job)
        for job in jobs
    )
    stage = CHOSEN if chosen else PILOT if rule is None else ESTIMATED
    task = "score, left out" if chosen else "score, pilot" if rule is None else "score"
    with ctx.reporter.task(task, sum(len(job.rows) for job in jobs), "sequences") as shown:
        for result in results(ctx.backend, "estimated_unit", calls):
            job: ScoreJob = result.job.item
            about = {"queries": list(job.queries), "layers": False, "two_stage": stage}
            settle(ctx, SCORE, result, job.rows, job.queries, about)
            shown.advance(len(job.rows))


def _contraction(ctx: Context) -> Contraction:
    """How both stages take products; single pairs and estimates are never rounded."""
    return Contraction(products(precision.resolve(ctx).dtype, ctx.plan.device != "cpu"))


# what was left out


@dataclass(frozen=True)
class Pairs:
    """Some of the pairs of queries and corpus rows [n]: those that are ``chosen`` [Q, n]."""

    queries: tuple[str, ...]
    rows: np.ndarray
    chosen: np.ndarray


def _reach(ctx: Context) -> None:
    """Score the pairs whose estimates may reach the K-th best of their query after all; then say what was found."""
    if not any(_estimated(ctx)):
        return
    best = ctx.config.score.best
    assert best is not None
    ids = [query.id for query in answerable(ctx)]
    last = closing(ctx.folder, ids, best, ctx.config.score.recall)
    jobs = list(_jobs(ctx, ids, last.bars))
    if jobs:
        _run(ctx, [job for job, _ in jobs], Rule({}, False), {job.name: chosen for job, chosen in jobs})
    name = _summary_name(ctx)
    if name not in ctx.folder.units(WAVES):
        share = _share(ctx, ids)
        facts = {"best": best, "queries": ids, "share": share, "among": last.among, "recall": last.recall}
        ctx.folder.commit(WAVES, name, {}, **facts)
        told = "" if last.recall is None else f"; {last.recall:.1%} of the best have their score, by what was found"
        ctx.reporter.say(f"score: {share:.1%} of the pairs scored exactly{told}")


def _share(ctx: Context, ids: Sequence[str]) -> float:
    """Of all pairs, those that are scored."""
    scored, pairs, asked = 0, 0, set(ids)
    for block in score_blocks(ctx.folder):
        own = [at for at, query in enumerate(block.queries) if query in asked]
        if own:
            total = ctx.folder.group(block.key).read("total")[own]
            scored += int((~np.isnan(total)).sum())
            pairs += 0 if block.stage == CHOSEN else total.size
    return scored / pairs


def _jobs(ctx: Context, ids: Sequence[str], bars: Bars) -> Iterator[tuple[ScoreJob, np.ndarray]]:
    """Jobs of the usual size for what was left out, of few rows in most blocks, and the pairs [Q, n] of each."""
    held: list[Pairs] = []
    for pairs in _left(ctx, ids, bars):
        if held and sum(len(own.rows) for own in [*held, pairs]) > ctx.plan.score_unit_size:
            yield _job(held)
            held = []
        held.append(pairs)
    if held:
        yield _job(held)


def _job(parts: Sequence[Pairs]) -> tuple[ScoreJob, np.ndarray]:
    queries = tuple(dict.fromkeys(query for own in parts for query in own.queries))
    rows = np.unique(np.concatenate([own.rows for own in parts]))
    place = {query: number for number, query in enumerate(queries)}
    chosen = np.zeros((len(queries), len(rows)), bool)
    for own in parts:
        where = np.ix_(np.array([place[query] for query in own.queries]), np.searchsorted(rows, own.rows))
        chosen[where] |= own.chosen
    text = f"{queries} {rows.tolist()} {chosen.tolist()}"
    return ScoreJob(f"c-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}", rows, queries), chosen


def _left(ctx: Context, ids: Sequence[str], bars: Bars) -> Iterator[Pairs]:
    """What is estimated alone and may be among the best, of each block; ``bars`` of the queries ``ids``."""
    places = {query: place for place, query in enumerate(ids)}
    done = _scored_apart(ctx)
    for block in _estimated(ctx):
        group = ctx.folder.group(block.key)
        own = [place for place, query in enumerate(block.queries) if query in places]
        reach = Estimates.read(group, own).reach(bars.of_some([places[block.queries[place]] for place in own]))
        reach &= np.isnan(group.read("total")[own])
        for place, known in enumerate(done.get(block.queries[at]) for at in own):
            if known is not None:
                reach[place] &= ~np.isin(block.rows, known)
        rows = reach.any(0)
        if rows.any():
            queries = tuple(block.queries[own[place]] for place in np.flatnonzero(reach.any(1)))
            yield Pairs(queries, block.rows[rows], reach[reach.any(1)][:, rows])


def _estimated(ctx: Context) -> Iterator[ScoreBlock]:
    ids = {query.id for query in answerable(ctx)}
    return (x for x in score_blocks(ctx.folder) if x.stage == ESTIMATED and not ids.isdisjoint(x.queries))


def _scored_apart(ctx: Context) -> dict[str, np.ndarray]:
    """Query -> rows that were scored after all, or were given up."""
    found: dict[str, list[np.ndarray]] = {}
    for block in score_blocks(ctx.folder):
        if block.stage in (CHOSEN, "", PILOT):
            total = ctx.folder.group(block.key).read("total") if block.stage == CHOSEN else None
            for place, query in enumerate(block.queries):
                known = block.rows if total is None else block.rows[~np.isnan(total[place])]
                found.setdefault(query, []).append(known)
    for lost in lost_pairs(ctx.folder, SCORE):
        for query in lost.queries:
            found.setdefault(query, []).append(np.array(lost.rows, np.int64))
    return {query: np.concatenate(rows) for query, rows in found.items()}


def _summary_name(ctx: Context) -> str:
    text = f"{sorted(query.id for query in answerable(ctx))} {len(prefilter.union(ctx))}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f"found-{ctx.config.score.best}-{ctx.config.score.recall}-{digest}"
