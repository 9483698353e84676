"""Classifiers of texts: whole runs against brute force in float64, equal bits, and one line for what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from transformers import BertModel

import raylux
from raylux.api import STAGES, run_stages
from raylux.cli import main
from raylux.config import Config
from raylux.cost import calibrate
from raylux.errors import UserError
from raylux.store import CorpusReader, RunFolder
from raylux.verification import VerifyOptions
from tests import test_exact as exact
from tests.apart import processes
from tests.classifiers import ARCHITECTURES, CLASSES, CONTEXT, classifier, texts, tokenizer
from tests.reference import Example, Question, difference, gradients, question_gradient
from tests.small import contents, differing, write_lines
from tests.test_plan_command import RATES

TRAIN = texts(20)
ASKED: tuple[dict[str, Any], ...] = (
    {"id": "good", "text": "a warm film", "label": "good"},
    {"id": "bad-not-good", "text": "the plot was dull and slow", "label": 0, "contrast": 2, "measurement": "contrast"},
    {"id": "loss", "text": "not very funny", "label": "fair", "measurement": "loss"},
)


def example(text: str, number: int) -> Example:
    ids = tokenizer()(text)["input_ids"]
    return Example(ids, [number] + [-100] * (len(ids) - 1))


QUESTIONS = (
    Question(((1.0, example("a warm film", 2)),)),
    Question(((1.0, example("the plot was dull and slow", 0)), (-1.0, example("the plot was dull and slow", 2)))),
    Question(((-1.0, example("not very funny", 1)),)),
)


def attribute(model: Any, *overrides: str, train: Sequence[Any] = TRAIN, queries: Sequence[Any] = ASKED) -> raylux.Run:
    return raylux.attribute(model, tokenizer(), train, queries, overrides=[*exact.PARTS, *overrides])


# -------------------------------------------------------------------------------------- brute force


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_autograd_and_dense_matrices(name: str) -> None:
    """Padded batches against one text at a time without padding; labels are drawn from the model."""
    model = classifier(name)
    run = attribute(model, "score.layers=true")
    layers = run.settings["model"]["layers"]
    assert len(layers) >= 5 and layers[-1].split(".")[0] in ("classifier", "score")
    exact.check(model, run, QUESTIONS)
    logits = model(input_ids=torch.tensor([QUESTIONS[0].parts[0][1].tokens])).logits[0]
    assert run.measurements.loc["good", "measurement"] == pytest.approx(float(logits.log_softmax(0)[2]), abs=1e-12)


@pytest.mark.parametrize("kind", ["kfac", "eshampoo"])
def test_other_kinds(kind: str) -> None:
    """A K-FAC factor of a layer above the pooling counts one row for each text, not one for each token."""
    model = classifier("roberta")
    exact.check(model, attribute(model, f"curvature.kind={kind}", "score.layers=true", "score.token_top=0"), QUESTIONS)


def test_labels_of_the_data_and_named_layers() -> None:
    model = classifier("bert")
    run = attribute(model, "fit.labels=dataset", "model.layers=['*.pooler.dense','classifier','*.0.output.dense']")
    assert run.settings["model"]["layers"] == ["bert.encoder.layer.0.output.dense", "bert.pooler.dense", "classifier"]
    exact.check(model, run, QUESTIONS)


def test_shares_of_tokens_sum_to_the_score() -> None:
    run = attribute(classifier("roberta"), "score.token_top=4", queries=ASKED[:1])
    for row in run.top("good", 4).to_dict("records"):
        shares = run.token_scores("good", row["sequence"])
        assert shares["influence"].sum() == pytest.approx(row["influence"], abs=1e-12)
        assert shares["token"].iloc[[0, -1]].tolist() == ["<s>", "</s>"]


def dense(model: Any, layers: Sequence[str], examples: Sequence[Example]) -> Tensor:
    """Σ_i J'HJ over all layers together, a logit at a time."""
    modules = [model.get_submodule(name) for name in layers]
    weights = [p.requires_grad_(True) for module in modules for p in (module.weight, module.bias)]
    total: Any = 0.0
    for one in examples:
        logits = model(input_ids=torch.tensor(np.asarray(one.tokens, np.int64))[None]).logits[0]
        rows = []
        for x in logits:
            found = torch.autograd.grad(x, weights, retain_graph=True)
            pairs = zip(found[::2], found[1::2], strict=True)
            rows.append(torch.cat([torch.cat([w, b[:, None]], 1).reshape(-1) for w, b in pairs]))
        p, jacobian = logits.detach().softmax(0), torch.stack(rows)
        total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    for weight in weights:
        weight.requires_grad_(False)
    return total


def flat(found: Mapping[str, np.ndarray], layers: Sequence[str]) -> Tensor:
    return torch.cat([torch.as_tensor(found[name]).reshape(-1) for name in layers])


@pytest.fixture(scope="module")
def solved() -> tuple[Any, raylux.Run]:
    """Of two layers, one on either side of the pooling."""
    model = classifier("bert")
    solver = ["curvature.solver=pcg", "curvature.damping=1.0", "curvature.tolerance=1e-11", "curvature.iterations=150"]
    layers = "model.layers=['*.1.output.dense','classifier']"
    return model, attribute(model, *solver, layers, "fit.sequences=6", "score.token_top=0")


def test_better_solves_are_those_of_the_dense_gauss_newton_matrix(solved: tuple[Any, raylux.Run]) -> None:
    model, run = solved
    layers = run.settings["model"]["layers"]
    fitted = exact.fitted_on(run)
    g = dense(model, layers, fitted) / len(fitted)
    asked = torch.stack([flat(question_gradient(model, layers, question), layers) for question in QUESTIONS])
    ours = torch.stack([-flat(gradients(model, layers, row), layers) for row in exact.corpus_of(run)])
    expected = torch.linalg.solve(g + torch.eye(len(g), dtype=g.dtype), asked.T).T @ ours.T
    assert difference(run.scores().to_numpy() * run.train_size, expected) < 1e-8


def test_what_better_solves_predict_is_what_is_measured(solved: tuple[Any, raylux.Run]) -> None:
    """At the proximal optimum, which is found without any of raylux's curvature."""
    frame = raylux.verify(solved[1], VerifyOptions(queries=3, top=1, random=1, products=0, whole=False)).verification()
    assert frame["resolved"].all()
    size = float(np.sqrt((frame["predicted"] ** 2).mean()))
    assert np.abs(frame["measured"] - frame["predicted"]).max() <= 5e-3 * size


# ---------------------------------------------------------------------------------- bits and padding


def test_drawn_classes_and_scores_do_not_depend_on_batches() -> None:
    """Other batches mean other padding, which a text's numbers do not feel, and the same draws."""
    model = classifier("roberta")
    runs = [attribute(model, f"engine.batch_tokens={size}", "score.token_top=0") for size in (16, 400)]
    drawn = [np.stack([row.labels[0] for row in exact.fitted_on(run)]) for run in runs]
    others = np.concatenate([row.labels[1:] for row in exact.fitted_on(runs[0])])
    assert set(drawn[0]) == set(range(len(CLASSES))) and set(others) == {-100}
    assert np.array_equal(*drawn)
    assert difference(runs[1].scores(), runs[0].scores()) <= 1e-11


def test_a_score_has_the_same_bits_whichever_texts_are_scored_beside_it() -> None:
    model = classifier("bert", torch.float32)
    every = attribute(model, "score.token_top=0")
    few = attribute(model, "prefilter.kind=idf", "prefilter.top=5", "score.token_top=0")
    kept = few.scores()["sequence"].values
    assert 5 <= len(kept) < len(TRAIN)
    assert np.array_equal(few.scores().to_numpy(), every.scores().sel(sequence=kept).to_numpy())


def test_long_texts_are_cut_as_in_training_and_short_ones_are_kept() -> None:
    long = " ".join(["funny"] * 60)
    run = attribute(
        classifier("roberta"), train=[(long, "good"), ("rain", "bad"), {"input_ids": [0], "label": 1}],
        queries=[(long, "good")],
    )  # fmt: skip
    rows = CorpusReader(RunFolder(run.folder)).rows([0, 1, 2])
    assert [len(row.tokens) for row in rows] == [CONTEXT, 3, 1]
    assert rows[0].tokens[[0, -1]].tolist() == [0, 2]
    manifest = RunFolder(run.folder).manifest("corpus", "corpus")
    assert manifest.meta["dropped"] == {"texts_cut": 1, "tokens": 62 - CONTEXT}
    assert run.top("0", 1)["label"].tolist() == ["good"] and run.top("0", 1)["text"].tolist() == [long]


# ----------------------------------------------------------------------------- config and command line


class Inputs:
    """Files of a run under a folder."""

    def __init__(self, base: Path, model: Path) -> None:
        self.base = base
        shutil.copytree(model, base / "model")
        self.train([{"text": text, "stars": label} for text, label in TRAIN])
        self.ask(*ASKED)

    def train(self, rows: Sequence[Mapping[str, Any]]) -> None:
        write_lines(self.base / "train.jsonl", rows)

    def ask(self, *queries: Mapping[str, Any]) -> None:
        write_lines(self.base / "queries.jsonl", queries)

    def sections(self, **more: Mapping[str, Any]) -> dict[str, Any]:
        sections: dict[str, Any] = {
            "run": {"folder": str(self.base / "run")},
            "model": {"path": str(self.base / "model"), "device": "cpu"},
            "corpus": {"path": str(self.base / "train.jsonl"), "label": "stars", "max_length": CONTEXT},
            "queries": {"path": str(self.base / "queries.jsonl")},
            "engine": {"backend": "local"},
        }
        for name, keys in more.items():
            sections[name] = {**sections[name], **keys}
        return sections

    def file(self) -> str:
        path = self.base / "config.yaml"
        path.write_text(yaml.safe_dump(self.sections()), encoding="utf-8")
        return str(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "model"
    classifier("roberta", torch.float32).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def inputs(saved: Path, tmp_path: Path) -> Inputs:
    return Inputs(tmp_path, saved)


def test_every_command_serves_a_classifier(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYLUX_CACHE", str(inputs.base / "cache"))
    monkeypatch.setattr(calibrate, "measure", lambda *_: RATES)
    config = inputs.file()
    assert main(["models", config, "--query", "bad-not-good"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "classifier.out_proj" in shown and "'bad' given all of them" in shown and "'good' given all of them" in shown
    assert main(["plan", config, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["device_hours"] > 0
    assert main(["doctor", config]) == 0
    assert "FAIL" not in capsys.readouterr().out
    assert main(["run", config]) == 0
    capsys.readouterr()
    assert main(["top", str(inputs.base / "run"), "--query", "good", "-k", "2"]) == 0
    page = (inputs.base / "run" / "report" / "index.html").read_text(encoding="utf-8")
    assert "a warm film" in page and "<bdi>good</bdi>" in page


def test_workers_give_the_bits_of_one_process(inputs: Inputs) -> None:
    """Of an encoder, in several units of the fit and of scores."""
    cut = ("fit.unit_tokens=40", "score.unit_size=5", "engine.batch_tokens=64", "score.layers=true")
    over = ("engine.backend=ray", "engine.workers=2", "engine.shards=1")

    def run(name: str, *how: str) -> dict[str, np.ndarray]:
        folder = inputs.base / name
        run_stages(Config.parse(inputs.sections(), [*cut, *how, f"run.folder={folder}"]), STAGES[:-1], quiet=True)
        assert len(RunFolder(str(folder)).committed("score")) > 1
        return contents(folder)

    usual = run("local")
    with processes():
        assert differing(run("processes", *over), usual) == []
    assert usual["total good"].size == len(TRAIN)


def spoilt(inputs: Inputs, **keys: Any) -> None:
    path = inputs.base / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **keys}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda i: i.train([{"text": "rain"}]), "line 1: no class in the field 'stars'; fields present: text"),
        (lambda i: i.train([{"text": "rain", "stars": 3}]), "line 1: the class in 'stars': 3 is no class of the model"),
        (lambda i: i.train([{"text": "rain", "stars": "great"}]), "'great' is no class of the model; classes: bad"),
        (lambda i: i.train([{"text": "rain", "stars": True}]), "must be a class's name or number, not True"),
        (lambda i: i.train([{"input_ids": [0] * 50, "stars": 1}]), "50 input_ids, more than corpus.max_length = 40"),
        (lambda i: i.train([{"input_ids": [0], "labels": [0], "stars": 1}]), "'labels' are for language models"),
        (lambda i: i.ask({"text": "rain"}), "query 0: no 'label'"),
        (lambda i: i.ask({"label": 0}), "has 'text' and 'label'"),
        (lambda i: i.ask({"text": "rain", "label": 7}), "query 0: 'label': 7 is no class of the model; it has 0 to 2"),
        (lambda i: i.ask({"prompt": "rain", "label": 1}), "'prompt' does not go with a classifier"),
        (
            lambda i: i.ask({"text": "rain", "label": 1, "contrast": "fair", "measurement": "contrast"}),
            "the same class",
        ),
        (lambda i: spoilt(i, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}), "for regression or for several"),
        (lambda i: spoilt(i, problem_type="multi_label_classification"), "several labels at once (problem_type"),
        (lambda i: spoilt(i, id2label={"0": "x", "1": "x", "2": "y"}), "gives two classes the same name"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_one_line(inputs: Inputs, spoil: Any, says: str) -> None:
    spoil(inputs)
    with pytest.raises(UserError) as caught:
        run_stages(Config.parse(inputs.sections()), quiet=True)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (inputs.base / "run").exists()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"corpus": {"label": None}}, "no class in the field 'label'"),
        ({"corpus": {"pack": True}}, "a classifier reads one document at a time"),
        ({"model": {"task": "causal-lm"}}, "'RobertaForSequenceClassification' is not a causal language model"),
        ({"model": {"adapter": "x/y"}}, "adapters are served on causal language models alone"),
        ({"corpus": {"max_length": 41}}, "longer than the model's context of 40 tokens"),
    ],
)
def test_configs_that_do_not_fit_a_classifier(inputs: Inputs, keys: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        run_stages(Config.parse(inputs.sections(**keys)), quiet=True)


def test_a_checkpoint_without_a_head_is_none(inputs: Inputs) -> None:
    encoder = BertModel(classifier("bert").config)
    encoder.save_pretrained(inputs.base / "model")
    with pytest.raises(UserError, match="'BertModel' is not a causal language model, nor a classifier"):
        run_stages(Config.parse(inputs.sections()), quiet=True)
    sections = inputs.sections(model={"task": "classification"})
    with pytest.raises(UserError, match="has no weights for classifier\\.bias, classifier\\.weight"):
        run_stages(Config.parse(sections), quiet=True)


def test_a_classifier_that_ends_by_padding_needs_to_know_it(inputs: Inputs) -> None:
    classifier("gpt2", pad_token_id=None).save_pretrained(inputs.base / "model")
    with pytest.raises(UserError, match="no pad_token_id, by which a classifier of type 'gpt2' finds the end"):
        run_stages(Config.parse(inputs.sections()), quiet=True)


def test_a_language_model_has_no_classes() -> None:
    with pytest.raises(UserError, match="'label' does not go with a causal language model"):
        exact.attribute(exact.gpt2(), queries=[{"prompt": "anna", "completion": "lives", "label": "good"}])
    with pytest.raises(UserError, match=r"corpus.label = 'stars' is for classifiers"):
        exact.attribute(exact.gpt2(), "corpus.label=stars")
    with pytest.raises(UserError, match="is no record with text and label"):
        attribute(classifier("bert"), queries=["a warm film"])
