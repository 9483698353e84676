"""Where time goes: each second counts once, to the kind that was at work, and clocks change no result."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylux import profiling
from raylux.profiling import KINDS, Clock, Spent, Timed, of, timed
from raylux.report.html import render
from raylux.report.profile import bars, parsed, stage_times, total
from raylux.report.tables import profile_table
from tests.small import Inputs, make_inputs
from tests.test_report import HOSTILE, Tags, printed, stub_run


class Hands:
    """A clock's hands, moved by the test: CPU time goes by at half the pace."""

    def __init__(self) -> None:
        self.at = 0

    def __call__(self) -> tuple[float, float]:
        return float(self.at), self.at / 2

    def turn(self, seconds: int) -> None:
        self.at += seconds


def walls(spent: Spent) -> dict[str, float]:
    return {kind: wall for kind, (wall, _) in spent.kinds.items() if wall}


# ------------------------------------------------------------------------------------------- the clock


def test_a_section_within_another_stops_its_time() -> None:
    hands = Hands()
    clock = Clock(now=hands)
    with clock.running():
        hands.turn(1)
        with of("write"):
            hands.turn(10)
            with of("read"):
                hands.turn(100)
            with of("write"):
                hands.turn(1000)
            hands.turn(20)
        hands.turn(3)
    spent = clock.take()
    assert walls(spent) == {"other": 4, "write": 1030, "read": 100}
    assert all(cpu == wall / 2 for wall, cpu in spent.kinds.values())
    assert clock.take() == Spent(), "it is told once"


@given(st.recursive(st.integers(0, 9), lambda inner: st.tuples(st.sampled_from(KINDS), st.lists(inner, max_size=4))))
def test_every_second_counts_once(tree: Any) -> None:
    hands, expected = Hands(), dict.fromkeys(KINDS, 0)
    clock = Clock(now=hands)

    def walk(node: Any, kind: str) -> None:
        if isinstance(node, int):
            hands.turn(node)
            expected[kind] += node
            return
        with of(node[0]):
            for inner in node[1]:
                walk(inner, node[0])

    hands.turn(50)  # before the stretch: nobody's
    with clock.running():
        walk(tree, "other")
    assert walls(clock.take()) == {kind: seconds for kind, seconds in expected.items() if seconds}


def test_a_stretch_within_a_stretch_of_another_clock() -> None:
    """In process the worker's clock runs while the driver's waits; the driver's then goes on."""
    hands = Hands()
    driver, worker = Clock(now=hands), Clock(now=hands)
    with driver.running():
        with of("wait"), worker.running(), of("forward"):
            hands.turn(5)
        with of("commit"):
            hands.turn(2)
    assert walls(driver.take()) == {"wait": 5, "commit": 2} and walls(worker.take()) == {"forward": 5}


def test_what_is_taken_in_the_middle_is_not_taken_again() -> None:
    hands = Hands()
    clock = Clock(now=hands)
    with clock.running(), of("wait"):
        hands.turn(3)
        assert walls(clock.take()) == {"wait": 3}
        hands.turn(4)
    assert walls(clock.take()) == {"wait": 4}


def test_an_error_ends_its_sections() -> None:
    hands = Hands()
    clock = Clock(now=hands)

    def fails() -> None:
        with clock.running(), of("read"):
            hands.turn(1)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    hands.turn(7)
    with clock.running():
        hands.turn(2)
    assert walls(clock.take()) == {"read": 1, "other": 2}


def test_a_device_is_waited_for_where_a_section_begins_and_ends() -> None:
    """What it does meanwhile goes by before the hands are read."""
    hands, queued = Hands(), [0]

    def synchronise() -> None:
        hands.turn(queued[0])
        queued[0] = 0

    clock = Clock(synchronise, hands)
    with clock.running():
        with of("forward"):
            queued[0] = 30
        with of("dot"):
            queued[0] = 4
    assert walls(clock.take()) == {"forward": 30, "dot": 4}


def test_nobody_measures_where_no_clock_runs() -> None:
    with of("forward"):
        profiling.count(5)
        profiling.helped(Spent({"add": [1.0, 1.0]}))
    with of("a word nobody knows"):
        pass
    with Clock().running(), pytest.raises(ValueError, match="no kind of work"):
        of("a word nobody knows")


def test_a_call_comes_with_its_time_and_without_that_of_one_that_failed() -> None:
    hands = Hands()

    class Worker:
        def unit(self, seconds: int) -> tuple[str, str]:
            with of("dot"):
                hands.turn(seconds)
                profiling.count(tokens=11)
                if seconds > 5:
                    raise ValueError("too long")
            return "head", "part"

    clock, worker = Clock(now=hands), Worker()
    with pytest.raises(ValueError, match="too long"):
        timed(worker, clock, "unit", False, (9,))
    head, part = timed(worker, clock, "unit", True, (3,))
    assert isinstance(head, Timed) and (head.value, part) == ("head", "part")
    assert walls(head.spent) == {"dot": 3} and head.spent.tokens == 11
    whole = timed(worker, clock, "unit", False, (4,))
    assert profiling.untimed(whole) == (("head", "part"), whole.spent) and walls(whole.spent) == {"dot": 4}
    assert profiling.untimed("head") == ("head", None), "what comes without its time is left as it is"


# ------------------------------------------------------------------------------------------- of a run


# So that every pass has all of its work.
SETTINGS = ("engine.keep_captured=never", "query.low_rank=always")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "gpt2")


@pytest.fixture(scope="module")
def run(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return inputs.run(tmp_path_factory.mktemp("run") / "run", *SETTINGS)


def test_every_stage_of_a_run_tells_its_work(run: Any) -> None:
    found = {stage.stage: stage for stage in run.profile()}
    assert list(found) == ["covariance", "eigenbases", "lambda", "query", "score", "tokens"]
    kinds = {name: set(stage.work.kinds) for name, stage in found.items()}
    assert {"load", "read", "forward", "label", "backward", "covariance", "add", "write"} <= kinds["covariance"]
    assert {"read", "eigendecomposition", "write"} <= kinds["eigenbases"]
    assert {"forward", "backward", "rotate", "form", "square", "add"} <= kinds["lambda"]
    assert not {"label", "covariance", "dot"} & kinds["lambda"], "its labels were drawn in the pass before"
    assert {"forward", "backward", "solve", "compress", "dot"} <= kinds["query"]
    assert {"forward", "backward", "form", "dot", "write"} <= kinds["score"]
    assert "commit" in found["score"].driver.kinds and "wait" in found["score"].driver.kinds
    assert not set().union(*kinds.values()) & {"wait", "ask", "commit"}, "workers and shards commit nothing"


def test_units_and_tokens_are_those_of_the_run(run: Any) -> None:
    found = {stage.stage: stage for stage in run.profile()}
    corpus = run.sequences
    assert found["eigenbases"].units == 8 and found["eigenbases"].work.tokens == 0
    assert math.isnan(found["eigenbases"].rate)
    words = sum(len(text.split()) for text in corpus["text"])
    for stage in ("covariance", "lambda", "score"):
        assert found[stage].work.tokens == words, stage
    assert found["covariance"].units == found["lambda"].units > 1
    assert found["score"].units == 5


def test_in_process_the_driver_waits_for_what_the_others_do(run: Any) -> None:
    """Two clocks of one thread: what workers and shards took lies within the driver's waiting (or its loading)."""
    for stage in run.profile():
        waited = sum(stage.driver.kinds.get(kind, [0.0])[0] for kind in ("wait", "ask"))
        loading = stage.work.kinds.get("load", [0.0])[0]
        assert stage.seconds - loading <= waited + 1e-3, stage.stage


def test_over_ray_the_same_work_is_told(ray_cluster: dict[str, Any], inputs: Inputs, tmp_path: Path, run: Any) -> None:
    ray = inputs.run(tmp_path / "run", *SETTINGS, "engine.backend=ray", "engine.workers=1", "engine.shards=1")
    for here, there in zip(run.profile(), ray.profile(), strict=True):
        assert (there.stage, there.units, there.work.tokens) == (here.stage, here.units, here.work.tokens)
        assert set(there.work.kinds) - {"load"} == set(here.work.kinds) - {"load"}, here.stage


def test_a_stage_that_is_done_takes_no_more_time(inputs: Inputs, tmp_path: Path) -> None:
    first = inputs.run(tmp_path / "run").profile()
    assert inputs.run(tmp_path / "run").profile() == first


# ------------------------------------------------------------------------------------------- summed and shown


def unit(task: Any, kinds: Any, event: str = "unit", **more: Any) -> dict[str, Any]:
    return {"event": event, "task": task, "kinds": kinds, **more}


EVENTS = [
    {"event": "task", "stage": "score", "state": "started"},
    unit("score", {"forward": [4.0, 3.0], "dot": [1.0, 1.0]}, tokens=100),
    unit("score", {"forward": [2.0, 2.0]}, tokens=50),
    unit("score", {"wait": [8.0, 0.1], "commit": [2.0, 0.5]}, "spent", who="driver"),
    unit("lambda", {"add": [3.0, 3.0]}, "spent", who="shard"),
]


def test_events_are_summed_by_stage_and_kind() -> None:
    score, moments = stage_times(EVENTS)
    assert score.stage == "score" and score.units == 2 and score.seconds == 7 and score.rate == 15
    assert score.work == Spent({"forward": [6.0, 5.0], "dot": [1.0, 1.0]}, 150)
    assert score.driver == Spent({"wait": [8.0, 0.1], "commit": [2.0, 0.5]})
    assert (moments.units, moments.seconds, moments.driver) == (0, 3, Spent())
    assert total([score, moments]) == (10, 10)


@pytest.mark.parametrize(
    "event",
    [
        unit(3, {"dot": [1.0, 1.0]}),
        unit("score", {"dot": [1.0]}),
        unit("score", {"dot": [1.0, "1"]}),
        unit("score", {"dot": [math.nan, 1.0]}),
        unit("score", {"dot": [-1.0, 1.0]}),
        unit("score", {HOSTILE: [1.0, 1.0]}),
        unit("score", [1.0, 1.0]),
        unit("score", {"dot": [1.0, 1.0]}, tokens="many"),
        unit("score", {"dot": [1.0, 1.0]}, tokens=-5),
        unit("score", {"dot": [1.0, 1.0]}, tokens=10**300),
        {"event": "unit"},
    ],
)
def test_a_damaged_event_is_left_out(event: dict[str, Any]) -> None:
    assert stage_times([*EVENTS, event]) == stage_times(EVENTS)


def test_damaged_lines_are_left_out() -> None:
    lines = [json.dumps(event).encode() for event in EVENTS]
    broken = [b"", b"\xff\xfe", b"[1, 2]", b'"text"', lines[1][:-9], b"[" * 100_000, b"1" * 10_000]
    assert parsed(b"\n".join([*broken, *lines, b'{"half'])) == EVENTS


def test_the_table_has_each_kind_and_the_drivers_part() -> None:
    text = printed(profile_table(stage_times([*EVENTS, unit(HOSTILE, {"read": [0.0001, 0.0]})])))
    assert "10 s of workers and shards, 10 s on the driver's clock" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "score all 7 6 70.0% 2 15" in rows and "forward 6 5 60.0%" in rows and "driver: commit 2 0.5" in rows
    assert "\x1b" not in text and "[red]r[/red]" in text and "<0.001" in text


def test_bars_are_as_wide_as_their_time() -> None:
    score, moments = bars(stage_times(EVENTS))
    assert sum(part["width"] for part in score["parts"]) == pytest.approx(100)
    assert sum(part["width"] for part in moments["parts"]) == pytest.approx(100 * 3 / 7)
    assert sum(part["share"] for bar in (score, moments) for part in bar["parts"]) == pytest.approx(1)
    assert [part["kind"] for part in score["parts"]] == ["forward", "dot"]
    colours = {part["colour"] for bar in bars(stage_times([unit("all", {kind: [1, 1]}) for kind in KINDS]))
               for part in bar["parts"]}  # fmt: skip
    assert len(colours) == len(KINDS), "two kinds share a colour"


def test_the_page_shows_where_the_time_went() -> None:
    page = stub_run()
    assert "Where the time went" not in render(page), "nothing is known"
    page.profile = lambda: stage_times([*EVENTS, unit(HOSTILE, {"read": [1.0, 1.0]})])
    tags = Tags(render(page))
    assert "script" not in tags.tags
    widths = [value for name, value in tags.attributes if name == "style" and value and "background" in value]
    assert any("width:85.71%" in value for value in widths)
    assert "driver: wait" in tags.texts and "10 s on the driver's clock" in "".join(tags.texts)
