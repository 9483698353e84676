"""Bits that do not depend on who computes, when, or beside what; and what may change them, by how little."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raylux
from raylux.batches import IGNORED, TokenRow, collate
from raylux.capture import Capture
from raylux.engine.local import LocalBackend
from raylux.engine.work import Failure, Job, Result
from raylux.groups import input_groups
from raylux.influence.dots import sequence_gradients
from raylux.ledger import QUERY
from raylux.models import coverage
from raylux.store import RunFolder
from tests.apart import processes
from tests.architectures import build
from tests.small import QUERIES, Inputs, contents, differing, error, make_inputs, texts, write_lines

# Wide enough that four components fewer than the layers' size halve an s_test's memory.
WIDE = {"hidden_size": 48, "intermediate_size": 96}
DENSE, LOW_RANK = ("query.max_error=0",), ("query.max_error=0.05", "query.low_rank=always")
# The fast path: products in bf16, queries left in the eigenbases, everything scored while it is at hand.
FAST = ("engine.contraction_dtype=bfloat16", "query.basis=eigen")
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "gpt2": ("gpt2", {}, DENSE),
    "llama": ("llama", {}, DENSE),
    "low-rank": ("llama", WIDE, LOW_RANK),
    "fast": ("gpt2", {}, FAST),
}
# (workers, shards, layer passes): each case has its own, and together they have all.
CLUSTERS = {"gpt2": (2, 3, 1), "llama": (5, 2, 4), "low-rank": (3, 1, 1), "fast": (2, 2, 2)}
# Processes take long to start: of these cases one is on Ray itself, and many queries are.
ON_RAY = "low-rank"
FLOAT32, FLOAT64 = 1e-4, 1e-9


class Case:
    """A model with its inputs, and the run that others are held against: in process, all queries at once."""

    def __init__(self, base: Path, name: str) -> None:
        architecture, sizes, rank = CASES[name]
        self.name, self.base, self.rank = name, base, rank
        self.inputs = make_inputs(base / "inputs", architecture, **sizes)
        self.run("usual")
        self.usual = contents(base / "usual")

    def run(self, folder: str, *overrides: str) -> Path:
        self.inputs.run(self.base / folder, *self.rank, *overrides)
        return self.base / folder


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param)


def test_the_runs_are_what_this_file_is_about(case: Case) -> None:
    """Several units, blocks and batch shapes; dense or low rank as the case says."""
    store = RunFolder(str(case.base / "usual"))
    labels = [name for name in case.usual if name.startswith("fit.")]
    assert any(name.startswith("fit.moments") for name in labels) and any("vectors" in name for name in labels)
    assert len(store.committed("score")) >= 4
    ranks = [rank for manifest in store.units(QUERY).values() for of in manifest.meta["ranks"] for rank in of.values()]
    if case.rank == LOW_RANK:
        assert max(ranks) > 0 and any(name.endswith("right") for name in case.usual)
    else:
        assert ranks == [] and not any(name.endswith("right") for name in case.usual)
    assert all(np.isfinite(array).all() for array in case.usual.values())
    progress = [json.loads(line) for line in (case.base / "usual" / "progress.jsonl").read_text().splitlines()]
    assert max(entry["total"] for entry in progress if entry.get("stage") == "covariance") >= 4


# ----------------------------------------------------------------------------------------- equal bits


def test_again_in_another_folder(case: Case) -> None:
    assert differing(contents(case.run("again")), case.usual) == []


def _how(workers: int, shards: int, passes: int) -> tuple[str, ...]:
    return f"engine.workers={workers}", f"engine.shards={shards}", f"fit.passes={passes}", "engine.backend=ray"


def test_any_number_of_workers_shards_and_layer_passes_and_some_that_die(case: Case) -> None:
    with processes() as found:
        folder = case.run("processes", *_how(*CLUSTERS[case.name]))
    assert {who for who, _ in found.died} == {"worker", "shard"}
    assert differing(contents(folder), case.usual) == []


@pytest.mark.parametrize("case", [ON_RAY], indirect=True)
def test_workers_shards_and_layer_passes_on_ray(case: Case, ray_cluster: Any) -> None:
    assert differing(contents(case.run("ray", *_how(2, 2, 2))), case.usual) == []


def test_added_queries_against_all_at_once(case: Case) -> None:
    case.inputs.ask("a", "b")
    first = contents(case.run("grown"))
    case.inputs.ask()
    assert differing(first, {name: case.usual[name] for name in first}) == []
    assert differing(contents(case.run("grown")), case.usual) == []


def test_added_queries_and_a_larger_prefilter_against_all_at_once(case: Case) -> None:
    few, many = (("prefilter.kind=idf", f"prefilter.top={top}") for top in (5, 11))
    case.inputs.ask("d", "b")
    case.run("filtered", *few)
    case.inputs.ask()
    case.run("filtered", *few)
    grown = contents(case.run("filtered", *many))
    at_once = contents(case.run("filtered-at-once", *many))
    assert 11 < at_once["total a"].size < 60  # candidates differ between queries, and some sequences are nobody's
    # A larger prefilter may add candidates only, so the union is that of the larger one.
    assert differing(grown, at_once) == []
    places = {f"s{row}": row for row in range(60)}
    usual = dict(zip(sorted(places), case.usual["total a"], strict=True))
    scored = raylux.open_run(case.base / "filtered").scores().sel(query="a").sortby("sequence")
    assert [usual[str(name)] for name in scored["sequence"].to_numpy()] == scored.to_numpy().tolist()


def test_scores_do_not_depend_on_how_many_queries_stand_beside_them(tmp_path: Path) -> None:
    """More than a tile of queries, solved and scored a few at a time and in another order."""
    inputs = make_inputs(tmp_path / "inputs", "gpt2")
    asked = [
        {"id": f"q{place}", "prompt": " ".join(words[:4]), "completion": " ".join(words[4:7])}
        for place, words in enumerate(text.split() for text in texts(60, seed=9))
        if len(words) > 7
    ][:21]
    for part in ([20], [3, 17, 5], range(20, -1, -1)):
        write_lines(inputs.queries, [asked[place] for place in part])
        inputs.run(tmp_path / "grown")
    write_lines(inputs.queries, asked)
    inputs.run(tmp_path / "usual")
    assert differing(contents(tmp_path / "grown"), contents(tmp_path / "usual")) == []


# Many queries of like length run several at a time, in batches of a shape that follows from a query's length.
# Tokens of each query's two best, which ``contents`` reads, are enough of so many.
MANY = (*FAST, "score.token_top=2")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inputs, list[dict[str, str]], Path]:
    """Inputs, 45 queries of one padded length, one of them with two parts, and a run of all at once."""
    base = tmp_path_factory.mktemp("many")
    inputs = make_inputs(base / "inputs", "gpt2")
    words = [words for words in (text.split()[:7] for text in texts(80, seed=9)) if len(words) == 7]
    asked = [
        {"id": f"q{place}", "prompt": " ".join(own[:4]), "completion": " ".join(own[4:])}
        for place, own in enumerate(words[:45])
    ]
    asked[40] |= {"measurement": "contrast", "contrast": "olaf whose garden"}
    write_lines(inputs.queries, asked)
    run = inputs.run(base / "usual", *MANY)
    assert len(asked) == 45 and run.settings["plan"]["query_tokens"] > 0
    return inputs, asked, base / "usual"


def test_queries_in_batches_do_not_depend_on_their_company(many: Any, tmp_path: Path) -> None:
    """32 of them, which fill two batches, then the others in reverse order."""
    inputs, asked, usual = many
    for part in (asked[:32], asked[:31:-1]):
        write_lines(inputs.queries, part)
        inputs.run(tmp_path / "grown", *MANY)
    assert differing(contents(tmp_path / "grown"), contents(usual)) == []


def test_queries_in_batches_on_workers_that_die(many: Any, tmp_path: Path) -> None:
    inputs, asked, usual = many
    write_lines(inputs.queries, asked)
    with processes():
        inputs.run(tmp_path / "processes", *MANY, *_how(2, 1, 1))
    assert differing(contents(tmp_path / "processes"), contents(usual)) == []


def test_queries_in_batches_on_ray(many: Any, tmp_path: Path, ray_cluster: Any) -> None:
    inputs, asked, usual = many
    write_lines(inputs.queries, asked)
    inputs.run(tmp_path / "ray", *MANY, *_how(1, 1, 1))
    assert differing(contents(tmp_path / "ray"), contents(usual)) == []


def test_queries_in_batches_against_each_by_itself(many: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, asked, _ = many
    write_lines(inputs.queries, asked)
    found = []
    for name, least in (("together", 32), ("alone", 1000)):
        monkeypatch.setattr("raylux.engine.choices._MANY_QUERIES", least)
        run = inputs.run(tmp_path / name, *DENSE, "score.token_top=0")
        assert bool(run.settings["plan"]["query_tokens"]) == (name == "together")
        found.append(run.scores().sortby("sequence").to_numpy())
    assert error(*found) <= FLOAT32


def test_what_ends_its_worker_is_given_up_and_its_company_is_not(
    many: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, asked, usual = many
    run, sizes = LocalBackend.run, []

    def failing(self: LocalBackend, job: Job, method: str, parts: bool) -> Result:
        if method == "query_gradients":
            sizes.append(len(job.item))
            if any(query.id == "q5" for query in job.item):
                return Result(job, failure=Failure(3, "killed"))
        return run(self, job, method, parts)

    monkeypatch.setattr(LocalBackend, "run", failing)
    write_lines(inputs.queries, asked)
    inputs.run(tmp_path / "run", *MANY)
    assert max(sizes) == 16 and sizes.count(1) >= 16
    without = tuple(query["id"] for query in asked if query["id"] != "q5")
    found, wanted = contents(tmp_path / "run", without), contents(usual, without)
    assert differing(found, wanted) == []


# ------------------------------------------------------------------------------------------ tolerance


@pytest.fixture(scope="module", params=[("gpt2", "float32"), ("gpt2", "float64"), ("llama", "float32")], ids="-".join)
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, float]:
    """A run to hold others against, dense, and what may lie between them."""
    architecture, dtype = request.param
    base = tmp_path_factory.mktemp("tolerance")
    inputs = make_inputs(base / "inputs", architecture)

    def run(folder: str, *overrides: str, of: Inputs = inputs) -> np.ndarray:
        found = of.run(base / folder, *DENSE, f"model.dtype={dtype}", "score.token_top=0", *overrides)
        return found.scores().sortby("sequence").to_numpy()

    usual = run("usual")
    assert usual.dtype == dtype
    return partial(_against, base, inputs, run, usual), FLOAT64 if dtype == "float64" else FLOAT32


def _against(base: Path, inputs: Inputs, run: Any, usual: np.ndarray, name: str, *overrides: str) -> float:
    of = inputs
    if name == "order":
        of = Inputs(base / "shuffled")
        of.base.mkdir(exist_ok=True)
        rows = [json.loads(line) for line in inputs.corpus.read_text(encoding="utf-8").splitlines()]
        write_lines(of.corpus, [rows[place] for place in np.random.default_rng(0).permutation(len(rows))])
        of.model.symlink_to(inputs.model)
        of.ask()
    return error(run(name, *overrides, of=of), usual)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("batches", ["engine.batch_tokens=64"]),
        ("units", ["fit.unit_tokens=1500", "score.unit_size=60"]),
        ("order", []),
        ("padding", []),
    ],
    ids=["batches", "units", "order", "padding"],
)
def test_within_tolerance(
    exact: tuple[Any, float], name: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    against, bound = exact
    padded: list[int] = []
    if name == "padding":
        # As far as the context goes. On some processors that changes no bit, so it is the call that is looked at.
        monkeypatch.setattr("raylux.batches.bucket", lambda length, most=None: padded.append(length) or 64)
    found = against(name, *overrides)
    assert found <= bound
    if name == "padding":
        assert any(length < 32 for length in padded)
    if name == "batches" and bound == FLOAT64:
        assert found > 0  # something did change


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox", "opt"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, FLOAT32), (torch.float64, FLOAT64)], ids=str)
def test_padding_on_either_side(architecture: str, dtype: torch.dtype, bound: float) -> None:
    model = build(architecture, dtype)
    layers = coverage(model, None).tracked
    groups = input_groups(model, layers)
    capture = Capture(model, layers, groups)
    draw = np.random.default_rng(1)
    rows = []
    for length in (17, 3, 30, 9):
        tokens = draw.integers(0, 128, length).astype(np.int32)
        rows.append(TokenRow(tokens, np.concatenate([[IGNORED], tokens[1:]]).astype(np.int32)))
    alone = [_gradients(capture, collate([row], [0], len(row.tokens)), groups) for row in rows]
    for padded, left in ((30, False), (41, False), (30, True), (41, True)):
        found = _gradients(capture, collate(rows, range(4), padded, pad_left=left), groups)
        for place in range(4):
            for name, wanted in alone[place].items():
                difference = float((found[name][place] - wanted[0]).abs().max() / wanted.square().mean().sqrt())
                assert difference <= bound, (padded, left, place, name)


def _gradients(capture: Capture, batch: Any, groups: dict[str, str]) -> dict[str, torch.Tensor]:
    found = capture.run(batch)
    return {name: sequence_gradients(found.inputs[groups[name]], g) for name, g in found.grads.items()}


def test_the_query_file_of_these_tests_has_every_measurement() -> None:
    assert {query.get("measurement", "logprob") for query in QUERIES} == {"logprob", "loss", "contrast"}
