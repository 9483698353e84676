"""What may change under a run folder: named, refused, or computed again on request, and then equal to a fresh run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from raylux.config import Config
from raylux.engine.quarantine import give_up
from raylux.engine.work import Failure
from raylux.errors import UserError
from raylux.frozen import RESTARTABLE, stage_of
from raylux.ledger import COVARIANCE, PROBE, QUARANTINE, QUERY, SCORE
from raylux.store import Lease, RunFolder
from tests.small import QUERIES, Inputs, contents, differing, make_inputs, objects, texts, write_lines

STAGES = {"corpus": "corpus", "fit": COVARIANCE, "prefilter": "prefilter", "query": QUERY, "score": SCORE}
# Stage -> the ledger stages whose objects are made anew by its restart.
ANEW = {
    "corpus": {"corpus", "fit", "prefilter", "query", "score"},
    "fit": {"fit", "query", "score"},
    "prefilter": {"prefilter"},
    "query": {"prefilter", "query", "score"},
    "score": {"score"},
}
FILTER = ("prefilter.kind=idf", "prefilter.top=40", "query.max_error=0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Inputs with a run beside them."""
    inputs = make_inputs(tmp_path_factory.mktemp("made"), "gpt2", n_layer=1)
    inputs.run(inputs.base / "run", *FILTER)
    return inputs


@pytest.fixture
def inputs(made: Inputs, tmp_path: Path) -> Inputs:
    """A copy of both that a test may change."""
    shutil.copytree(made.base, tmp_path / "copy")
    return Inputs(tmp_path / "copy")


def other_weights(inputs: Inputs) -> None:
    path = inputs.model / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    weights["transformer.h.0.mlp.c_fc.weight"][0, 0] = 0.25
    save_file(weights, path, metadata={"format": "pt"})


def other_model_config(inputs: Inputs) -> None:
    path = inputs.model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_norm_epsilon": 1e-3}))


def other_tokenizer(inputs: Inputs) -> None:
    path = inputs.model / "tokenizer.json"
    data = json.loads(path.read_text())
    words = data["model"]["vocab"]
    words["who"], words["whose"] = words["whose"], words["who"]
    path.write_text(json.dumps(data))


def other_corpus(inputs: Inputs) -> None:
    rows = [{"id": f"s{place}", "shelf": 0, "text": text} for place, text in enumerate(texts(seed=9))]
    write_lines(inputs.corpus, rows)


def other_question(inputs: Inputs) -> None:
    write_lines(inputs.queries, [{**QUERIES[0], "completion": "house at church"}, *QUERIES[1:]])


# A change of a file -> the stage it needs, and what the line says.
CHANGES: dict[Callable[[Inputs], None], tuple[str, str]] = {
    other_weights: ("fit", "weights differ: 1 of 16 tensors (first: transformer.h.0.mlp.c_fc.weight)"),
    other_model_config: ("fit", "config.json differs"),
    other_tokenizer: ("corpus", "tokenizer differs (tokenizer.json)"),
    other_corpus: ("corpus", "the corpus's files changed (content"),
    other_question: ("query", "query 'a' is not the one known there by this id"),
}
# A change of a key -> the stage it needs.
KEYS = {
    "corpus.max_length=48": "corpus",
    "model.layers='*.c_fc'": "fit",
    "model.dtype=float64": "fit",
    "fit.sequences=31": "fit",
    "fit.labels=dataset": "fit",
    "fit.seed=5": "fit",
    "fit.unit_tokens=300": "fit",
    "curvature.kind=kfac": "fit",
    "engine.batch_tokens=200": "fit",
    "curvature.damping=0.5": "query",
    "query.max_error=0.3": "query",
    "query.basis=eigen": "query",
    "query.low_rank=always": "query",
    "fit.eigh=float64": "fit",
    "engine.contraction_dtype=bfloat16": "fit",
    "score.unit_size=7": "score",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_file_is_named_and_computed_again_on_request(
    inputs: Inputs, change: Callable[[Inputs], None], tmp_path: Path
) -> None:
    stage, says = CHANGES[change]
    change(inputs)
    run = inputs.base / "run"
    before = objects(run)
    with pytest.raises(UserError) as error:
        inputs.run(run, *FILTER)
    assert says in str(error.value) and f"--restart {stage}" in str(error.value) and "\n" not in str(error.value)
    assert objects(run) == before
    inputs.run(run, *FILTER, restart=stage)
    assert differing(contents(run), contents(inputs.run(tmp_path / "fresh", *FILTER).folder)) == []
    inputs.run(run, *FILTER)  # and that is what the folder holds from now on


@pytest.mark.parametrize("override", KEYS)
def test_a_changed_key_is_named_and_computed_again_on_request(inputs: Inputs, override: str, tmp_path: Path) -> None:
    run, stage = inputs.base / "run", KEYS[override]
    with pytest.raises(UserError) as error:
        inputs.run(run, *FILTER, override)
    key = override.partition("=")[0]
    assert key in str(error.value) and f"--restart {stage}" in str(error.value)
    for weaker in RESTARTABLE[RESTARTABLE.index(stage) + 1 :]:
        if ANEW[weaker] < ANEW[stage]:  # a later stage alone would mix old numbers with new ones
            with pytest.raises(UserError, match=f"--restart {stage}"):
                inputs.run(run, *FILTER, override, restart=weaker)
    inputs.run(run, *FILTER, override, restart=stage)
    assert differing(contents(run), contents(inputs.run(tmp_path / "fresh", *FILTER, override).folder)) == []


@pytest.mark.parametrize("stage", RESTARTABLE)
def test_a_restart_makes_its_stage_and_what_rests_on_it_anew(inputs: Inputs, stage: str) -> None:
    run = inputs.base / "run"
    store = RunFolder(str(run))
    before, keys = contents(run), _keys(store)
    inputs.run(run, *FILTER, restart=stage)
    now = _keys(store)
    assert {name for name in keys if keys[name].isdisjoint(now[name])} == ANEW[stage]
    assert {name for name in keys if keys[name] == now[name]} == set(keys) - ANEW[stage]
    assert differing(contents(run), before) == []


def test_a_run_that_was_made_before_a_key_was_known_goes_on(inputs: Inputs) -> None:
    """The key had its default then, in sections that every config has, too; another value is another run."""
    run = inputs.base / "run"
    store = RunFolder(str(run))
    settings = store.settings()
    for section, key in (("model", "task"), ("fit", "labels"), ("curvature", "blocks")):
        del settings["config"][section][key]
    store.write_settings(settings)
    before = objects(run)
    inputs.run(run, *FILTER)
    assert objects(run) == before, "nothing was computed"
    store.write_settings(settings)
    with pytest.raises(UserError, match=r"curvature\.blocks is 1 there and 2 here"):
        inputs.run(run, *FILTER, "curvature.blocks=2")


def _keys(store: RunFolder) -> dict[str, set[str]]:
    """Stage -> the objects that its manifests name."""
    return {
        stage: {key for manifest in store.units(ledger).values() for key in manifest.objects}
        for stage, ledger in STAGES.items()
    }


def test_a_restart_interrupted_anywhere_goes_on(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = inputs.base / "run"
    wanted = contents(run)
    forget, counts = RunFolder.forget, {"left": 0}

    def forgets(self: RunFolder, stage: str, unit: str) -> None:
        counts["left"] -= 1
        if counts["left"] < 0:
            raise KeyboardInterrupt
        forget(self, stage, unit)

    monkeypatch.setattr(RunFolder, "forget", forgets)
    for place in (0, 1, 3, 8, 15):
        counts["left"] = place
        with pytest.raises(KeyboardInterrupt):
            inputs.run(run, *FILTER, restart="fit")
        counts["left"] = 10**6
        inputs.run(run, *FILTER)
        assert differing(contents(run), wanted) == []


def test_a_restart_tries_again_what_was_given_up(inputs: Inputs) -> None:
    store = RunFolder(str(inputs.base / "run"))
    stages = {COVARIANCE: "fit", QUERY: "query", PROBE: "query", SCORE: "score"}
    for stage in stages:
        give_up(store, stage, "u", ["s1"], Failure(4, "its process ended"))
    inputs.run(inputs.base / "run", *FILTER, restart="score")
    assert {manifest.meta["stage"] for manifest in store.units(QUARANTINE).values()} == {COVARIANCE, QUERY, PROBE}
    inputs.run(inputs.base / "run", *FILTER, restart="query")
    assert {manifest.meta["stage"] for manifest in store.units(QUARANTINE).values()} == {COVARIANCE}
    inputs.run(inputs.base / "run", *FILTER, restart="fit")
    assert not store.units(QUARANTINE)


def test_an_unknown_stage(inputs: Inputs) -> None:
    for name in ("report", "covariance", ""):
        with pytest.raises(UserError, match="no such stage; one of corpus, fit, prefilter, query, score"):
            inputs.run(inputs.base / "run", restart=name)


def test_a_restart_of_what_is_not_there_is_a_run(made: Inputs, tmp_path: Path) -> None:
    made.run(tmp_path / "run", *FILTER, restart="fit")
    assert differing(contents(tmp_path / "run"), contents(made.base / "run")) == []


def test_what_nothing_rests_on_yet_may_change(made: Inputs, tmp_path: Path) -> None:
    """A folder that holds candidates and no numbers lets the fit's keys change."""
    from raylux.api import run_stages

    run_stages(made.config(tmp_path / "run", *FILTER, "fit.sequences=20"), ("prefilter",), quiet=True)
    made.run(tmp_path / "run", *FILTER)
    assert differing(contents(tmp_path / "run"), contents(made.base / "run")) == []


def test_files_that_moved_are_the_same_files(inputs: Inputs, tmp_path: Path) -> None:
    shutil.copytree(inputs.model, tmp_path / "elsewhere")
    shutil.copy(inputs.corpus, tmp_path / "rows.jsonl")
    before = objects(inputs.base / "run")
    moved = (f"model.path={tmp_path / 'elsewhere'}", f"corpus.path={tmp_path / 'rows.jsonl'}")
    inputs.run(inputs.base / "run", *FILTER, *moved)
    assert objects(inputs.base / "run") == before


def test_every_key_of_a_config_has_its_stage() -> None:
    """A new key has to say which numbers it reaches: by its section, unless it is named."""
    stages = {
        f"{section}.{key}": stage_of(f"{section}.{key}")
        for section, field in Config.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    }
    assert {key for key, stage in stages.items() if stage == "corpus"} >= {"corpus.text", "model.tokenizer"}
    assert stages["fit.snapshot"] is stages["engine.workers"] is stages["run.folder"] is None
    assert {stages[override.partition("=")[0]] for override in KEYS} == set(KEYS.values())
    assert len(stages) == 91 and None in stages.values()


class TestTwoDrivers:
    def test_the_second_is_refused_and_writes_nothing(self, made: Inputs, tmp_path: Path) -> None:
        made.run(tmp_path / "run", *FILTER)
        before = objects(tmp_path / "run")
        # Held by this very process, which lives, and beats.
        with Lease.take(RunFolder(str(tmp_path / "run")).files, beat=0.2), pytest.raises(UserError) as error:
            made.run(tmp_path / "run", *FILTER, restart="score")
        assert "another driver" in str(error.value) and "process" in str(error.value)
        assert objects(tmp_path / "run") == before

    def test_bad_input_leaves_no_folder(self, made: Inputs, tmp_path: Path) -> None:
        write_lines(tmp_path / "corpus.jsonl", [{"id": "x", "shelf": 0, "text": 3}])
        with pytest.raises(UserError):
            made.run(tmp_path / "run", *FILTER, f"corpus.path={tmp_path / 'corpus.jsonl'}")
        assert not (tmp_path / "run").exists()
