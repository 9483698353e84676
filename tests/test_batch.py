"""Query files that keep arriving: each is answered once, with the bits of a run of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import raylux
from raylux.api import run_stages
from raylux.batch import Options, Outcome, answer_files
from raylux.engine.records import ANSWER, CANDIDATES, QUERY, SCORE, TAKEN, TOKENS
from raylux.engine.worker import GradientWorker
from raylux.results import Run
from raylux.store import Lease, RunFolder
from tests.interrupts import Interrupt
from tests.small import QUERIES, WORDS, Inputs, make_inputs, objects, write_lines

IDF = ("prefilter.kind=idf", "prefilter.top=9")
FILES = {"monday.jsonl": ("a",), "tuesday.jsonl": ("b", "c"), "wednesday.jsonl": ("d", "a")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("batch") / "inputs")


def fitted(inputs: Inputs, *overrides: str) -> Path:
    """A fitted run folder, made once for these overrides."""
    folder = inputs.base / f"fitted-{abs(hash(overrides))}"
    if not folder.exists():
        run_stages(inputs.config(folder, *overrides), ("corpus", "fit"), quiet=True)
    return folder


@pytest.fixture
def folder(inputs: Inputs, tmp_path: Path) -> Path:
    """A copy of the run fitted with a prefilter, whose queries differ in their candidates."""
    shutil.copytree(fitted(inputs, *IDF), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


def put(inbox: Path, name: str, ids: tuple[str, ...]) -> None:
    """Files appear whole, as a careful writer lets them."""
    write_lines(inbox / f".{name}.part", [query for wanted in ids for query in QUERIES if query["id"] == wanted])
    os.replace(inbox / f".{name}.part", inbox / name)


def answer(folder: Path | str, inbox: Path | str, *overrides: str, **options: Any) -> tuple[Run, Outcome]:
    return answer_files(str(folder), str(inbox), overrides, Options(**options), quiet=True)


def facts(run: Run, prefix: str = "") -> dict[str, Any]:
    """Everything that a run says of its scored queries with a prefix, by the id without it."""
    found: dict[str, Any] = {}
    scores, scored = run.scores(), set(run.best()["query"])
    for query in run.queries:
        if query not in scored or not query.startswith(prefix):
            continue
        name = query.removeprefix(prefix)
        own = scores.sel(query=query).dropna("sequence").sortby("sequence")
        found[f"{name} sequences"] = own["sequence"].to_numpy()
        found[f"{name} total"] = own.to_numpy()
        layers = run.layer_scores(query)
        found[f"{name} layers"] = layers.dropna("sequence").sortby("sequence").to_numpy()
        top = run.top(query, 1000)
        found[f"{name} top"] = top
        found[f"{name} measured"] = run.measurements.loc[query].to_numpy()
        for sequence in top["sequence"][: run.config.score.token_top]:
            found[f"{name} tokens {sequence}"] = run.token_scores(query, sequence)["influence"].to_numpy()
    return found


def same(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names whose bits differ."""
    return [
        name
        for name in {**found, **wanted}
        if name not in found
        or name not in wanted
        or not (
            found[name].equals(wanted[name])
            if isinstance(found[name], pd.DataFrame)
            else found[name].tobytes() == wanted[name].tobytes()
            if found[name].dtype != object
            else list(found[name]) == list(wanted[name])
        )
    ]


def of_its_own(inputs: Inputs, base: Path, asked: Path, *overrides: str) -> dict[str, Any]:
    """What a run of its own says of a query file; it shares the fit, and nothing that rests on queries."""
    folder = base.parent / f"own-{asked.name}-{len(list(base.parent.iterdir()))}"
    shutil.copytree(base, folder)
    return facts(inputs.run(folder, f"queries.path={asked}", *overrides))


# ----------------------------------------------------------------------------------------- equal bits


@pytest.mark.parametrize(
    "overrides",
    [
        IDF,
        (),
        (*IDF, "engine.contraction_dtype=bfloat16"),
        (*IDF, "curvature.kind=cosine"),
        (*IDF, "query.low_rank=always", "query.max_error=0.3"),
        ("query.basis=eigen", "model.dtype=float64"),
    ],
    ids=["candidates", "all", "bf16", "cosine", "low rank", "eigen"],
)
def test_files_answered_together_have_the_bits_of_runs_of_their_own(
    inputs: Inputs, inbox: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    base = fitted(inputs, *overrides)
    shutil.copytree(base, tmp_path / "run")
    for name, ids in FILES.items():
        put(inbox, name, ids)
    run, outcome = answer(tmp_path / "run", inbox)
    assert outcome.answered == sorted(FILES) and outcome.passes == 1 and not outcome.aside
    for name in FILES:
        wanted = of_its_own(inputs, base, inbox / name, *overrides)
        assert len(wanted) >= 9  # five facts of each query, and its best sequences by token
        assert same(facts(run, f"{name}/"), wanted) == []


def test_a_file_has_the_plan_of_a_run_of_its_own(inputs: Inputs, folder: Path, inbox: Path) -> None:
    """Seventy queries stand in larger tiles, which changes bits: such a file does not go with small ones."""
    many = [
        {"id": f"m{at}", "prompt": " ".join(WORDS[at % 40 : at % 40 + 3]), "completion": WORDS[at]} for at in range(50)
    ]
    many += [{**query, "id": f"n{at}", "prompt": "anna bought"} for at, query in enumerate(many[:20])]
    write_lines(inbox / "many.jsonl", many)
    put(inbox, "few.jsonl", ("a", "b"))
    run, outcome = answer(folder, inbox, together=1000)
    assert outcome.passes == 2
    tiles = {found.unit: found.meta["plan"]["tile"] for found in run.answers}
    assert tiles == {"many.jsonl": 64, "few.jsonl": 8}
    base = fitted(inputs, *IDF)
    for name in ("many.jsonl", "few.jsonl"):
        assert same(facts(run, f"{name}/"), of_its_own(inputs, base, inbox / name, *IDF)) == []


# ------------------------------------------------------------------------------------------------ once


def test_what_is_answered_is_not_touched_again(folder: Path, inbox: Path) -> None:
    put(inbox, "one.jsonl", ("a", "b"))
    first, _ = answer(folder, inbox)
    before, wanted = objects(folder), facts(first)
    put(inbox, "two.jsonl", ("c",))
    run, outcome = answer(folder, inbox)
    assert outcome.answered == ["two.jsonl"]
    now = objects(folder)
    kept = {path: when for path, when in before.items() if not path.startswith("report/")}
    assert {path: now.get(path) for path in kept} == kept
    assert same(facts(run, "one.jsonl/"), {name.removeprefix("one.jsonl/"): x for name, x in wanted.items()}) == []
    assert answer(folder, inbox)[1].answered == []


def test_answers_take_over_and_nothing_else_stays(folder: Path, inbox: Path) -> None:
    for name, ids in FILES.items():
        put(inbox, name, ids)
    run, _ = answer(folder, inbox)
    store = RunFolder(str(folder))
    assert not any(store.committed(stage) for stage in (QUERY, SCORE, TOKENS, CANDIDATES))
    assert store.committed(ANSWER) == store.committed(TAKEN) == set(FILES)
    assert run.problems() == []
    with Lease.take(store.files) as lease:
        store.guard = lease.check
        assert store.sweep() == (0, 0)
    status = {stage.name: stage for stage in run.status()}
    assert status["batch"].done and "3 of 3 query files answered, 5 queries" in status["batch"].detail


def test_the_runs_own_queries_stay_as_they_are(inputs: Inputs, folder: Path, inbox: Path) -> None:
    own = facts(inputs.run(folder, *IDF))
    settings = RunFolder(str(folder)).settings()
    put(inbox, "one.jsonl", ("a", "b"))
    run, _ = answer(folder, inbox)
    found = {name: value for name, value in facts(run).items() if not name.startswith("one.jsonl/")}
    assert same(found, own) == [] and run.queries == ["a", "b", "c", "d", "one.jsonl/a", "one.jsonl/b"]
    assert RunFolder(str(folder)).settings() == settings
    before = objects(folder)
    inputs.run(folder, *IDF)  # and a batch is in nobody's way
    assert objects(folder) == before


STEPS = [
    *((GradientWorker, method, call) for method, call in (("query_gradient", 2), ("score_unit", 1), ("score_unit", 3))),
    (GradientWorker, "token_unit", 2),
    *((RunFolder, "commit", call) for call in (1, 3, 4, 6, 8, 14, 15, 16, 17, 18)),
    *((RunFolder, "forget", call) for call in (1, 4)),
]


@pytest.mark.parametrize(("owner", "method", "call"), STEPS)
def test_interrupted_anywhere_it_goes_on(
    inputs: Inputs, folder: Path, inbox: Path, owner: type, method: str, call: int
) -> None:
    """Each file is answered once, with the same bits, also when another one has come before it goes on."""
    put(inbox, "m.jsonl", ("a", "d"))
    put(inbox, "n.jsonl", ("b",))
    with pytest.MonkeyPatch.context() as patch:
        Interrupt(patch, owner, method, call, after=owner is RunFolder)
        with pytest.raises(KeyboardInterrupt):
            answer(folder, inbox)
    before = {found.unit: found.meta["time"] for found in raylux.open_run(folder).answers}
    put(inbox, "l.jsonl", ("c",))
    run, outcome = answer(folder, inbox)
    assert sorted([*outcome.answered, *before]) == ["l.jsonl", "m.jsonl", "n.jsonl"]
    assert {found.unit: found.meta["time"] for found in run.answers if found.unit in before} == before
    store = RunFolder(str(folder))
    assert not any(store.committed(stage) for stage in (QUERY, SCORE, TOKENS, CANDIDATES))
    assert sorted(path.name for path in (folder / "answers").iterdir()) == [f"{x}.jsonl.parquet" for x in "lmn"]
    assert run.problems() == []
    for name, wanted in _own(inputs, inbox, "l.jsonl", "m.jsonl", "n.jsonl").items():
        assert same(facts(run, f"{name}/"), wanted) == []


_OWN: dict[str, dict[str, Any]] = {}


def _own(inputs: Inputs, inbox: Path, *names: str) -> dict[str, dict[str, Any]]:
    for name in names:
        if name not in _OWN:
            _OWN[name] = of_its_own(inputs, fitted(inputs, *IDF), inbox / name, *IDF)
    return {name: _OWN[name] for name in names}
