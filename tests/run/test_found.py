"""What a run says: its tables, scores by layer and token, units, documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import raylux
from raylux.errors import UserError
from raylux.ledger import QUERY
from raylux.store import RunFolder
from raylux.store.folder import Group
from tests.run.conftest import IDF
from tests.small import CUT, Inputs, make_inputs, texts, write_lines

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
