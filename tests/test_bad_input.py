"""Whatever is wrong with the input ends in one line that says so, and leaves nothing half-written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import raylux
from raylux.api import STAGES, run_stages
from raylux.cli import main
from raylux.config import Config
from raylux.engine import demand as demands
from raylux.engine.worker import GradientWorker
from raylux.errors import MissingStageError, UserError
from tests.architectures import CONTEXT
from tests.small import CUT, Inputs, contents, differing, make_inputs, write_lines

ROWS = [{"id": f"s{place}", "shelf": 0, "text": "anna bought the red boat at lake saima"} for place in range(6)]
QUERY = {"id": "q", "prompt": "anna bought", "completion": "the red boat"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("model"), "gpt2")


@pytest.fixture
def inputs(model: Inputs, tmp_path: Path) -> Inputs:
    """Good input, its files this test's own; the model is linked file by file."""
    own = Inputs(tmp_path / "inputs")
    own.model.mkdir(parents=True)
    for path in model.model.iterdir():
        (own.model / path.name).symlink_to(path)
    write_lines(own.corpus, ROWS)
    write_lines(own.queries, [QUERY])
    return own


def _own(path: Path) -> Path:
    """A linked file as a copy that may be changed."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    return path


def _line(text: str, *parts: str) -> None:
    assert "\n" not in text and "Traceback" not in text and len(text) < 500, text
    for part in parts:
        assert part in text, f"{part!r} not in {text!r}"


def _refused(inputs: Inputs, folder: Path, *parts: str, overrides: tuple[str, ...] = ()) -> str:
    """The one line with which the input is refused; nothing is left where the run was to be."""
    with pytest.raises(UserError) as error:
        inputs.run(folder, *overrides)
    _line(str(error.value), *parts)
    assert not folder.exists() or not list(folder.rglob("*"))
    return str(error.value)


def _command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(list(words))
    return code, capsys.readouterr().err.strip()


def _config_file(inputs: Inputs, run: Path, **more: dict[str, Any]) -> Path:
    path = inputs.base / "config.yaml"
    path.write_text(yaml.safe_dump(inputs.sections(run, **more)), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------- config, corpus, queries


def _corpus(*lines: str | bytes) -> Callable[[Inputs], object]:
    data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    return lambda inputs: inputs.corpus.write_bytes(data)


def _rows(*rows: dict[str, Any]) -> Callable[[Inputs], object]:
    return _corpus(*map(json.dumps, rows))


def _query(**record: Any) -> Callable[[Inputs], object]:
    return lambda inputs: write_lines(inputs.queries, [record])


BAD: dict[str, tuple[Callable[[Inputs], object], tuple[str, ...], tuple[str, ...]]] = {
    "corpus missing": (lambda inputs: inputs.corpus.unlink(), (), ("corpus.jsonl",)),
    "corpus empty": (_corpus(b""), (), ("corpus.jsonl",)),
    "corpus of empty texts": (_rows({"id": "a", "text": ""}), (), ("corpus.jsonl", "text")),
    "an empty text": (_rows(*ROWS, {"id": "x", "text": ""}), (), ("corpus.jsonl", "7", "empty")),
    "no text field": (_rows(*ROWS[:2], {"id": "x", "body": "anna"}), (), ("corpus.jsonl", "3", "'text'")),
    "no id field": (_rows(ROWS[0], {"text": "anna bought"}), (), ("corpus.jsonl", "2", "'id'")),
    "not UTF-8": (_corpus(json.dumps(ROWS[0]), b'{"id": "x", "text": "\xff\xfe"}'), (), ("corpus.jsonl", "UTF-8")),
    "not JSON": (_corpus(json.dumps(ROWS[0]), "{oops"), (), ("corpus.jsonl", "2", "JSON")),
    "an id twice": (_rows(*ROWS, ROWS[3]), (), ("s3",)),
    "a token outside": (_rows({"id": "x", "shelf": 0, "input_ids": [1, 2, 99_999]}), (), ("99999", "vocabulary")),
    "queries missing": (lambda inputs: inputs.queries.unlink(), (), ("queries.jsonl",)),
    "no query": (lambda inputs: inputs.queries.write_text(""), (), ("queries.jsonl", "no query")),
    "no completion": (_query(id="q", prompt="anna"), (), ("queries.jsonl", "'q'", "completion")),
    "an empty completion": (_query(id="q", prompt="anna", completion=""), (), ("queries.jsonl", "'q'", "empty")),
    "a query too long": (
        _query(id="q", prompt="anna " * CONTEXT, completion="boat"),
        (),
        ("queries.jsonl", "'q'", f"{CONTEXT + 1} tokens", f"context of {CONTEXT}"),
    ),
    "a query's token outside": (
        _query(id="q", input_ids=[3, 4, 4096], labels=[-100, 4, 4096]),
        (),
        ("queries.jsonl", "4096", "vocabulary"),
    ),
    "a query's key unknown": (_query(id="q", prompt="a", completon="b"), (), ("'completon'", "'completion'")),
    "model missing": (lambda inputs: None, ("model.path=/no/such/model",), ("/no/such/model",)),
    "no layer fits": (lambda inputs: None, ("model.layers=decoder.*",), ("decoder.*",)),
    "a damping below zero": (lambda inputs: None, ("curvature.damping=-1",), ("curvature.damping", "-1")),
    "an unknown key": (lambda inputs: None, ("prefilter.topp=3",), ("prefilter.topp", "did you mean 'top'")),
    "an unknown section": (lambda inputs: None, ("prefliter.top=3",), ("prefliter", "did you mean 'prefilter'")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_and_values(inputs: Inputs, tmp_path: Path, name: str) -> None:
    spoil, overrides, says = BAD[name]
    spoil(inputs)
    _refused(inputs, tmp_path / "run", *says, overrides=overrides)


@pytest.mark.parametrize(
    "name", ["corpus missing", "no text field", "not UTF-8", "no completion", "an unknown key", "no layer fits"]
)
def test_the_command_says_so_in_one_line_and_exits_2(
    inputs: Inputs, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, overrides, says = BAD[name]
    spoil(inputs)
    code, said = _command(capsys, "run", str(_config_file(inputs, tmp_path / "run")), *CUT, *overrides)
    assert code == 2
    _line(said, "error: ", *says)
    assert not (tmp_path / "run").exists()


def test_a_config_that_is_missing_or_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = _command(capsys, "run", str(tmp_path / "gone.yaml"))
    assert code == 2
    _line(said, "gone.yaml", "no such config")
    (tmp_path / "list.yaml").write_text("- 1", encoding="utf-8")
    code, said = _command(capsys, "fit", str(tmp_path / "list.yaml"))
    assert code == 2
    _line(said, "list.yaml", "mapping of sections")


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("top", str(tmp_path / "gone"), "--query", "q"), ("inspect", str(tmp_path / "gone"))):
        code, said = _command(capsys, *words)
        assert code == 2
        _line(said, "not a run folder")


# ------------------------------------------------------------------------------------------------ model


def test_a_model_without_mlp_layers(inputs: Inputs, tmp_path: Path) -> None:
    # A state space model: linear maps it has, but none in an MLP.
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 128, "use_cache": False}
    config = AutoConfig.for_model("mamba", **sizes)
    own = _own(inputs.model / "config.json")
    own.write_text(json.dumps({**config.to_dict(), "architectures": ["MambaForCausalLM"]}), encoding="utf-8")
    _refused(inputs, tmp_path / "run", "MLP")


def _spoil_weights(inputs: Inputs, value: float) -> None:
    path = _own(inputs.model / "model.safetensors")
    weights = load_file(path)
    weights["transformer.h.0.mlp.c_fc.weight"] = weights["transformer.h.0.mlp.c_fc.weight"].clone()
    weights["transformer.h.0.mlp.c_fc.weight"][0, 0] = value
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(inputs: Inputs, tmp_path: Path, value: float) -> None:
    """Found when the weights are loaded, after the corpus was stored; good weights go on from there."""
    good = (inputs.model / "model.safetensors").resolve()
    _spoil_weights(inputs, value)
    with pytest.raises(UserError) as error:
        inputs.run(tmp_path / "run")
    _line(str(error.value), "NaN or infinity", "transformer.h.0.mlp.c_fc.weight")
    kept = {path.relative_to(tmp_path / "run").parts[0] for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert kept <= {"run.yaml", "corpus", "ledger", "lease", "progress.jsonl"}
    assert not raylux.open_run(tmp_path / "run").status()[1].done
    (inputs.model / "model.safetensors").unlink()
    (inputs.model / "model.safetensors").symlink_to(good)
    inputs.run(tmp_path / "run")
    inputs.run(tmp_path / "fresh")
    assert differing(contents(tmp_path / "run"), contents(tmp_path / "fresh")) == []


def test_numbers_that_stop_being_finite_name_the_layer(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = GradientWorker.covariance_unit

    def spoilt(*args: Any) -> Any:
        labels, *parts = usual(*args)
        parts[0]["grads"]["transformer.h.1.mlp.c_proj"][0] = float("nan")
        return labels, *parts

    with monkeypatch.context() as patch:
        patch.setattr(GradientWorker, "covariance_unit", spoilt)
        with pytest.raises(raylux.NumericsError, match=r"fit unit 0: NaN or infinity in S:transformer\.h\.1\.mlp"):
            inputs.run(tmp_path / "run")
    inputs.run(tmp_path / "run")


# ------------------------------------------------------------------------------------------- run folder


@pytest.fixture
def done(inputs: Inputs, tmp_path: Path) -> Path:
    inputs.run(tmp_path / "run")
    return tmp_path / "run"


def _untouched(folder: Path) -> Callable[[], bool]:
    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    before = state()
    return lambda: state() == before


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("fit.seed=5", ["fit.seed", "0", "5"]),
        ("curvature.kind=kfac", ["curvature.kind", "ekfac", "kfac"]),
        ("corpus.max_length=32", ["corpus.max_length", "64", "32"]),
        ("engine.threads=2", ["engine.threads", "1", "2"]),
        ("model.dtype=float64", ["model.dtype", "float32", "float64"]),
    ],
)
def test_a_folder_of_another_config_is_left_alone(inputs: Inputs, done: Path, override: str, says: list[str]) -> None:
    same = _untouched(done)
    with pytest.raises(UserError) as error:
        inputs.run(done, override)
    _line(str(error.value), str(done), "holds another run", "run.folder", "--restart", *says)
    assert same()


def test_a_folder_with_foreign_files(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x", encoding="utf-8")
    same = _untouched(tmp_path / "mine")
    with pytest.raises(UserError) as error:
        inputs.run(tmp_path / "mine")
    _line(str(error.value), "not empty and holds no run", "run.folder")
    assert same()


def test_changed_weights_are_not_mixed_with_the_old(inputs: Inputs, done: Path) -> None:
    same = _untouched(done)
    _spoil_weights(inputs, 0.5)
    with pytest.raises(UserError) as error:
        inputs.run(done)
    _line(str(error.value), "weights differ: 1 of 28 tensors", "transformer.h.0.mlp.c_fc.weight", "run.folder")
    assert same()


def test_a_changed_corpus_is_not_mixed_with_the_old(inputs: Inputs, done: Path) -> None:
    numbers = _untouched(done / "ledger")
    write_lines(inputs.corpus, [*ROWS, {"id": "new", "shelf": 1, "text": "olaf has herbs"}])
    with pytest.raises(UserError) as error:
        inputs.run(done)
    _line(str(error.value), "corpus", "run.folder")
    assert numbers()


def test_an_id_always_means_the_same_query(inputs: Inputs, done: Path) -> None:
    same = _untouched(done)
    write_lines(inputs.queries, [{**QUERY, "completion": "the red old boat"}])
    with pytest.raises(UserError) as error:
        inputs.run(done)
    _line(str(error.value), "'q'", "another id")
    assert same()


# ---------------------------------------------------------------------------------------------- cluster


def test_too_few_cpus_are_said_at_once_and_another_number_goes_on(
    inputs: Inputs, tmp_path: Path, ray_cluster: dict[str, Any]
) -> None:
    began = time.monotonic()
    for overrides, need in ((("engine.workers=64",), "64"), (("engine.threads=9", "engine.workers=2"), "18")):
        with pytest.raises(UserError) as error:
            inputs.run(tmp_path / "run", "engine.backend=ray", *overrides)
        _line(str(error.value), "not enough CPUs", need, f"{ray_cluster['CPU']:g}", "engine.workers")
    assert time.monotonic() - began < 60  # not a deadline that a slow machine misses: a hang would last engine.timeout
    inputs.run(tmp_path / "run")


def test_too_little_memory_is_said_in_numbers(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("raylux.engine.demand.worker_bytes", lambda *_: 1 << 50)
        for backend in ("local", "ray"):
            with pytest.raises(UserError) as error:
                inputs.run(tmp_path / "run", f"engine.backend={backend}")
            _line(str(error.value), "not enough memory", "GiB", "1048576")
    inputs.run(tmp_path / "run")


def test_the_estimate_grows_with_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """An absurd number of queries is refused by the same numbers."""
    from raylux.engine import plan
    from raylux.layers import TrackedLayer

    layers = [TrackedLayer("l", 4096, 4096, False, False)]
    need = plan.worker_bytes(layers, {"l": "l"}, 10**8, 4, 10**6)
    with pytest.raises(UserError, match="fewer queries"):
        demands.check_memory_here(demands.Demand(1, 1, 1, False, need, 0))


# ------------------------------------------------------------------------------------- stages and results


@pytest.mark.parametrize(
    ("done", "stage", "says"),
    [
        ((), "query", "raylux fit"),
        (("fit", "query"), "score", "raylux prefilter"),
        (("fit", "prefilter"), "score", "raylux query"),
        (("fit", "prefilter", "query"), "report", "raylux score"),
    ],
)
def test_a_stage_without_its_earlier_stage(
    inputs: Inputs, tmp_path: Path, done: tuple[str, ...], stage: str, says: str
) -> None:
    config = inputs.config(tmp_path / "run", "prefilter.kind=idf")
    run_stages(config, ("corpus", *done), "here.yaml", quiet=True)
    with pytest.raises(MissingStageError) as error:
        run_stages(config, (stage,), "here.yaml", quiet=True)
    _line(str(error.value), f"`{says} here.yaml`")
    assert error.value.exit_code == 2


def test_what_the_results_do_not_hold(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = inputs.run(tmp_path / "run", "score.token_top=1", "score.layers=false")
    for ask, says in (
        (lambda: run.top("nobody"), ["'nobody'", "it has q"]),
        (lambda: run.layer_scores("q"), ["raylux score CONFIG score.layers=true"]),
        (lambda: run.token_scores("q", "nothing"), ["no sequence 'nothing'"]),
        (lambda: run.token_scores("q", run.top("q")["sequence"].iloc[-1]), ["raylux score CONFIG score.token_top="]),
    ):
        with pytest.raises(UserError) as error:
            ask()
        _line(str(error.value), *says)
    code, said = _command(capsys, "top", str(tmp_path / "run"), "--query", "nobody")
    assert code == 2
    _line(said, "nobody", "q")


def test_the_command_in_the_message_makes_what_was_missing(inputs: Inputs, tmp_path: Path) -> None:
    run = inputs.run(tmp_path / "run", "score.token_top=1")
    last = run.top("q")["sequence"].iloc[-1]
    with pytest.raises(MissingStageError) as error:
        run.token_scores("q", last)
    override = str(error.value).split("`")[1].split()[-1]
    assert len(inputs.run(tmp_path / "run", override).token_scores("q", last)) > 0


def test_results_before_there_are_any(inputs: Inputs, tmp_path: Path) -> None:
    run_stages(inputs.config(tmp_path / "run"), STAGES[:1], quiet=True)
    run = raylux.open_run(tmp_path / "run")
    assert run.scores().shape == (1, 0)
    with pytest.raises(MissingStageError, match=r"no scores of 'q'; run `raylux score CONFIG`"):
        run.top("q")


def test_torch_is_left_as_it_was(inputs: Inputs, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with pytest.raises(UserError):
        Config.parse(inputs.sections(tmp_path / "run"), ["engine.threads=0"])
    inputs.run(tmp_path / "run", "engine.threads=2")
    assert torch.get_num_threads() == before
