"""The benchmark's arithmetic on known figures, its workloads, and one measurement from process to page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs import benchmark
from jobs.bench import figures, page, rounds
from jobs.bench.figures import CPU, WALL, Agreement, Spread
from jobs.bench.found import Found, compare
from jobs.bench.points import rows
from jobs.bench.records import KRONFLUENCE, RAYLUX, Measured, Spec, Stage
from jobs.bench.rounds import FLOAT32, Choice, Request
from jobs.bench.workloads import WORKLOADS, Workload
from raylux.errors import UserError

TINY = WORKLOADS["tiny"]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLUX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def measured(workload: str, sizes: tuple[int, ...], fixed: float, more: float, program: str = RAYLUX) -> Measured:
    """A whole job of ``fixed`` + ``more`` × Q F by the clock, and of twice that in CPU seconds; F is 2 s."""
    stages = [Stage(name, None, fixed / 3 * 2.0, fixed / 3 * 4.0, 0.0, 10, 20) for name in figures.FIT]
    stages += [Stage("score", size, more * size * 2.0, more * size * 4.0, 1.0, 10, 30 * size) for size in sizes]
    # The passes before and after; one was disturbed.
    return Measured(Spec(program, workload, sizes), stages, [2.0, 9.0, 2.0], [2.0, 2.0, 5.0])


def found(*taken: tuple[str, int, Measured]) -> Found:
    runs = [(Request("speed", variant, turn, run.spec), run) for variant, turn, run in taken]
    return Found("python jobs/benchmark.py", "a machine", runs, [])


# arithmetic


def test_times_are_in_bare_passes_of_the_same_process_by_either_clock() -> None:
    run = measured("B", (8, 32), fixed=3.0, more=0.05)
    assert figures.bare(run, WALL) == figures.bare(run, CPU) == 2.0
    assert figures.job(run, 8, WALL) == pytest.approx(3.4)
    assert figures.job(run, 32, CPU) == pytest.approx(9.2)
    assert figures.stage(run, "score", 32, WALL) == pytest.approx(1.6)
    assert figures.stage(run, "lambda", 8, WALL) == pytest.approx(1.0)
    assert figures.peak(run, 32, "uss") == 960 and figures.peak(run, 32, "rss") == 10


def test_fixed_cost_and_one_more_query_lie_on_a_line() -> None:
    assert figures.cost(measured("A", (8, 32, 256), fixed=3.0, more=0.05), WALL) == pytest.approx((3.0, 0.05))
    assert figures.cost(measured("A", (8,), fixed=3.0, more=0.05), WALL) is None
    # Least squares of points off the line: y = 1 + 2x + (1, −2, 1).
    assert figures.line([0, 1, 2], [2, 1, 6]) == pytest.approx((1.0, 2.0))


def test_a_spread_is_median_least_and_greatest() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0) and Spread.of([]) is None
    assert Spread(2.0, 1.0, 3.0).text(1) == "2.0 (1.0 to 3.0)" and Spread(2.0, 2.0, 2.0).text() == "2.00"


def test_agreement_of_scores() -> None:
    exact = np.random.default_rng(0).normal(size=(3, 40))
    assert Agreement.of(exact, exact) == Agreement(pytest.approx(1.0), 0.0, 1.0)
    turned = Agreement.of(-exact, exact)
    assert turned.pearson == pytest.approx(-1.0) and turned.top == 0.0
    moved = exact.copy()
    moved[1, 7] += 0.5
    assert Agreement.of(moved, exact).error == pytest.approx(0.5 / np.sqrt(np.mean(exact**2)))
    # One of a query's ten changes places with one that was not among them.
    order = np.argsort(-exact[0])
    moved = exact.copy()
    moved[0, order[[9, 10]]] = exact[0, order[[10, 9]]]
    assert Agreement.of(moved, exact).top == pytest.approx((0.9 + 1 + 1) / 3)


def test_points_are_judged_by_the_median_of_the_rounds() -> None:
    rounds_of = [(FLOAT32, turn, measured("B", (8, 32), 3.0, more)) for turn, more in enumerate((0.05, 0.09, 0.20))]
    theirs = [(KRONFLUENCE, turn, measured("B", (8, 32), 7.0, 0.1, KRONFLUENCE)) for turn in range(3)]
    by_title = {row.title: row for row in rows(found(*rounds_of, *theirs))}
    job, more = by_title["whole job B, Q = 32, wall in F"], by_title["one more query on B, wall in F"]
    assert job.values[FLOAT32].median == pytest.approx(5.88) and job.verdict(FLOAT32) == "met"
    assert job.values[KRONFLUENCE].median == pytest.approx(10.2)
    assert more.values[FLOAT32].median == pytest.approx(0.09) and more.values[FLOAT32].high == pytest.approx(0.2)
    assert replace(more, floor32=0.075).verdict(FLOAT32) == "missed, 1.20 times the floor"
    assert replace(more, floor32=0.1, aim=0.095).verdict(FLOAT32) == "aim met"
    assert by_title["whole job A, Q = 8, CPU in F"].verdict(FLOAT32) == ""
    assert replace(job, least=True, aim=None).verdict(FLOAT32) == "missed, by 0.12"


def test_ratios_to_kronfluence_are_taken_within_a_round() -> None:
    ours = [(RAYLUX, turn, measured("A", (8,), fixed, 0.0)) for turn, fixed in enumerate((1.0, 8.0, 3.0))]
    theirs = [
        (KRONFLUENCE, turn, measured("A", (8,), fixed, 0.0, KRONFLUENCE)) for turn, fixed in enumerate((2.0, 16.0, 3.0))
    ]
    assert "0.50 (0.50 to 1.00)" in page.stages(found(*ours, *theirs), "A")


def test_memory_of_a_stage_is_the_peak_of_the_samples_within_it() -> None:
    samples = [(0.0, 5, 1), (1.0, 9, 3), (2.0, 7, 8), (3.0, 30, 30)]
    stage = rounds.with_memory(Stage("score", 8, 1.5, 1.0, 0.5), samples)
    assert (stage.rss, stage.uss) == (9, 8)
    # Shorter than the time between two samples: what was seen just before.
    stage = rounds.with_memory(Stage("score", 8, 0.2, 0.1, 2.5), samples)
    assert (stage.rss, stage.uss) == (7, 8)


# what is measured


def test_programs_take_turns_and_each_round_begins_with_another() -> None:
    requests = [x for x in rounds.plan(Choice(("A",), rounds=3)) if x.purpose == "speed"]
    width = len(requests) // 3
    turns = [[x.variant for x in requests[start : start + width]] for start in range(0, len(requests), width)]
    assert len({turn[0] for turn in turns}) == min(3, width)
    assert all(sorted(turn) == sorted(turns[0]) for turn in turns)
    assert [x.round for x in requests] == sorted(x.round for x in requests)


def test_ray_is_measured_on_the_same_units_whatever_the_workers() -> None:
    requests = [x for x in rounds.plan(Choice(("A",), rounds=1, ray=True)) if x.purpose == "ray"]
    frozen = {x.variant: [y for y in x.spec.overrides if not y.startswith("engine.")] for x in requests}
    assert {"local 1", "ray 1", "ray 2"} <= {name.rpartition(", ")[2] for name in frozen}
    assert all(units == next(iter(frozen.values())) for units in frozen.values())
    assert {x.spec.threads for x in requests} == {1}


def test_a_workload_is_the_same_every_time(tmp_path: Path) -> None:
    assert isinstance(TINY, Workload)
    files = []
    for name in ("a", "b"):
        TINY.write(tmp_path / name)
        paths = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        files.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in paths})
    assert files[0] == files[1]
    rows_of = [json.loads(line)["input_ids"] for line in files[0]["corpus.jsonl"].splitlines()]
    assert {len(row) for row in rows_of} == {TINY.length} and len(rows_of) == TINY.sequences
    assert len({tuple(row) for row in rows_of}) == TINY.sequences
    other = replace(TINY, seed=1).text(2, 2)
    assert other != rows_of[:2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workloads", "Z"], "unknown workload 'Z'"),
        (["--programs", "dattri"], "unknown program 'dattri'"),
        (["--sizes", "8,x"], "--sizes '8,x'"),
        (["--workloads", "tiny", "--rounds", "0"], "--rounds"),
        (["--workloads", "tiny", "--programs", "raylux", "--sizes", "9"], "has 8 queries, 9 were asked for"),
    ],
)
def test_bad_options_end_in_a_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(arguments) != 0
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown


# one measurement


def test_a_measurement_goes_from_its_process_to_the_page(tmp_path: Path) -> None:
    spec = Spec(RAYLUX, "tiny", (2, 4), threads=1, bare=1)
    request = Request("speed", FLOAT32, 0, spec)
    run, scores = rounds.take(request, tmp_path / "0")
    names = [(stage.name, stage.queries) for stage in run.stages if stage.name not in ("load", "call")]
    assert names == [(name, size) for size in (2, 4) for name in figures.JOB]
    for size in (2, 4):
        assert 0 < figures.seconds(run, figures.JOB, size, WALL) <= figures.seconds(run, ("call",), size, WALL)
    assert len(run.bare_cpu) == len(run.bare_wall) == 2 and run.choices["threads"] == 1
    assert all(stage.wall > 0 and stage.uss > 0 for stage in run.stages if stage.name in figures.FIT)
    # The first two queries of each size are the same.
    assert scores[4].shape == (4, TINY.sequences) and np.isfinite(scores[4]).all()
    np.testing.assert_allclose(scores[4][:2], scores[2], rtol=1e-4, atol=1e-4 * np.abs(scores[2]).max())
    held = Found("command", "machine", [(request, run)], compare([(request, run, scores)]))
    held.save(tmp_path / "found.json")
    again = Found.open(tmp_path / "found.json")
    assert again == held and page.page(again) == page.page(held)
    assert again.joined(held) == replace(held, command="command\n    command")
    assert "| raylux float32 | 4 | cpu |" in page.page(again)


def test_a_file_that_is_no_result_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="holds no results"):
        Found.open(tmp_path / "x.json")
