"""Model folders and files that are wrong: each ends in one line, before a run begins."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from raylux.modelcheck import check_folder
from raylux.models import coverage, load_model, load_structure, load_tokenizer
from tests.architectures import build
from tests.malformed import Case, case, refused, table
from tests.test_models import edit_config, find, save, write_gguf

WEIGHTS = "model.safetensors"
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama"), tmp_path_factory.mktemp("models") / "good")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLUX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "m"))


def serve(path: Path, **keys: Any) -> None:
    """Everything that a run does with a model before it begins."""
    files = find(path, **keys)
    coverage(load_structure(files))
    load_tokenizer(files)


def header(facts: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with a header that says ``facts``."""
    text = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32") -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


CONFIG = (
    case("vocab_size", None, "expected int, got NoneType"),
    case("vocab_size", "128", "expected int, got str"),
    case("vocab_size", 1.5, "expected int, got float"),
    case("vocab_size", True, "expected int, got bool"),
    case("vocab_size", 0, "no model can be built"),
    case("vocab_size", -1, "no model can be built"),
    case("vocab_size", 64, "'model.embed_tokens.weight' is [128, 16]", "[64, 16]"),
    case("vocab_size", 10**12, "config.json makes it [1000000000000, 16]"),
    case("vocab_size", 10**30, "'vocab_size' is", "which no model has"),
    case("hidden_size", 0, "config.json makes it [128, 0]"),
    case("hidden_size", -4, "config.json"),
    case("hidden_size", 15, "not a multiple of the number of attention heads"),
    case("hidden_size", 10**10, "config.json makes it [128, 10000000000]"),
    case("num_hidden_layers", 0, "no MLP layers found"),
    case("num_hidden_layers", "2", "expected int, got str"),
    case("num_hidden_layers", 10**9, "'num_hidden_layers' is 1000000000, which no model has"),
    case("num_attention_heads", 0, "transformers cannot read it"),
    case("num_attention_heads", -4, "no model can be built"),
    case("num_key_value_heads", 10**7, "'num_key_value_heads' is 10000000"),
    case("num_labels", 10**9, "'num_labels' is 1000000000"),
    case("max_position_embeddings", 0, "'max_position_embeddings' is 0"),
    case("max_position_embeddings", -64, "'max_position_embeddings' is -64"),
    case("max_position_embeddings", 10**20, "which no model has"),
    case("max_position_embeddings", "64", "expected int, got str"),
    case("intermediate_size", -3, "no model can be built"),
    case("intermediate_size", 20, "is [16, 24], config.json makes it [16, 20]"),
    case("head_dim", 0, "no model can be built"),
    case("rms_norm_eps", float("nan"), "'rms_norm_eps' is nan"),
    case("rope_parameters", {"rope_type": "x"}, "no model can be built"),
    case("rope_parameters", {"rope_theta": float("nan")}, "'rope_theta' is nan"),
    case("rope_parameters", 5, "transformers cannot read it"),
    case("hidden_act", "nope", "no model can be built", "nope"),
    case("dtype", "nope", "transformers cannot read it"),
    case("pad_token_id", 999, "no model can be built"),
    case("text_config", {"vocab_size": 3}, "transformers cannot read it"),
    case("attn_implementation", "nope", "no model can be built"),
    case("id2label", 5, "transformers cannot read it"),
    case("auto_map", 5, "transformers cannot read it"),
    case("model_type", None, "names no model_type"),
    case("model_type", 5, "names no model_type"),
    case("model_type", ["llama"], "names no model_type"),
    case("model_type", "nope", "does not know model type 'nope'"),
    case("model_type", "../x", "does not know model type '../x'"),
    case("model_type", "bert", "not a causal language model"),
    case("model_type", "vit", "not a causal language model"),
    case("is_encoder_decoder", True, "not a causal language model"),
    case("quantization_config", {}, "quantised (unknown method)"),
    case("quantization_config", "gptq", "quantised (unknown method)"),
    case("quantization_config", {"quant_method": "awq"}, "quantised (awq)"),
    case("transformers_weights", "../x.safetensors", "'transformers_weights' is not served"),
    case("transformers_weights", "pytorch_model.bin", "'transformers_weights' is not served"),
)

CONFIG_FILES = (
    case("empty", b"", "not valid JSON"),
    case("a list", b"[]", "names no model_type"),
    case("null", b"null", "names no model_type"),
    case("a key twice", b'{"model_type": "llama", "model_type": "gpt2"}', "'model_type' comes twice"),
    case("Latin-1", b'{"model_type": "\xe9"}', "not UTF-8"),
    case("a NUL", b"{}\0", "NUL"),
    case("brackets", b"[" * 10**5, "nested too deeply"),
    case("a pointer of Git LFS", b"version https://git-lfs", "not valid JSON"),
)

HEADERS = (
    case("empty", b"", "header"),
    case("7 bytes", b"\1" * 7, "header"),
    case("a header longer than the file", header({}, length=10**6), "header is longer than the file"),
    case("a header of 2^63", header({}, length=2**63), "header is longer than the file"),
    case("no JSON", header(b"nonsense"), "its header"),
    case("no UTF-8", header(b'{"\xff": 1}'), "its header"),
    case("a list", header([]), "its header"),
    case("null", header(None), "its header"),
    case("brackets", header(b"[" * 10**5), "nested too deeply"),
    case("a tensor twice", header(b'{"x": {}, "x": {}}'), "'x' comes twice"),
    case("a tensor without facts", header({"x": {}}), "its header"),
    case("a tensor that is a list", header({"x": []}), "its header"),
    case("an unknown dtype", header(tensor(dtype="F31"), bytes(4)), "broken"),
    case("a dtype that is a number", header(tensor(dtype=5), bytes(4)), "broken"),
    case("a shape below zero", header(tensor([-1]), bytes(4)), "its header"),
    case("a shape of floats", header(tensor([1.0]), bytes(4)), "its header"),
    case("a shape that is text", header(tensor("1"), bytes(4)), "its header"),
    case("a shape too large for its bytes", header(tensor([10**6]), bytes(4)), "broken"),
    case("a shape that overflows", header(tensor([2**62, 8]), bytes(4)), "broken"),
    case("bytes beyond the end", header(tensor(offsets=[0, 400]), bytes(4)), "'x' are not in the file"),
    case("bytes that end before they begin", header(tensor(offsets=[4, 0]), bytes(4)), "'x' are not in the file"),
    case("bytes before the file", header(tensor(offsets=[-8, -4]), bytes(4)), "its header"),
    case("infinite bytes", header(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}'), "its header"),
    case("three offsets", header(tensor(offsets=[0, 4, 8]), bytes(8)), "its header"),
    case("a hole", header(tensor(offsets=[4, 8]), bytes(8)), "broken"),
    case("bytes that nothing names", header(tensor(), bytes(8)), "broken"),
    case("two tensors in one place", header({**tensor(), "y": tensor()["x"]}, bytes(4)), "broken"),
    case("a pickle", pickle.dumps({"x": 1}), "broken"),
    case("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\n", "header"),
)


def index(data: Any) -> bytes:
    return json.dumps({"weight_map": data}).encode()


INDEXES = (
    case("no JSON", b"{", "not valid JSON"),
    case("a list", b"[]", "not an index"),
    case("no map", b"{}", "not an index"),
    case("an empty map", index({}), "not an index"),
    case("a map to numbers", index({"x": 5}), "not an index"),
    case("a map that is a list", index(["x"]), "not an index"),
    case("a file outside", index({"x": "../other/model.safetensors"}), "of its own folder only"),
    case("an absolute path", index({"x": "/etc/model.safetensors"}), "of its own folder only"),
    case("a folder below", index({"x": "sub/model.safetensors"}), "of its own folder only"),
    case("a pickle", index({"x": "pytorch_model.bin"}), "of its own folder only"),
    case("a NUL", index({"x": "a\0.safetensors"}), "of its own folder only"),
    case("a missing shard", index({"x": "a-1.safetensors"}), "which is not there"),
    case("a key twice", b'{"weight_map": {"x": "a", "x": "b"}}', "'x' comes twice"),
    case("brackets", b"[" * 10**5, "nested too deeply"),
)

# Of tokenizer.json or tokenizer_config.json.
TOKENIZERS = (
    case("tokenizer.json: empty", b"", "JSONDecodeError"),
    case("tokenizer.json: an object", b"{}", "no tokenizer could be loaded"),
    case("tokenizer.json: a list", b"[]", "no tokenizer could be loaded"),
    case("tokenizer.json: null", b"null", "no tokenizer could be loaded"),
    case("tokenizer.json: no UTF-8", b"\xff\xfe", "no tokenizer could be loaded"),
    case("tokenizer.json: a pickle", pickle.dumps({}), "no tokenizer could be loaded"),
    case("tokenizer_config.json: empty", b"", "no tokenizer could be loaded"),
    case("tokenizer_config.json: a list", b"[]", "no tokenizer could be loaded"),
    case("tokenizer_config.json: a class of a number", b'{"tokenizer_class": 5}', "no tokenizer could be loaded"),
    case("tokenizer_config.json: a token of a number", b'{"eos_token": 5}', "eos_token"),
    case(
        "tokenizer_config.json: its own code",
        b'{"auto_map": {"AutoTokenizer": ["own.Own", null]}}',
        "runs with model.trust_remote_code=true only",
    ),
)


@pytest.mark.parametrize("case", CONFIG, ids=lambda item: f"{item.name}={str(item.content)[:20]}")
def test_keys_of_config_json(case: Case, folder: Path) -> None:
    edit_config(folder, **{case.name: case.content})
    refused(lambda: serve(folder), *case.says)


@table(*CONFIG_FILES)
def test_files_for_config_json(case: Case, folder: Path) -> None:
    (folder / "config.json").write_bytes(case.content)
    refused(lambda: find(folder), "config.json", *case.says)


@table(*HEADERS)
def test_headers_of_safetensors(case: Case, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(case.content)
    refused(lambda: find(folder), WEIGHTS, *case.says)


@table(*INDEXES)
def test_indexes_of_safetensors(case: Case, folder: Path) -> None:
    (folder / f"{WEIGHTS}.index.json").write_bytes(case.content)
    refused(lambda: find(folder), f"{WEIGHTS}.index.json", *case.says)


@table(*TOKENIZERS)
def test_files_of_a_tokenizer(case: Case, folder: Path) -> None:
    (folder / case.name.split(":")[0]).write_bytes(case.content)
    refused(lambda: serve(folder), "no tokenizer could be loaded", *case.says)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "neox", "opt", "llama"])
def test_a_tokenizer_is_not_made_up(name: str, tmp_path: Path) -> None:
    """transformers builds some classes without their files: every text then has no token."""
    build(name).save_pretrained(tmp_path / "m")
    refused(lambda: serve(tmp_path / "m"), "no tokenizer could be loaded", "set model.tokenizer")


@pytest.mark.parametrize("pattern", ["nothing.*", "model.norm", "model.layers.*.self_attn", "lm_head", "[", "*.zzz"])
def test_patterns_that_track_nothing(pattern: str, good: Path) -> None:
    refused(lambda: coverage(load_structure(find(good)), [pattern]), "model.layers", f"'{pattern}'")


@pytest.mark.parametrize("key", ["path", "tokenizer"])
@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("~nobody_of_this_name/m", "cannot be read"),
        ("/" + "x" * 300, "cannot be read"),
        ("nosuch://m", "cannot be read"),
        ("http://[bad/m", "cannot be read"),
        ("package://nosuchpackage_x/m", "is not installed"),
        ("package://yaml/../..", "leaves the folder"),
        ("/dev/zero", "'/dev/zero'"),
        ("./m.gguf", "no such file or folder"),
    ],
)
def test_places_that_are_no_model(key: str, path: str, says: str, good: Path) -> None:
    refused(lambda: find(**{"path": good, key: path}), says)


# --- weights that load, but are not the model's ------------------------------------------------------------------


def test_layers_that_config_json_does_not_count_are_not_dropped(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    refused(lambda: load_model(find(folder), "float32", "cpu"), "fewer layers than the checkpoint", "model.layers.1.")


def test_layers_that_the_checkpoint_lacks_are_not_made_up(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    refused(lambda: load_model(find(folder), "float32", "cpu"), "has no weights for model.layers.2.")


def test_an_adapter_is_not_left_out(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/etc"}))
    refused(lambda: find(folder), "holds an adapter", "model.adapter")


def test_good_bytes_in_odd_company_are_read(folder: Path) -> None:
    edit_config(folder, quantization_config=None, auto_map={"AutoModelForCausalLM": "own.Model"})
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    serve(folder)


# --- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(build("llama"), tmp_path_factory.mktemp("gguf") / "good.gguf").read_bytes()


GGUF: tuple[Case, ...] = (
    case("empty", lambda data: b"", "not a GGUF file"),
    case("a zip", lambda data: b"PK\3\4" + data[4:], "not a GGUF file"),
    case("only the magic", lambda data: data[:4], "cannot read this GGUF file"),
    case("another version", lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "cannot read this GGUF file"),
    case("2^64 tensors", lambda data: data[:8] + b"\xff" * 8 + data[16:], "cannot read this GGUF file"),
    case("2^64 keys", lambda data: data[:16] + b"\xff" * 8 + data[24:], "cannot read this GGUF file"),
    case("fewer tensors", lambda data: data[:8] + struct.pack("<Q", 5) + data[16:], "has no weights for model.layers"),
    case("half", lambda data: data[: len(data) // 2], "cannot read this GGUF file"),
    case("the last tensor cut", lambda data: data[:-500], "cannot read this GGUF file"),
    case("another architecture", lambda data: data.replace(b"llama", b"zzzzz"), "cannot read this GGUF file"),
    case("a tensor by another name", lambda data: data.replace(b"1.ffn_up", b"1.fff_up"), f"no weights for {LAYER}"),
    case("a tensor twice", lambda data: data.replace(b"1.ffn_up", b"0.ffn_up"), "cannot read this GGUF file"),
)


@table(*GGUF)
def test_gguf(case: Case, gguf_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(case.content(gguf_bytes))
    refused(lambda: find(tmp_path / "a.gguf"), "a.gguf", *case.says)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_gguf_with_nan(gguf_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf_bytes[:-64] + np.full(16, np.nan, np.float32).tobytes())
    refused(lambda: load_model(find(tmp_path / "a.gguf"), "float32", "cpu"), "NaN or infinity in the weights")


def test_weights_larger_than_this_machine_are_no_broken_file(tmp_path: Path) -> None:
    """Its shapes serve a plan for a cluster; the file has holes in the place of numbers."""
    build("llama").save_pretrained(tmp_path)
    size = 2 * psutil.virtual_memory().total // 4 * 4
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert check_folder(tmp_path, "model.path", trust_remote_code=False) == "causal-lm"
