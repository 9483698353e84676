"""Modules in memory with features: whole runs against autograd and dense matrices, patches, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import raylux
from raylux.cli import main
from raylux.engine.plan import choose_fit_rows
from raylux.errors import UserError
from raylux.ledger import LABELS
from raylux.modules import logits_of
from raylux.store import CorpusReader, RunFolder
from raylux.verification import CalibrationOptions, VerifyOptions
from tests.reference import curvature, difference

PARTS = ("fit.unit_tokens=7", "score.unit_size=5", "engine.batch_tokens=8", "score.layers=true")


class Shared(nn.Module):
    """A layer that runs twice, and two that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again = nn.Linear(6, 5), nn.Linear(5, 5)
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(torch.tanh(self.again(torch.tanh(self.enter(x)))))
        return self.left(x) * self.right(x)


class Sentences(nn.Module):
    """Token ids of a fixed length, a convolution over them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.look, self.say = nn.Embedding(9, 4), nn.Conv1d(4, 5, 3, padding=1), nn.Linear(5, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.say(torch.relu(self.look(self.words(ids).mT)).amax(2))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.BatchNorm2d(3), nn.ReLU(),
        nn.Conv2d(3, 4, (2, 3), dilation=(1, 2), padding="same", padding_mode="circular", bias=False), nn.Tanh(),
        nn.Flatten(), nn.Linear(4 * 3 * 3, 3),
    )  # fmt: skip


# Maker and shape of the features.
MODULES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 3), (6,)),
    "logistic": (lambda: nn.Linear(6, 1), (6,)),
    "mlp": (_mlp, (6,)),
    "shared": (Shared, (6,)),
    "cnn": (_cnn, (2, 5, 6)),
    "sentences": (Sentences, (7,)),
}


def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(5)
    return MODULES[name][0]().to(dtype).eval()


def data(name: str, count: int = 14, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, int]]:
    shape, draw = MODULES[name][1], torch.Generator().manual_seed(2)
    classes = 2 if name in ("logistic", "sentences") else 3
    if name == "sentences":
        return [(torch.randint(9, shape, generator=draw), n % classes) for n in range(count)]
    return [(torch.randn(shape, generator=draw, dtype=dtype), n % classes) for n in range(count)]


def attribute(
    model: nn.Module, train: Any, queries: Sequence[Any], *overrides: str, folder: Path | None = None
) -> raylux.Run:
    return raylux.attribute(model, None, train, queries, folder=folder, overrides=[*PARTS, *overrides])


def tracked(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def log_p(model: nn.Module, features: Tensor, label: int) -> Tensor:
    return logits_of(model(features[None]))[0].log_softmax(0)[label]


def gradients(model: nn.Module, features: Tensor, label: int) -> dict[str, np.ndarray]:
    """Layer -> gradient of log p(label) by autograd, [P, M]."""
    modules = tracked(model)
    pairs = [(module.weight, module.bias) for module in modules.values()]
    found = iter(
        torch.autograd.grad(log_p(model, features, label), [p for pair in pairs for p in pair if p is not None])
    )
    result = {}
    for name, (_, bias) in zip(modules, pairs, strict=True):
        weight = next(found).flatten(1)
        result[name] = (weight if bias is None else torch.cat([weight, next(found)[:, None]], 1)).detach().numpy()
    return result


def drawn(run: raylux.Run) -> list[tuple[int, int]]:
    """Corpus rows of the fit, and the class that was drawn for each."""
    rows = choose_fit_rows(run.sequences["sequence"].tolist(), run.config.fit.sequences, run.config.fit.seed)
    store = RunFolder(run.folder)
    labels = store.group(store.manifest(LABELS, "labels").meta["key"]).read("labels")
    return list(zip(rows.tolist(), labels.tolist(), strict=True))


def dense(model: nn.Module, examples: Sequence[Tensor]) -> Tensor:
    """(1/N) Σ J'HJ over all layers together, a logit at a time."""
    weights = [p for module in tracked(model).values() for p in (module.weight, module.bias) if p is not None]
    total: Any = 0.0
    for x in examples:
        logits = logits_of(model(x[None]))[0]
        rows = []
        for one in logits:
            if not one.requires_grad:  # the logit of the first class, where there is but one
                rows.append(torch.zeros(sum(w.numel() for w in weights), dtype=one.dtype))
                continue
            found = iter(torch.autograd.grad(one, weights, retain_graph=True, materialize_grads=True))
            parts = []
            for module in tracked(model).values():
                weight = next(found).flatten(1)
                parts.append(weight if module.bias is None else torch.cat([weight, next(found)[:, None]], 1))
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        p, jacobian = logits.detach().softmax(0), torch.stack(rows)
        total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return total / len(examples)


def joined(found: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([x.reshape(-1) for x in found.values()])


@pytest.mark.parametrize("name", MODULES)
def test_scores_are_those_of_autograd(name: str) -> None:
    """EK-FAC's Λ in its basis, from gradients of one example at a time; bases by the run's own convention of rows."""
    model, train = make(name), data(name)
    run = attribute(model, train, [train[0], (train[1][0], 1)], "curvature.kind=diagonal", "curvature.damping=0.05")
    assert run.settings["model"]["layers"] == list(tracked(model)) and run.unit == "nats"
    fitted = [gradients(model, train[row][0], label) for row, label in drawn(run)]
    examples = [gradients(model, *row) for row in train]
    for query, row in zip(run.queries, [train[0], (train[1][0], 1)], strict=True):
        asked = gradients(model, *row)
        assert run.measurements.loc[query, "measurement"] == pytest.approx(log_p(model, *row).item(), abs=1e-12)
        layers, total = run.layer_scores(query), np.zeros(len(train))
        for layer, gradient in asked.items():
            s = curvature("diagonal", [g[layer] for g in fitted]).solve(gradient, 0.05)
            expected = np.array([float((s * g[layer]).sum()) for g in examples]) / len(train)
            assert difference(layers.sel(layer=layer), expected) <= 1e-9
            total += expected
        assert difference(run.scores().sel(query=query), total) <= 1e-9


@pytest.mark.parametrize("name", ["logistic", "shared", "cnn"])
def test_better_solves_are_those_of_the_dense_gauss_newton_matrix(name: str) -> None:
    model, train = make(name), data(name, 6)
    solver = ["curvature.solver=pcg", "curvature.tolerance=1e-11", "curvature.iterations=300", "curvature.damping=0.5"]
    run = attribute(model, train, train[:2], *solver)
    g = dense(model, [x for x, _ in train])
    rows = torch.as_tensor(np.stack([joined(gradients(model, *row)) for row in train]))
    expected = rows[:2] @ torch.linalg.solve(g + 0.5 * torch.eye(len(g), dtype=g.dtype), rows.T)
    assert difference(run.scores().to_numpy() * len(train), expected) < 1e-8


def test_patches_make_a_convolution_a_linear_map() -> None:
    """A and S of a convolution are over places: K-FAC against factors by hand."""
    model, train = make("cnn"), data("cnn")
    run = attribute(model, train, train[:1], "curvature.kind=kfac", "model.layers=['0']", "curvature.damping=0.1")
    first: Any = model[0]  # type: ignore[index]
    pairs = []
    for row, label in drawn(run):
        x = train[row][0]
        out = first(x[None]).detach().requires_grad_(True)
        (g,) = torch.autograd.grad(logits_of(model[1:](out))[0].log_softmax(0)[label], out)  # type: ignore[index]
        patches = functional.unfold(x[None], 3, padding=1, stride=2)[0].T
        a = torch.cat([patches, torch.ones(len(patches), 1, dtype=patches.dtype)], 1)
        pairs.append((a.numpy(), g[0].flatten(1).T.numpy()))
    fitted = [g.T @ a for a, g in pairs]
    examples = np.stack([gradients(model, *row)["0"] for row in train])
    s = curvature("kfac", fitted, pairs).solve(examples[0], 0.1)
    assert difference(run.scores()[0], (examples * s).sum((1, 2)) / len(train)) <= 1e-9


def test_data_sets_records_and_contrasts() -> None:
    model, train = make("mlp"), data("mlp")
    x, y = torch.stack([x for x, _ in train]), torch.tensor([label for _, label in train])
    records = [
        {"id": f"r{n}", "features": x[n].tolist(), "label": int(y[n]), "text": f"row {n}"} for n in range(len(x))
    ]
    asked = [
        {"id": "first", "features": x[0], "label": 0},
        {"id": "both", "features": x[0].numpy(), "label": 0, "contrast": 2, "measurement": "contrast"},
        {"id": "loss", "features": x[0], "label": torch.tensor(2), "measurement": "loss"},
    ]
    run = attribute(model, TensorDataset(x, y), asked)
    assert run.queries == ["first", "both", "loss"]
    scores = run.scores()
    assert difference(scores.sel(query="both"), scores.sel(query="first") + scores.sel(query="loss")) <= 1e-9
    other = attribute(model, records, asked)
    assert not np.array_equal(other.scores().to_numpy(), scores.to_numpy())  # other ids, other draws
    top = other.top("first", 3)
    assert set(top["label"]) <= {"0", "1", "2"} and top["text"].str.startswith("row ").all()
    assert len(CorpusReader(RunFolder(run.folder))) == len(train)


def test_a_run_goes_on_with_the_same_module_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, train = make("mlp", torch.float32), data("mlp", dtype=torch.float32)
    asked = [{"id": "one", "features": train[0][0], "label": 0}]
    run = attribute(model, train, asked, folder=tmp_path / "run")
    before = run.scores().to_numpy()
    more = [*asked, {"id": "two", "features": train[1][0], "label": 0}]
    again = attribute(make("mlp", torch.float32), train, more, folder=tmp_path / "run")
    assert again.queries == ["one", "two"]
    assert np.array_equal(again.scores().sel(query="one").to_numpy(), before[0])
    fresh = attribute(model, train, more)
    assert np.array_equal(fresh.scores().to_numpy(), again.scores().to_numpy())
    other = make("mlp", torch.float32)
    with torch.no_grad():
        other[0].bias += 1  # type: ignore[index]
    with pytest.raises(UserError, match="weights differ: 1 of 5 tensors"):
        attribute(other, train, more, folder=tmp_path / "run")
    assert main(["top", str(tmp_path / "run"), "--query", "two", "-k", "1"]) == 0
    assert "two" in capsys.readouterr().out and (tmp_path / "run" / "report" / "index.html").is_file()


def test_sizes_are_verified_as_any_others() -> None:
    model, train = make("cnn"), data("cnn", 6)
    solver = ["curvature.solver=pcg", "curvature.tolerance=1e-9", "curvature.damping=1.0", "curvature.iterations=200"]
    run = attribute(model, train, train[:1], *solver)
    options = VerifyOptions(queries=1, top=1, random=1, products=0, whole=False)
    frame = raylux.verify(run, options).verification()
    size = float(np.sqrt((frame["predicted"] ** 2).mean()))
    assert frame["resolved"].all() and np.abs(frame["measured"] - frame["predicted"]).max() <= 0.02 * size


class Leaky(nn.Module):
    """Normalises over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x - x.mean(0))


class Beside(Leaky):
    """Uses a layer's weight beside it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x) + functional.linear(x.square(), self.line.weight)


class Turned(Leaky):
    """Hands its layer the examples second."""

    def forward(self, x: Tensor) -> Tensor:
        return self.line(torch.stack([x, 2 * x])).sum(0)


@pytest.mark.parametrize(
    ("model", "train", "queries", "overrides", "says"),
    [
        (Leaky(), None, None, (), "layer 'line' cannot be attributed"),
        (Beside(), None, None, (), "layer 'line' cannot be attributed"),
        (Turned(), None, None, (), "layer 'line' cannot be attributed"),
        (nn.Linear(5, 3), None, None, (), r"the module does not run on features of shape \[6\]"),
        (nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (2, 2))), None, None, (), "logits are"),
        (nn.Tanh(), None, None, (), "the module has no parameters"),
        (nn.Linear(6, 3).half(), None, None, (), "convert it to float32 or float64"),
        (nn.LayerNorm(6), None, None, (), "nor any other linear layer"),
        (nn.Conv1d(2, 2, 1, groups=2), [(torch.zeros(2, 1), 0)], [], (), "logits are"),
        (nn.Linear(6, 3), [], None, (), "there is no example"),
        (nn.Linear(6, 3), None, [], (), "holds no query"),
        (nn.Linear(6, 3), [(torch.zeros(6), 3)], None, (), "train row 0: the class: 3 is no class of the model"),
        (nn.Linear(6, 3), [(torch.zeros(6), 0.5)], None, (), "must be a class's name or number, not 0.5"),
        (nn.Linear(6, 3), [(torch.zeros(6), 0), (torch.zeros(5), 1)], None, (), r"shape \[5\], those before are \[6\]"),
        (nn.Linear(6, 3), [(torch.full((6,), torch.nan), 0)], None, (), "NaN or infinity in the features"),
        (nn.Linear(6, 3), ["text"], None, (), "must be a pair"),
        (nn.Linear(6, 3), None, [(torch.zeros(5), 0)], (), r"must be real numbers of shape \[6\]"),
        (nn.Linear(6, 3), None, [{"features": torch.zeros(6)}], (), "no 'label'"),
        (nn.Linear(6, 3), None, [{"prompt": "x"}], (), "unknown key 'prompt'"),
        (nn.Linear(6, 3), None, None, ("prefilter.kind=idf",), "features share no tokens"),
        (nn.Linear(6, 3), None, None, ("engine.backend=ray",), "computes in process"),
        (nn.Linear(6, 3), None, None, ("score.token_top=3",), "features have no tokens"),
        ("model", None, None, (), "a str needs its tokenizer"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    tmp_path: Path, model: Any, train: Any, queries: Any, overrides: Sequence[str], says: str
) -> None:
    rows = data("mlp", 4, torch.float32)
    with pytest.raises(UserError, match=says) as caught:
        raylux.attribute(
            model, None, rows if train is None else train, rows[:1] if queries is None else queries,
            folder=tmp_path / "run", overrides=overrides,
        )  # fmt: skip
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_module_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    train = data("mlp", 4)
    run = attribute(make("mlp"), train, train[:1], folder=tmp_path / "run")
    assert raylux.calibrate(run, CalibrationOptions(pairs=4, products=5)) is not None
    del run
    with pytest.raises(UserError, match="a module that was in memory of another call"):
        raylux.calibrate(str(tmp_path / "run"), CalibrationOptions(pairs=4, products=5))
    opened = raylux.open_run(tmp_path / "run")
    assert len(opened.top("0", 3)) == 3
