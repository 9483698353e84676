"""I_pert: the gradient of a score by a sequence's inputs, against finite differences of scores and of retraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import raylux
from jobs.digits.data import Digits
from jobs.digits.removals import newton
from raylux.cli import main
from raylux.errors import MissingStageError, UserError
from raylux.evaluate.datamodel import pearson
from tests import reference
from tests import test_exact as exact
from tests import test_modules as modules
from tests.architectures import build
from tests.classifiers import classifier
from tests.classifiers import texts as labelled_texts
from tests.classifiers import tokenizer as classifier_tokenizer
from tests.reference import Example, difference

STEP = 1e-5


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_it_is_the_finite_difference_of_the_score_by_each_feature(name: str) -> None:
    model, train = modules.make(name), modules.data(name, 6)
    run = modules.attribute(model, train, [train[0]], "curvature.kind=gauss_newton", "curvature.damping=0.5")
    (query,), names = run.queries, run.sequences["sequence"].tolist()
    found = raylux.perturb(run, query, [names[4]])[0]
    x, label = train[4]
    assert found.gradient.shape == found.inputs.shape == tuple(x.shape)
    assert difference(found.inputs, x) == 0
    assert found.influence == pytest.approx(float(run.scores()[0, 4]), rel=1e-9)
    g = modules.dense(model, [x for x, _ in train])
    asked = torch.as_tensor(modules.joined(modules.gradients(model, *train[0])))
    solved = torch.linalg.solve(g + 0.5 * torch.eye(len(g), dtype=g.dtype), asked).numpy()
    wanted = np.zeros(x.numel())
    for place in range(x.numel()):
        moved = [x.clone(), x.clone()]
        for one, step in zip(moved, (STEP, -STEP), strict=True):
            one.view(-1)[place] += step
        up, down = (float(solved @ modules.joined(modules.gradients(model, one, label))) for one in moved)
        wanted[place] = (up - down) / (2 * STEP) / len(train)
    assert difference(found.gradient.ravel(), wanted) < 1e-7
    assert list(found.table["gradient"]) == found.gradient.ravel().tolist()


def embedded_differences(model: Any, example: Example, score: Any) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of ``score()`` by some entries of the word embeddings of an example, [T, 3], and the embeddings."""
    module = model.get_input_embeddings()
    places = [(t, d) for t in range(len(example.tokens)) for d in (0, 5, 11)]
    found, seen = [], []
    for t, d in places:
        values = []
        for step in (STEP, -STEP):

            def moved(_: nn.Module, __: Any, output: Tensor, t: int = t, d: int = d, step: float = step) -> Tensor:
                seen[:] = [output.detach()[0].numpy()]
                added = torch.zeros_like(output)
                added[:, t, d] = step
                return output + added

            handle = module.register_forward_hook(moved)
            values.append(score())
            handle.remove()
        found.append((values[0] - values[1]) / (2 * STEP))
    return np.array(found).reshape(-1, 3), seen[0]


def test_of_a_language_model_it_is_by_word_embeddings() -> None:
    """With the identity as curvature s is the query's own gradient, by autograd."""
    run = exact.attribute(exact.gpt2(), "curvature.kind=identity")
    layers, row = run.settings["model"]["layers"], exact.corpus_of(run)[3]
    name = run.sequences["sequence"][3]
    solved = reference.question_gradient(exact.gpt2(), layers, exact.QUESTIONS[0])

    def score() -> float:
        own = reference.gradients(exact.gpt2(), layers, row)
        return -float(sum((solved[layer] * own[layer]).sum() for layer in layers))

    wanted, embedded = embedded_differences(exact.gpt2(), row, score)
    (found,) = raylux.perturb(run, run.queries[0], [name])
    assert found.influence == pytest.approx(score(), rel=1e-9)
    assert found.gradient.shape == (len(row.tokens), 16) and difference(found.inputs, embedded) == 0
    assert difference(found.gradient[:, [0, 5, 11]], wanted) < 1e-6
    table = found.table
    assert table["token"].tolist() == [exact.tokenizer().decode([int(token)]) for token in row.tokens]
    np.testing.assert_allclose(table["norm"], np.linalg.norm(found.gradient, axis=1))
    np.testing.assert_allclose(table["projection"], (found.gradient * found.inputs).sum(1))
    assert table.attrs["unit"] == "dot"
    # The last token is seen by no position that predicts another.
    assert table["norm"].iloc[-1] == 0 and (table["norm"].iloc[:-1] > 0).all()


def test_of_a_classifier_whatever_form_the_query_is_kept_in() -> None:
    """In the eigenbases and in low rank: the same vectors, and the score of the run."""
    model, train = classifier("bert"), labelled_texts(12)
    asked = [{"id": "one", "text": "a warm film", "label": "good"}]

    def attributed(*overrides: str) -> raylux.Run:
        return raylux.attribute(model, classifier_tokenizer(), train, asked, overrides=list(overrides))

    full = attributed("query.max_error=0", "query.basis=standard")
    name = full.sequences["sequence"][5]
    (wanted,) = raylux.perturb(full, "one", [name])
    assert wanted.influence == pytest.approx(float(full.scores()[0, 5]), rel=1e-8)
    for overrides, near in (
        (("query.max_error=0", "query.basis=eigen"), 1e-8),
        (("query.max_error=0.02", "query.low_rank=always"), 0.1),
    ):
        (found,) = raylux.perturb(attributed(*overrides), "one", [name])
        assert difference(found.gradient, wanted.gradient) < near


def test_a_retrained_head_moves_with_a_pixel_as_it_says(tmp_path: Path) -> None:
    """Koh & Liang's check: fits with a pixel of one training point a little up and down, 20 pixels."""
    digits, penalty, point, step = Digits.split(5, 150), 1e-2, 7, 1e-3
    # Two pixels of each row, so that a fit takes a moment.
    pooled = [torch.nn.functional.avg_pool2d(x.view(-1, 1, 8, 8), (2, 1)).flatten(1) for x in (digits.x, digits.test_x)]
    digits = Digits(pooled[0], digits.y, pooled[1], digits.test_y)
    weights = newton(digits, torch.zeros(10, 33, dtype=torch.float64), penalty)
    model = nn.Linear(32, 10).double()
    with torch.no_grad():
        model.weight.copy_(weights[:, :-1])
        model.bias.copy_(weights[:, -1])
    asked = digits.questions(torch.tensor([3]))
    setting = ["curvature.kind=hessian", f"curvature.damping={penalty}", "fit.sequences=150"]
    run = raylux.attribute(model, None, digits.pairs(), asked, folder=tmp_path / "run", overrides=setting)
    (found,) = raylux.perturb(run, run.queries[0], [run.sequences["sequence"][point]])
    measured = []
    pixels = np.random.default_rng(0).permutation(32)[:20]
    for pixel in pixels:
        after = []
        for change in (step, -step):
            moved = digits.x.clone()
            moved[point, pixel] += change
            fitted = newton(Digits(moved, digits.y, digits.test_x, digits.test_y), weights, penalty)
            logits = torch.cat([asked[0][0], torch.ones(1, dtype=torch.float64)]) @ fitted.T
            after.append(float(logits.log_softmax(0)[asked[0][1]]))
        measured.append((after[0] - after[1]) / (2 * step))
    predicted = found.gradient[pixels]
    assert pearson(predicted[:, None], np.array(measured)[:, None])[0] >= 0.99
    assert difference(predicted, np.array(measured)) < 1e-3, "and in size: the Hessian is exact"


def results(folder: Path) -> list[str]:
    """What a folder holds, but for who works on it and what was said."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(name for name in names if not name.startswith(("lease", "progress")))


def test_it_is_asked_by_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    run = raylux.attribute(
        exact.gpt2(), exact.tokenizer(), exact.TEXTS, exact.ASKED, folder=folder, overrides=list(exact.PARTS)
    )
    before = results(folder)
    assert len(raylux.perturb(str(folder), run.queries[0])) == 5
    name = str(run.sequences["sequence"][3])
    assert main(["perturb", str(folder), "--query", run.queries[1], "--sequence", name, "-k", "3"]) == 0
    text = capsys.readouterr().out
    assert f"{run.queries[1]}, {name}: influence" in text and "projection" in text and "norm" in text
    assert main(["perturb", str(folder), "--query", run.queries[1], "--sequence", "none"]) == 2
    assert main(["perturb", str(folder), "--query", "none"]) == 2
    said = capsys.readouterr().err
    assert "no sequence 'none'" in said and "'none'" in said and "Traceback" not in said
    assert results(folder) == before


def test_what_it_cannot_serve() -> None:
    model = build("neox", torch.float64, exact.VOCAB)
    for overrides, said in (
        (("curvature.kind=cosine",), "divided by the sequence's own norm"),
        (('model.layers=["*.embed_in"]', "curvature.kind=identity"), "is the word embedding, of which gradients"),
    ):
        run = exact.attribute(model, *overrides)
        with pytest.raises(UserError, match=said) as error:
            raylux.perturb(run, run.queries[0])
        assert "\n" not in str(error.value) and error.value.exit_code == 2
    whole = modules.make("sentences"), modules.data("sentences", 6)
    run = modules.attribute(*whole, [whole[1][0]], "curvature.kind=identity")
    with pytest.raises(UserError, match="the model reads whole numbers and has no word embedding"):
        raylux.perturb(run, run.queries[0])


def test_experts_and_queries_that_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = build("mixtral", torch.float64, exact.VOCAB)
    run = exact.attribute(mixture, "curvature.kind=identity")
    with pytest.raises(UserError, match="belongs to an expert, whose choice of tokens"):
        raylux.perturb(run, run.queries[0])
    monkeypatch.setattr("raylux.perturbing.query_files", lambda _: [])
    run = exact.attribute(exact.gpt2(), "curvature.kind=identity")
    with pytest.raises(MissingStageError, match="is not kept there"):
        raylux.perturb(run, run.queries[0])
