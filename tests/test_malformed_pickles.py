"""Nothing that a user brings runs: no pickle, no code of a model, no script of a corpus; no path leaves its folder."""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raylux.models import coverage, load_model, load_structure, load_tokenizer
from raylux.queries import load_queries
from raylux.sources import resolve
from tests.architectures import build
from tests.corpora import PLAIN, load
from tests.malformed import refused, valid_or_refused
from tests.test_models import edit_config, find, save


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama"), tmp_path_factory.mktemp("models") / "good")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLUX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def payload(marker: Path) -> bytes:
    data = pickle.dumps(Payload(marker))
    pickle.loads(data)
    assert marker.exists(), "a payload that does nothing proves nothing"
    marker.unlink()
    return data


def serve(folder: Path) -> None:
    files = find(folder)
    coverage(load_structure(files))
    load_tokenizer(files)
    load_model(files, "float32", "cpu")


BESIDE = ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "scheduler.pt", "vocab.pkl", "x.npy")
INSTEAD = ("model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer.model")
MORE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "adapter_model.bin", "merges.txt")


@pytest.mark.parametrize("name", [*BESIDE, *INSTEAD, *MORE])
def test_a_pickle_in_a_models_folder(name: str, good: Path, tmp_path: Path, payload: bytes, marker: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "m"))
    (folder / name).write_bytes(payload)
    valid_or_refused(lambda: serve(folder))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "tf_model.h5"])
def test_weights_that_are_pickled_alone(name: str, good: Path, tmp_path: Path, payload: bytes, marker: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "m"))
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload(marker)}, folder / name)
    refused(lambda: serve(folder), name, "can run code when read")
    assert not marker.exists()


def test_a_pickle_called_gguf(tmp_path: Path, payload: bytes, marker: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(payload)
    refused(lambda: find(tmp_path / "a.gguf"), "not a GGUF file")
    assert not marker.exists()


@pytest.mark.parametrize("model_type", ["own", "llama"])
def test_code_of_a_model(model_type: str, good: Path, tmp_path: Path, marker: Path) -> None:
    """Under a name of its own it is refused; under a known name the library's own code serves."""
    folder = Path(shutil.copytree(good, tmp_path / "m"))
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    edit_config(
        folder, model_type=model_type, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    )
    if model_type == "own":
        refused(lambda: serve(folder), "ships its own code", "model.trust_remote_code=true")
    else:
        serve(folder)
    assert not marker.exists()


def test_code_of_a_tokenizer(good: Path, tmp_path: Path, marker: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "m"))
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    refused(lambda: serve(folder), "runs with model.trust_remote_code=true only")
    assert not marker.exists()


@pytest.mark.parametrize("form", ["auto", "jsonl", "json", "parquet", "text", "hub"])
@pytest.mark.parametrize("name", ["a.pkl", "a.jsonl", "a.json", "a.parquet", "a.txt", "a.npy", "a.pt", "a.arrow"])
def test_a_pickle_for_a_corpus(name: str, form: str, tmp_path: Path, payload: bytes, marker: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / name).write_bytes(payload)
    valid_or_refused(lambda: load(tmp_path / "c" / name, format=form))
    valid_or_refused(lambda: load(tmp_path / "c", format=form))
    assert not marker.exists()


def test_an_array_of_objects_for_a_corpus(tmp_path: Path, marker: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([Payload(marker)], dtype=object), allow_pickle=True)
    refused(lambda: load(tmp_path / "a.npy"), "cannot tell the format")
    refused(lambda: load(tmp_path / "a.npy", format="text"), "NUL")
    assert not marker.exists()


def test_an_extension_type_in_a_parquet_file(tmp_path: Path, payload: bytes, marker: Path) -> None:
    """pyarrow once unpickled such types when it met them."""
    facts = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
    field = pa.field("text", pa.string(), metadata=facts)
    pq.write_table(pa.Table.from_arrays([pa.array(["the fox"])], schema=pa.schema([field])), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet").table["text"].tolist() == ["the fox"]
    assert not marker.exists()


@pytest.mark.parametrize("form", ["auto", "hub"])
def test_a_script_in_a_corpus_folder(form: str, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "corpus.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    (folder / "a.jsonl").write_text('{"text": "the fox"}\n')
    valid_or_refused(lambda: load(folder, format=form))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["q.yaml", "q.json", "q.jsonl", "q.pkl", "q.py"])
def test_a_pickle_for_queries(name: str, tmp_path: Path, payload: bytes, marker: Path) -> None:
    (tmp_path / name).write_bytes(payload)
    refused(lambda: load_queries(str(tmp_path / name), PLAIN, 300, None), name)
    assert not marker.exists()


@pytest.mark.parametrize("tag", ["object/apply:pathlib.Path.touch", "object/new:pathlib.Path", "name:os.system"])
def test_a_tag_that_makes_objects(tag: str, tmp_path: Path, marker: Path) -> None:
    (tmp_path / "q.yaml").write_text(f"- !!python/{tag} ['{marker}']\n")
    refused(lambda: load_queries(str(tmp_path / "q.yaml"), PLAIN, 300, None), "line 1", "the tag !!python")
    assert not marker.exists()


# --- paths -----------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose links lead out of it and around within it, beside a secret."""
    folder = tmp_path / "site" / "toylinks"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data" / "a.txt").write_text("hello")
    (tmp_path / "site" / "secret.txt").write_text("secret")
    (folder / "inside.txt").symlink_to(folder / "data" / "a.txt")
    (folder / "out.txt").symlink_to(tmp_path / "site" / "secret.txt")
    (folder / "outdir").symlink_to(tmp_path / "site")
    (folder / "loop").symlink_to("loop")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    return folder


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("out.txt", "leaves the folder"),
        ("outdir/secret.txt", "leaves the folder"),
        ("outdir", "leaves the folder"),
        ("..", "leaves the folder"),
        ("data/../../secret.txt", "leaves the folder"),
        ("outdir/toylinks/../secret.txt", "leaves the folder"),
        ("/etc/passwd", "leaves the folder"),
        ("//etc/passwd", "leaves the folder"),
        ("../toylinks2/a.txt", "leaves the folder"),
        ("data\\..\\..\\secret.txt", "has no file"),
        ("%2e%2e/secret.txt", "has no file"),
        ("loop", "cannot be read"),
        ("x" * 300, "cannot be read"),
    ],
)
def test_a_path_into_a_package_stays_in_it(package: Path, name: str, says: str) -> None:
    path = f"package://toylinks/{name}"
    refused(lambda: resolve(path), says)
    refused(lambda: resolve(path + "\0"), "U+0000")
    refused(lambda: load(path), says)
    refused(lambda: load_queries(path, PLAIN, 300, None), says)


def test_a_link_within_a_package_is_followed(package: Path) -> None:
    assert Path(resolve("package://toylinks/inside.txt")).read_text() == "hello"
