"""``raylux evaluate``: what is measured is what training by hand says; the same bits however the command goes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from transformers import BertConfig, BertForSequenceClassification

import raylux
from raylux.batches import TokenRow
from raylux.cli import main
from raylux.config import Config
from raylux.engine.progress import Reporter
from raylux.errors import UserError
from raylux.evaluate import train
from raylux.evaluation import evaluate, retraining
from raylux.evaluation import inputs as reading
from raylux.evaluation.bench import Bench, Found
from raylux.evaluation.estimators import Scored
from raylux.evaluation.judging import removal
from raylux.evaluation.outcome import Outcome
from raylux.evaluation.retraining import Retraining, Way
from raylux.evaluation.singles import loo, singled_out
from raylux.store import RunFolder
from tests import classifiers
from tests.interrupts import Interrupt
from tests.small import SEQUENCES, Inputs, make_inputs, texts, write_lines

ESTIMATORS = {"ekfac": [], "dot": ["curvature.kind=identity"], "words": ["bm25"], "chance": ["random"]}
SMALL = {
    "tests": ["lds", "removal", "loo", "prefilter"], "estimators": ESTIMATORS, "epochs": 2, "warm_epochs": 1,
    "batch_tokens": 512, "subsets": 4, "seeds": 2, "remove": 4, "queries": 1, "sequences": 4, "top": 3, "draws": 100,
}  # fmt: skip
WRONG = {3, 11, 20, 41}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    found = make_inputs(tmp_path_factory.mktemp("inputs"))
    marks = {5: "a", 17: "a", 30: "b"}
    write_lines(
        found.corpus,
        [
            {"id": f"s{place}", "shelf": place % 3, "text": text, "asked": marks.get(place), "wrong": place in WRONG}
            for place, text in enumerate(texts())
        ],
    )
    return found


def config(base: Inputs, folder: Path, *overrides: str, **said: Any) -> Config:
    """Of a tiny evaluation in process."""
    evaluated = {**SMALL, "folder": str(folder), **said}
    sections = base.sections(folder / "run", evaluate=evaluated, fit={"sequences": 24})
    return Config.parse(sections, overrides)


def figures(outcome: Outcome) -> str:
    """Everything that must not depend on how the command went: all but times and places."""
    record = outcome.record()
    del record["seconds"]
    return json.dumps(record, sort_keys=True)


@pytest.fixture(scope="module")
def usual(base: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return evaluate(config(base, tmp_path_factory.mktemp("usual") / "evaluate"))


def test_every_estimator_has_every_figure(usual: Outcome) -> None:
    frame = usual.frame()
    wanted = {
        ("lds", "LDS"), ("removal", "proponents"), ("removal", "opponents"), ("loo", "cold"), ("loo", "warm"),
        ("prefilter", "idf, 6"), ("prefilter", "tfidf, 6"), ("prefilter", "bm25, 6"),
    }  # fmt: skip
    assert {(row.test, row.figure) for row in frame.itertuples()} == wanted
    assert all(set(part["estimator"]) == set(ESTIMATORS) for _, part in frame.groupby(["test", "figure"]))
    assert np.isfinite(frame["value"]).all() and (frame["low"] <= frame["high"]).all()
    own = frame[frame["estimator"] == "ekfac"]
    assert (own[["above", "above_low", "above_high"]] == 0).all(axis=None), "differences are to the first"
    words = frame[(frame["figure"] == "bm25, 6") & (frame["estimator"] == "words")]
    assert words["value"].item() == 1.0, "a prefilter keeps its own best"
    assert {"ekfac", "dot"} == {name for name, seconds in usual.seconds.items() if seconds > 0}


def test_what_is_written_is_what_was_found(usual: Outcome) -> None:
    report = Path(usual.folder) / "report"
    pd.testing.assert_frame_equal(pd.read_csv(report / "evaluate.csv"), usual.frame())
    assert json.loads((report / "evaluate.json").read_text(encoding="utf-8")) == usual.record()
    page = (report / "index.html").read_text(encoding="utf-8")
    assert page.count("<svg") == len(usual.verdicts) + len(usual.curves)
    assert "<script" not in page and "default-src 'none'" in page
    for verdict in usual.verdicts:
        for name in ESTIMATORS:
            assert f'<td>{name}</td><td class="n">{verdict.found.lds[name]}</td>' in page


def test_the_same_command_again_computes_nothing(base: Inputs, usual: Outcome) -> None:
    folder = Path(usual.folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("ledger/**/*.json")}
    again = evaluate(config(base, folder))
    assert figures(again) == figures(usual)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("ledger/**/*.json")} == before


def test_killed_and_interrupted_it_goes_on_to_the_same_bits(
    base: Inputs, usual: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is killed while it trains; the next one is interrupted; the third comes to the end."""
    folder = tmp_path / "evaluate"
    trained = folder / "ledger" / "trained"
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config(base, folder).dump()), encoding="utf-8")
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "raylux.cli", "evaluate", str(file)], stdout=said, stderr=said
        )
        deadline = time.monotonic() + 240
        while len(list(trained.glob("*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert 3 <= len(list(trained.glob("*.json"))) < 20, (tmp_path / "said").read_text(encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in trained.glob("*.json")}
    Interrupt(monkeypatch, retraining, "answers_without", 4, after=False)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(base, folder))
    assert figures(evaluate(config(base, folder))) == figures(usual)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was there is read"


def test_over_ray_the_bits_are_the_same(
    base: Inputs, usual: Outcome, tmp_path: Path, ray_cluster: dict[str, Any]
) -> None:
    folder = tmp_path / "evaluate"
    # The runs of the estimators have tests of their own over Ray.
    shutil.copytree(Path(usual.folder) / "runs", folder / "runs")
    found = evaluate(config(base, folder, "engine.backend=ray", "engine.workers=1"))
    assert figures(found) == figures(usual)


@pytest.fixture(scope="module")
def bench(base: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Two estimators of drawn scores over models that are really trained."""
    found = reading.read(config(base, tmp_path_factory.mktemp("bench") / "evaluate", seeds=1, remove=5, queries=2))
    random = np.random.default_rng(0)
    scored = {
        name: Scored(random.normal(size=(4, SEQUENCES)), unit, SEQUENCES, 1.0)
        for name, unit in (("ekfac", "nats"), ("dot", "dot"))
    }
    folder = RunFolder(found.folder.path)
    return Bench(found, scored, Retraining(found, Reporter(folder, quiet=True)), Found())


def trained_without(bench: Bench, rows: np.ndarray, way: Way = "cold") -> np.ndarray:
    return retraining.answers_without(bench.retraining._training, rows, 0, way)


def test_removal_is_the_difference_of_two_trainings(bench: Bench) -> None:
    removal(bench)
    proponents, opponents = bench.found.verdicts[-2:]
    whole = trained_without(bench, np.zeros(0, np.int64))
    for name, scores in bench.scores.items():
        for verdict, sign in ((proponents, -1), (opponents, 1)):
            moved = [
                sign * (trained_without(bench, np.sort(np.argsort(sign * scores[query])[:5]))[query] - whole[query])
                for query in range(2)
            ]
            assert verdict.found.lds[name].value == pytest.approx(np.mean(moved), abs=1e-12)
    assert abs(proponents.found.lds["ekfac"].value) > 1e-4


def test_leaving_out_one_is_judged_by_the_order_of_what_it_changes(bench: Bench) -> None:
    bench.retraining.scored_model()
    loo(bench)
    for verdict, warm in zip(bench.found.verdicts[-2:], (False, True), strict=True):
        assert verdict.figure == ("warm" if warm else "cold")
        names = bench.inputs.folder.committed("trained")
        assert len([name for name in names if name.startswith(f"{verdict.figure}-1-")]) == 4
    rows = _left_out(bench)
    measured = np.stack([trained_without(bench, np.array([row]), "warm") for row in rows])
    for name, scores in bench.scores.items():
        expected = [spearmanr(-scores[query][rows], measured[:, query]).statistic for query in range(4)]
        assert bench.found.verdicts[-1].found.lds[name].value == pytest.approx(np.mean(expected), abs=1e-12)
    sizes = bench.found.notes["loo, warm"]
    assert "ekfac" in sizes and "dot" not in sizes, "only nats have a size"


def _left_out(bench: Bench) -> np.ndarray:
    rows = singled_out(bench.scores, 4, bench.draw(2))
    best = {int(np.argmax(bench.scores["ekfac"][query])) for query in range(2)}
    assert best <= set(rows.tolist()) and len(set(rows.tolist())) == 4
    return rows


def test_planted_and_mislabelled_sequences_are_counted(base: Inputs, tmp_path: Path) -> None:
    said = {"estimators": {"words": "bm25", "chance": "random"}, "against": "chance"}
    found = evaluate(config(base, tmp_path / "one", tests=["planted"], marks="asked", **said))
    assert [verdict.figure for verdict in found.verdicts] == ["recall@3", "MRR"]
    assert "2 of 4 queries have marked sequences, 1.5 on average" in found.notes["planted"]
    read = reading.read(config(base, tmp_path / "one", tests=["planted"], marks="asked", **said))
    assert [np.flatnonzero(row).tolist() for row in reading.relevant(read)] == [[5, 17], [30], [], []]
    found = evaluate(config(base, tmp_path / "two", tests="mislabelled", marks="wrong", **said))
    assert 0 <= found.verdicts[0].found.lds["words"].low <= found.verdicts[0].found.lds["words"].high <= 1
    assert "4 of 60 sequences are mislabelled" in found.notes["mislabelled"]


def test_a_model_of_its_own_is_trained_first_and_scored(base: Inputs, tmp_path: Path) -> None:
    """From config.json and the tokenizer alone; the model that is kept answers as the one that was measured."""
    bare = tmp_path / "bare"
    shutil.copytree(base.model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    said = {"scored": "trained", "tests": ["loo"], "estimators": {"dot": "curvature.kind=identity"}}
    place = tmp_path / "evaluate"
    with pytest.raises(UserError, match=r"holds no weights; evaluate\.scored=trained makes some"):
        reading.read(config(base, place, f"model.path={bare}", **{**said, "scored": "given"}))
    found = evaluate(config(base, place, f"model.path={bare}", **said))
    assert found.about["model"].endswith("bare, trained here")
    store = RunFolder(str(place))
    (kept,) = store.units("model").values()
    (folder,) = (place / "model").iterdir()
    trained = store.units("trained")
    (whole,) = (name for name in trained if name.startswith("cold-0-") and name.endswith("-0"))
    assert kept.meta["values"] == trained[whole].meta["values"] and kept.unit == folder.name
    shutil.rmtree(folder)
    again = evaluate(config(base, place, f"model.path={bare}", **said))
    assert figures(again) == figures(found) and (folder / "model.safetensors").is_file()


def labelled(base: Inputs) -> list[dict[str, Any]]:
    """A classifier, texts with a class of which one is wrong, and a query; returns the texts."""
    classifiers.classifier("bert", torch.float32).save_pretrained(base.model)
    classifiers.tokenizer().save_pretrained(base.model)
    rows = [
        {"id": f"t{place}", "text": text, "label": label} for place, (text, label) in enumerate(classifiers.texts(16))
    ]
    text = {"text": "a warm film", "wrong": False, "label": "good"}
    rows += [{**text, "id": "right"}, {**text, "id": "wrong", "label": "bad", "wrong": True}]
    write_lines(base.corpus, rows)
    write_lines(base.queries, [{"id": "q", "text": "a warm film", "label": "good"}])
    return rows


def of_labelled(base: Inputs, folder: Path, **said: Any) -> Config:
    chosen = {"estimators": {"dot": "curvature.kind=identity"}, "marks": "wrong", "tests": ["mislabelled"], **said}
    sections = base.sections(folder, evaluate={**SMALL, **chosen})
    sections["corpus"] |= {"keep": [], "max_length": 32}
    return Config.parse(sections)


def test_a_classifier_is_held_against_what_is_marked(tmp_path: Path) -> None:
    base = Inputs(tmp_path)
    rows = labelled(base)
    found = evaluate(of_labelled(base, tmp_path / "run"))
    (run,) = (tmp_path / "run-evaluate" / "runs").iterdir()
    wrong = [row["id"] == "wrong" for row in rows]
    suspicion = -raylux.open_run(run).scores().sel(query="q", sequence=[row["id"] for row in rows]).to_numpy()
    assert found.verdicts[0].found.lds["dot"].value == pytest.approx(roc_auc_score(wrong, suspicion), abs=1e-12)
    own = raylux.open_run(run).self_influence()["self_influence"]
    assert found.verdicts[0].found.lds["dot, self"].value == pytest.approx(roc_auc_score(wrong, own), abs=1e-12)
    assert "1 of 18 sequences are mislabelled" in found.notes["mislabelled"]


def test_a_classifier_is_trained_scored_and_trained_again_without_a_text(tmp_path: Path) -> None:
    base = Inputs(tmp_path)
    rows = labelled(base)
    said = {"scored": "trained", "tests": ["mislabelled", "loo", "removal"], "sequences": 3, "seeds": 1}
    chosen = of_labelled(base, tmp_path / "run", **said)
    found = evaluate(chosen)
    assert [verdict.figure for verdict in found.verdicts] == ["AUC", "cold", "warm", "proponents", "opponents"]
    (folder,) = (tmp_path / "run-evaluate" / "model").iterdir()
    (run,) = (tmp_path / "run-evaluate" / "runs").iterdir()
    kept = BertForSequenceClassification.from_pretrained(folder).eval()
    tokens = classifiers.tokenizer()("a warm film", return_tensors="pt").input_ids
    with torch.no_grad():
        log_p = kept(input_ids=tokens).logits.log_softmax(1)[0]
    (unit,) = RunFolder(str(tmp_path / "run-evaluate")).units("model").values()
    good = classifiers.CLASSES.index("good")
    assert unit.meta["values"] == pytest.approx([float(log_p[good])], abs=1e-5), "it answers as what was measured"
    suspicion = -raylux.open_run(run).scores().sel(query="q", sequence=[row["id"] for row in rows]).to_numpy()
    wrong = [row["id"] == "wrong" for row in rows]
    assert found.verdicts[0].found.lds["dot"].value == pytest.approx(roc_auc_score(wrong, suspicion), abs=1e-12)
    # Without its best texts by hand: the same model, recipe and seed.
    read = reading.read(chosen)
    best = np.sort(np.argsort(suspicion)[:4])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = BertForSequenceClassification(BertConfig.from_pretrained(base.model)).requires_grad_(True)
        weights = np.ones(len(rows))
        weights[best] = 0
        corpus = [TokenRow(*read.sequences.row(place)) for place in range(len(rows))]
        train(other, corpus, read.recipe, 0, weights)
    with torch.no_grad():
        after = other.eval()(input_ids=tokens).logits.log_softmax(1)[0, good]
    fell = found.verdicts[3].found.lds["dot"].value
    assert fell == pytest.approx(float(log_p[good] - after), abs=1e-5) and abs(fell) > 1e-4


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"estimators": {}}, "evaluate.estimators: none is named"),
        ({"tests": ["lsd"]}, "Input should be 'lds', 'removal'"),
        ({"tests": []}, "at least 1 item"),
        ({"subsets": 3}, "greater than or equal to 4"),
        ({"sequences": 100}, "the corpus has 60 sequences, 100 are needed"),
        ({"remove": 31}, "evaluate.remove = 31: the corpus has 60 sequences, 62 are needed"),
        ({"share": 0.001}, "that is none, or all"),
        ({"against": "pcg"}, "evaluate.against = 'pcg': no such estimator; one of ekfac, dot, words, chance"),
        ({"estimators": {"one": "bm24"}}, "'one': 'bm24' is neither section.key=value nor one of idf, tfidf, bm25"),
        ({"estimators": {"one": "curvature.kind=ekfca"}}, "evaluate.estimators 'one': 'curvature.kind'"),
        ({"estimators": {"one": "query.carried_from=runs/two"}}, "evaluate.estimators 'one': with query.carried_from"),
        ({"estimators": {"one": "corpus.limit=3"}}, "'one': corpus.limit is the same for all"),
        ({"estimators": {"a/b": "bm25"}}, "String should match pattern"),
        ({"tests": ["planted"]}, "planted needs evaluate.marks"),
        ({"tests": ["planted"], "marks": "colour"}, "the field 'colour' that corpus.keep or evaluate.marks names"),
        ({"tests": ["planted"], "marks": "wrong"}, "no query's id is the mark of any sequence"),
        ({"tests": ["mislabelled"], "marks": "shelf"}, "mislabelled wants true and false there, not 2"),
        ({"start": "OTHER"}, "weights of another architecture than model.path's ('"),
        ({"start": "/nowhere/at/all"}, "no such file or folder"),
        ({"rate": 0.0}, "greater than 0"),
    ],
)  # fmt: skip
def test_bad_input_is_said_in_a_line_before_anything_is_written(
    base: Inputs, tmp_path: Path, said: dict[str, Any], line: str
) -> None:
    if said.get("start") == "OTHER":
        said = {"start": str(make_inputs(tmp_path / "other", "gpt2").model)}
    with pytest.raises(UserError) as error:
        evaluate(config(base, tmp_path / "evaluate", **said))
    assert line in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "evaluate").exists()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.dtype=bfloat16", "too coarse to be trained; set model.dtype=float32"),
        ("model.adapter=ADAPTER", "a model with an adapter cannot be trained by the recipe"),
    ],
)
def test_a_model_that_the_recipe_cannot_train_is_refused(
    base: Inputs, tmp_path: Path, override: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raylux.modelfiles.find_adapter", lambda setting: None)
    with pytest.raises(UserError, match=line):
        reading.read(config(base, tmp_path / "evaluate", override))


def test_a_run_folder_is_no_place_for_it(base: Inputs, tmp_path: Path) -> None:
    base.run(tmp_path / "run", "curvature.kind=identity")
    with pytest.raises(UserError, match=r"holds a run; choose another evaluate\.folder"):
        reading.read(config(base, tmp_path / "run"))


def test_the_command_prints_what_was_found(
    base: Inputs, usual: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config(base, Path(usual.folder)).dump()), encoding="utf-8")
    assert main(["evaluate", str(file), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == usual.record()
    assert main(["evaluate", str(file), "--format", "csv", "evaluate.tests=lds"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("test,figure,estimator,value,low,high,above")
    assert main(["evaluate", str(file)]) == 0
    out = capsys.readouterr().out
    assert "lds: LDS" in out and "prefilter: bm25, 6" in out and f"page: {usual.folder}/report/index.html" in out
    assert main(["evaluate", str(file), "evaluate.subsets=2"]) == 2
    assert capsys.readouterr().err.startswith("raylux: error: ")
