"""A run from end to end in process: what it computes again, how it goes on, and what its tables say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml

import raylux
from raylux.engine.records import COVARIANCE, EIGEN, MOMENTS, QUERY, SCORE, TOKENS
from raylux.engine.shard import FactorShard
from raylux.engine.worker import GradientWorker
from raylux.errors import MissingStageError, UserError
from raylux.store import RunFolder
from raylux.store.folder import Group
from tests.small import CUT, Inputs, contents, differing, make_inputs, objects, texts, write_lines

LEDGER = (COVARIANCE, EIGEN, MOMENTS, "prefilter", QUERY, SCORE, TOKENS)
IDF = ("prefilter.kind=idf", "prefilter.top=9")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "gpt2")


@pytest.fixture(autouse=True)
def _all_queries(inputs: Inputs) -> Iterator[None]:
    yield
    inputs.ask()


@pytest.fixture(scope="module")
def usual(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> raylux.Run:
    """Dense, every sequence scored."""
    return inputs.run(tmp_path_factory.mktemp("usual") / "run", "query.max_error=0")


@pytest.fixture(scope="module")
def filtered(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> raylux.Run:
    """With a prefilter: not every pair has a score, and not every scored pair a prefilter score."""
    return inputs.run(tmp_path_factory.mktemp("filtered") / "run", "query.max_error=0", *IDF)


def _ledger(folder: str) -> dict[str, int]:
    return {stage: len(RunFolder(folder).committed(stage)) for stage in LEDGER}


# ------------------------------------------------------------------------------- only what is missing


def test_a_second_run_computes_nothing(inputs: Inputs, filtered: raylux.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = objects(Path(filtered.folder))
    monkeypatch.setattr(RunFolder, "commit", _refuse)
    monkeypatch.setattr(RunFolder, "write", _refuse)
    monkeypatch.setattr("raylux.models.load_model", _refuse)
    inputs.run(filtered.folder, "query.max_error=0", *IDF)
    assert objects(Path(filtered.folder)) == before


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("there is nothing to compute")


def test_a_query_more_adds_its_own_blocks(inputs: Inputs, tmp_path: Path) -> None:
    inputs.ask("a", "b", "c")
    inputs.run(tmp_path / "run")
    before, units = objects(tmp_path / "run"), _ledger(str(tmp_path / "run"))
    inputs.ask()
    inputs.run(tmp_path / "run")
    after, more = objects(tmp_path / "run"), _ledger(str(tmp_path / "run"))
    assert {name: after[name] for name in before} == before  # nothing was touched
    assert {stage: more[stage] - units[stage] for stage in LEDGER} == {
        **dict.fromkeys(LEDGER, 0),
        QUERY: 1,
        SCORE: units[SCORE],
        TOKENS: 1,
    }
    blocks = [manifest.meta["queries"] for manifest in RunFolder(str(tmp_path / "run")).units(SCORE).values()]
    assert sorted(map(tuple, blocks)) == sorted([("a", "b", "c")] * units[SCORE] + [("d",)] * units[SCORE])
    tops = {name.split("/")[0] for name in set(after) - set(before)}
    assert tops == {"ledger", "queries", "scores"}


def test_a_larger_prefilter_scores_only_what_is_new(inputs: Inputs, tmp_path: Path) -> None:
    few = inputs.run(tmp_path / "run", "prefilter.kind=idf", "prefilter.top=5")
    before, rows = objects(tmp_path / "run"), set(few.rows)
    more = inputs.run(tmp_path / "run", *IDF)
    assert {name: objects(tmp_path / "run")[name] for name in before} == before
    scored = [row for block in RunFolder(more.folder).units(SCORE).values() for row in block.meta["rows"]]
    assert len(scored) == len(set(scored)) and rows < set(scored) == set(more.rows)


def test_layers_asked_for_later_are_added(inputs: Inputs, tmp_path: Path) -> None:
    run = inputs.run(tmp_path / "run", "score.layers=false")
    total = run.scores().load()
    with pytest.raises(MissingStageError, match=r"raylux score CONFIG score\.layers=true"):
        run.layer_scores("a")
    run = inputs.run(tmp_path / "run")
    assert np.array_equal(run.scores().to_numpy(), total.to_numpy())
    assert run.layer_scores("a").shape == (4, 60)


def test_fewer_queries_keep_what_is_there(inputs: Inputs, usual: raylux.Run) -> None:
    before = objects(Path(usual.folder))
    inputs.ask("c")
    run = inputs.run(usual.folder, "query.max_error=0")
    assert objects(Path(usual.folder)) == before and run.queries == ["a", "b", "c", "d"]


# ----------------------------------------------------------------------------------------- interrupts


class Interrupt:
    """Raises KeyboardInterrupt at the n-th call of a method, before or after what it does."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, method: str, call: int, after: bool) -> None:
        self.left, usual = call, getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not after:
                raise KeyboardInterrupt
            result = usual(*args, **kwargs)
            if self.left == 0:
                raise KeyboardInterrupt
            return result

        patch.setattr(owner, method, counted)


WORKER_CALLS = [
    ("covariance_unit", 3),
    ("moment_unit", 2),
    ("query_gradient", 2),
    ("score_unit", 3),
    ("token_unit", 2),
]
SHARD_CALLS = [("add", 2), ("decompose", 4), ("solve", 1)]


@pytest.fixture(scope="module")
def undisturbed(filtered: raylux.Run) -> dict[str, np.ndarray]:
    return contents(filtered.folder)


def _goes_on(
    inputs: Inputs, folder: Path, undisturbed: dict[str, np.ndarray], interrupts: Callable[[pytest.MonkeyPatch], Any]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupts(patch)
        with pytest.raises(KeyboardInterrupt):
            inputs.run(folder, "query.max_error=0", *IDF)
    inputs.run(folder, "query.max_error=0", *IDF)
    assert differing(contents(folder), undisturbed) == []


@pytest.mark.parametrize(
    ("owner", "method", "call"),
    [(GradientWorker, *where) for where in WORKER_CALLS] + [(FactorShard, *where) for where in SHARD_CALLS],
)
def test_interrupted_work_goes_on(
    inputs: Inputs, undisturbed: dict[str, np.ndarray], tmp_path: Path, owner: type, method: str, call: int
) -> None:
    _goes_on(inputs, tmp_path / "run", undisturbed, lambda patch: Interrupt(patch, owner, method, call, False))


# How many commits each stage makes here; the ends of a stage are where its order could matter.
COMMITS = {"corpus": 1, "queries": 1, "fit.labels": 1, COVARIANCE: 8, EIGEN: 8, MOMENTS: 4, "prefilter": 1, QUERY: 1}


@pytest.mark.parametrize("stage", [*COMMITS, SCORE, TOKENS])
def test_interrupted_commits_go_on(
    inputs: Inputs, undisturbed: dict[str, np.ndarray], tmp_path: Path, stage: str
) -> None:
    """Before the first and right after the last commit of each stage, and in the middle of it."""

    def run(patch: pytest.MonkeyPatch, call: int, after: bool) -> None:
        left, usual = [call], RunFolder.commit

        def commit(folder: RunFolder, name: str, unit: str, *args: Any, **meta: Any) -> Any:
            left[0] -= name == stage
            if not after and left[0] == 0 and name == stage:
                raise KeyboardInterrupt
            result = usual(folder, name, unit, *args, **meta)
            if left[0] == 0 and name == stage:
                raise KeyboardInterrupt
            return result

        patch.setattr(RunFolder, "commit", commit)

    count = COMMITS.get(stage, 3)
    # One folder through all: each time it gets a little further, as with an impatient user.
    for call, after in ((1, False), (count // 2, True), (1 if stage in (SCORE, TOKENS) else count, True)):
        with pytest.MonkeyPatch.context() as patch:
            run(patch, max(1, call), after)
            try:
                inputs.run(tmp_path / "run", "query.max_error=0", *IDF)
            except KeyboardInterrupt:
                continue
    inputs.run(tmp_path / "run", "query.max_error=0", *IDF)
    assert differing(contents(tmp_path / "run"), undisturbed) == []


def test_interrupted_first_write_goes_on(inputs: Inputs, undisturbed: dict[str, np.ndarray], tmp_path: Path) -> None:
    def interrupts(patch: pytest.MonkeyPatch) -> None:
        def fsync(_: int) -> None:
            raise KeyboardInterrupt

        patch.setattr(os, "fsync", fsync)

    _goes_on(inputs, tmp_path / "run", undisturbed, interrupts)


def test_ctrl_c_in_a_terminal(inputs: Inputs, filtered: raylux.Run, tmp_path: Path) -> None:
    """The real command: SIGINT while it fits, exit code 130; the same command again ends well, with the same bits."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(inputs.sections(tmp_path / "run")), encoding="utf-8")
    command = [sys.executable, "-m", "raylux.cli", "run", str(config), "query.max_error=0", *CUT, *IDF]
    progress = tmp_path / "run" / "progress.jsonl"
    # Whatever started the tests may have SIGINT ignored, as shells do for what runs in the background.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=heard) as process:
        deadline = time.monotonic() + 120
        while not (progress.exists() and "covariance" in progress.read_text(encoding="utf-8")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said and "run the same command again" in said
    assert not (tmp_path / "run" / "report").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert differing(contents(tmp_path / "run"), contents(filtered.folder)) == []
    assert (tmp_path / "run" / "report" / "index.html").stat().st_size > 1000


def test_a_folder_at_a_url_holds_the_same_run(inputs: Inputs, filtered: raylux.Run, tmp_path: Path) -> None:
    for folder in (f"memory://{tmp_path.name}/run", f"file://{tmp_path}/run"):
        run = inputs.run(folder, "query.max_error=0", *IDF)
        assert differing(contents(folder), contents(filtered.folder)) == []
        assert run.top("a", 3).equals(filtered.top("a", 3))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# -------------------------------------------------------------------------------------------- tables


def test_top_is_ordered_and_says_what_it_is(usual: raylux.Run) -> None:
    everything = usual.top("a", 100)
    assert list(everything.columns) == ["rank", "sequence", "influence", "prefilter", "shelf", "text"]
    assert everything["rank"].tolist() == list(range(1, 61))
    assert (np.diff(everything["influence"]) <= 0).all()
    assert everything["prefilter"].isna().all()
    assert (
        everything.attrs
        == usual.scores().attrs
        == {
            "unit": "nats",
            "sign": "positive: training on the sequence raises the measurement",
            "train_size": 60,
            "curvature": "ekfac",
        }
    )
    scores = usual.scores().sel(query="a").to_series()
    assert everything.set_index("sequence")["influence"].to_dict() == scores.to_dict()
    given = dict(zip([f"s{place}" for place in range(60)], texts(), strict=True))
    for row in everything.itertuples():
        assert row.text == given[row.sequence] and row.shelf == int(row.sequence[1:]) % 3
    assert usual.top("a", 7).equals(everything.head(7))


def test_ties_stand_in_corpus_order(inputs: Inputs, tmp_path: Path) -> None:
    copies = Inputs(tmp_path / "copies")
    copies.base.mkdir()
    copies.model.symlink_to(inputs.model)
    copies.ask("a")
    write_lines(copies.corpus, [{"id": f"c{place}", "shelf": 0, "text": texts()[place % 4]} for place in range(16)])
    frame = copies.run(tmp_path / "run").top("a", 16)
    for _, group in frame.groupby("text", sort=False):
        assert group["influence"].nunique() == 1  # the same text has the same bits wherever it stands
        numbers = group["sequence"].str[1:].astype(int).tolist()
        assert numbers == sorted(numbers)


def test_layers_and_tokens_sum_to_the_total(usual: raylux.Run) -> None:
    scores = usual.scores()
    for query in usual.queries:
        total = scores.sel(query=query)
        size = float(np.sqrt(np.mean(total.to_numpy() ** 2)))
        layers = usual.layer_scores(query)
        assert layers.dims == ("layer", "sequence") and layers.attrs == scores.attrs
        assert float(abs(layers.sum("layer") - total).max()) <= 1e-5 * size
        for row in usual.top(query, 4).itertuples():
            tokens = usual.token_scores(query, row.sequence)
            assert abs(tokens["influence"].sum() - row.influence) <= 1e-5 * size
            assert list(tokens.columns) == ["position", "token_id", "token", "influence"]
            assert tokens["token"].tolist() == row.text.split()
            assert tokens.attrs == scores.attrs


def test_a_contrast_is_the_difference_of_two(inputs: Inputs, tmp_path: Path) -> None:
    prompt = "a monk named"
    write_lines(
        inputs.queries,
        [
            {"id": "one", "prompt": prompt, "completion": "olaf"},
            {"id": "two", "prompt": prompt, "completion": "anna herbs"},
            {"id": "less", "prompt": prompt, "completion": "olaf", "measurement": "loss"},
            {"id": "both", "prompt": prompt, "completion": "olaf", "contrast": "anna herbs", "measurement": "contrast"},
        ],
    )
    run = inputs.run(tmp_path / "run", "query.max_error=0")
    score = {query: run.scores().sel(query=query).to_numpy() for query in run.queries}
    size = np.sqrt(np.mean(score["both"] ** 2))
    assert np.abs(score["both"] - (score["one"] - score["two"])).max() <= 1e-5 * size
    assert np.array_equal(score["less"], -score["one"])
    value = run.measurements["measurement"]
    assert abs(value["both"] - (value["one"] - value["two"])) < 1e-5 and value["less"] == -value["one"] > 0


def test_prefilter_scores_stand_beside_their_own_candidates(filtered: raylux.Run) -> None:
    scores = filtered.scores()
    assert not np.isnan(scores.to_numpy()).any()  # the union is scored for every query
    assert 9 < scores.sizes["sequence"] < 60
    for query in filtered.queries:
        frame = filtered.top(query, 60)
        assert frame["prefilter"].notna().sum() == 9 and (frame["prefilter"].dropna() > 0).all()
        assert len(frame) == scores.sizes["sequence"]


def test_pairs_that_were_not_computed_are_nan(inputs: Inputs, tmp_path: Path) -> None:
    inputs.ask("a")
    inputs.run(tmp_path / "run", *IDF)
    inputs.ask("b")
    run = inputs.run(tmp_path / "run", *IDF)
    scores = run.scores()
    missing = np.isnan(scores.to_numpy())
    own = {query: set(run.top(query, 60).dropna(subset="prefilter")["sequence"]) for query in ("a", "b")}
    assert set(scores["sequence"].to_numpy()[~missing[0]]) == own["a"]
    assert set(scores["sequence"].to_numpy()[~missing[1]]) == own["b"]
    assert missing.any()
    assert set(run.top("a", 60)["sequence"]) == own["a"]


def test_scores_are_read_when_they_are_looked_at(usual: raylux.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    read = Group.read
    monkeypatch.setattr(Group, "read", lambda *args: (log.append(args[1]), read(*args))[1])
    scores = usual.scores()
    assert isinstance(scores, xr.DataArray) and scores.dims == ("query", "sequence")
    assert scores.sizes == {"query": 4, "sequence": 60} and log.count("total") == 0
    scores.sel(query="b", sequence="s30").item()
    assert log.count("total") == 1
    scores.to_numpy()
    assert log.count("total") == 1 + 5  # 60 rows in units of 13


# ---------------------------------------------------------------------------------- unit and documents


def test_raw_scores_are_nats_times_the_train_size(inputs: Inputs, usual: raylux.Run) -> None:
    nats = usual.scores().load()
    raw = inputs.run(usual.folder, "query.max_error=0", "score.unit=raw").scores().load()
    million = inputs.run(usual.folder, "query.max_error=0", "score.train_size=1000000").scores().load()
    inputs.run(usual.folder, "query.max_error=0")
    assert (raw.attrs["unit"], million.attrs["unit"]) == ("raw", "nats")
    assert (nats.attrs["train_size"], million.attrs["train_size"]) == (60, 1_000_000)
    np.testing.assert_allclose(nats.to_numpy(), raw.to_numpy() / 60, rtol=1e-6)
    np.testing.assert_allclose(million.to_numpy(), raw.to_numpy() / 1e6, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "unit"), [("kfac", "nats"), ("diagonal", "nats"), ("identity", "dot"), ("cosine", "cosine")]
)
def test_every_kind_of_curvature_and_its_unit(inputs: Inputs, tmp_path: Path, kind: str, unit: str) -> None:
    run = inputs.run(tmp_path / "run", f"curvature.kind={kind}", "query.max_error=0")
    scores = run.scores()
    assert run.unit == scores.attrs["unit"] == unit and scores.attrs["curvature"] == kind
    values = scores.to_numpy()
    assert np.isfinite(values).all() and values.std() > 0
    if kind == "cosine":
        assert np.abs(values).max() <= 1 + 1e-6
    done = {stage.name: stage.done for stage in run.status()}
    assert all(done[name] for name in ("corpus", "fit", "prefilter", "query", "score")) and not done["report"]


def test_cosine_of_a_sequence_with_itself_is_one(inputs: Inputs, tmp_path: Path) -> None:
    text = texts()[0].split()
    rows = [{"id": "itself", "shelf": 0, "text": " ".join(text)}, {"id": "other", "shelf": 1, "text": texts()[1]}]
    own = Inputs(tmp_path / "own")
    own.base.mkdir()
    own.model.symlink_to(inputs.model)
    write_lines(own.corpus, rows)
    write_lines(own.queries, [{"id": "q", "prompt": text[0], "completion": " ".join(text[1:])}])
    scores = own.run(tmp_path / "run", "curvature.kind=cosine", "query.max_error=0").scores()
    assert abs(scores.sel(query="q", sequence="itself").item() - 1) <= 1e-5
    assert abs(scores.sel(query="q", sequence="other").item()) < 0.999


def test_documents_are_the_sum_of_their_pieces(inputs: Inputs, tmp_path: Path) -> None:
    run = inputs.run(tmp_path / "run", "corpus.max_length=16")
    pieces, documents = run.top("a", 1000), run.top("a", 1000, by="document")
    assert len(pieces) > 100 and len(documents) == 60
    assert pieces["sequence"].str.match(r"s\d+(:\d+)?$").all()
    wanted = pieces.groupby("document")["influence"].sum()
    found = documents.set_index("document")["influence"]
    pd.testing.assert_series_equal(found.sort_index(), wanted.sort_index(), check_names=False)
    assert (np.diff(documents["influence"]) <= 0).all() and documents["rank"].tolist() == list(range(1, 61))
    assert list(documents.columns) == ["rank", "document", "influence", "prefilter", "shelf", "text"]
    assert documents.attrs == pieces.attrs


def test_documents_of_an_uncut_corpus_are_its_sequences(usual: raylux.Run) -> None:
    sequences, documents = usual.top("b", 5), usual.top("b", 5, by="document")
    assert documents["document"].tolist() == sequences["sequence"].tolist()
    assert documents["influence"].tolist() == sequences["influence"].tolist()


def test_a_packed_corpus_has_no_documents(inputs: Inputs, tmp_path: Path) -> None:
    run = inputs.run(tmp_path / "run", "corpus.pack=true", "corpus.max_length=32")
    assert len(run.top("a", 5)) == 5
    with pytest.raises(UserError, match="packed"):
        run.top("a", 5, by="document")


def test_low_rank_keeps_within_the_error_on_every_query(inputs: Inputs, tmp_path: Path) -> None:
    wide = make_inputs(tmp_path / "wide", "llama", hidden_size=48, intermediate_size=96)
    scores = {
        bound: wide.run(tmp_path / str(bound), f"query.max_error={bound}", "query.low_rank=always")
        .scores()
        .to_numpy()
        .astype(float)
        for bound in (0, 0.02, 0.1)
    }
    for bound in (0.02, 0.1):
        manifests = RunFolder(str(tmp_path / str(bound))).units(QUERY).values()
        ranks = [rank for manifest in manifests for chosen in manifest.meta["ranks"] for rank in chosen.values()]
        assert max(ranks) >= 0, "no layer is low rank: nothing is tested"
        off = scores[bound] - scores[0]
        found = np.sqrt(np.mean(off**2, axis=1) / np.mean(scores[0] ** 2, axis=1))
        assert (found <= bound).all() and found.max() > 0, found


def test_attribute_is_the_same_run(inputs: Inputs, usual: raylux.Run) -> None:
    from transformers import AutoModelForCausalLM

    from tests.small import QUERIES, tokenizer

    model = AutoModelForCausalLM.from_pretrained(inputs.model, dtype="float32")
    train = [{"id": f"s{place}", "text": text} for place, text in enumerate(texts())]
    run = raylux.attribute(model, tokenizer(), train, QUERIES, overrides=[*CUT, "query.max_error=0"])
    assert np.array_equal(run.scores().to_numpy(), usual.scores().to_numpy())
    short = raylux.attribute(
        model, tokenizer(), texts()[:9], [("anna bought", "the red")], overrides=["model.device=cpu"]
    )
    assert short.queries == ["0"] and len(short.top("0")) == 9
    # The temporary folder lives as long as anything that is still to be read from it.
    scores = raylux.attribute(model, tokenizer(), texts()[:9], [("anna bought", "the red")]).scores()
    assert np.isfinite(scores.to_numpy()).all()


# ------------------------------------------------------------------------------------ status and stages


def test_stages_one_by_one_and_what_is_missing(inputs: Inputs, filtered: raylux.Run, tmp_path: Path) -> None:
    config = inputs.config(tmp_path / "run", "query.max_error=0", *IDF)
    done = []
    for stages in (("corpus", "fit"), ("prefilter",), ("query",), ("score",), ("report",)):
        run = raylux.api.run_stages(config, stages, "here.yaml", quiet=True)
        done += stages
        status = {stage.name: stage for stage in run.status()}
        assert [name for name in status if status[name].done] == done
        assert all(status[name].command == f"raylux {'fit' if name == 'corpus' else name} here.yaml" for name in status)
    assert differing(contents(tmp_path / "run"), contents(filtered.folder)) == []


@pytest.mark.parametrize("prefilter", [(), IDF], ids=["all", "idf"])
def test_status_of_scores_that_are_not_complete(inputs: Inputs, tmp_path: Path, prefilter: tuple[str, ...]) -> None:
    def scored() -> bool:
        return next(stage.done for stage in raylux.open_run(tmp_path / "run").status() if stage.name == "score")

    with pytest.MonkeyPatch.context() as patch:
        Interrupt(patch, GradientWorker, "score_unit", 3, False)
        with pytest.raises(KeyboardInterrupt):
            inputs.run(tmp_path / "run", *prefilter)
    assert not scored()
    inputs.run(tmp_path / "run", *prefilter)
    assert scored()
    inputs.ask("b")  # a shorter query file takes nothing away
    inputs.run(tmp_path / "run", *prefilter)
    assert scored()
