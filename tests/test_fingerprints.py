"""Fingerprints: a change of the inputs is found and named, whatever the cache holds, and files are read once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raylux import fingerprints, hashing, weights
from raylux.errors import UserError
from raylux.fingerprints import ModelPrint, of_file, of_model, of_source, of_weights
from raylux.models import ModelFiles
from tests.architectures import build
from tests.small import tokenizer

LONG_AGO = 1_600_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYLUX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hashes"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("gpt2").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    _settle(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content is read."""
    names: list[str] = []
    for owner, name in ((weights, "_hash_tensors"), (hashing, "_of_bytes")):
        usual = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda path, usual=usual: names.append(path.name) or usual(path))
    return names


def _settle(folder: Path) -> None:
    """Files that changed a moment ago are not kept in the cache."""
    for path in folder.iterdir():
        os.utime(path, (LONG_AGO, LONG_AGO))


def _print(folder: Path) -> ModelPrint:
    return of_model(ModelFiles(str(folder), str(folder)))


def _weights(folder: Path, change: tuple[str, float] | None = None) -> None:
    """Write the folder's weights again, one number of them changed; sizes and times stay what they were."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if change is not None:
        tensors[change[0]].view(-1)[0] = change[1]
    save_file(tensors, path, metadata={"format": "pt"})
    _settle(folder)


# ------------------------------------------------------------------------------------------- what changed


def test_a_changed_number_names_its_tensor(folder: Path) -> None:
    before = _print(folder)
    size = (folder / "model.safetensors").stat().st_size
    _weights(folder, ("transformer.h.1.mlp.c_fc.weight", 0.25))
    assert (folder / "model.safetensors").stat().st_size == size  # nor did the time change
    total = len(before.tensors)
    assert before.weights_changed(_print(folder)) == (
        f"weights differ: 1 of {total} tensors (first: transformer.h.1.mlp.c_fc.weight)"
    )
    assert before.config_changed(_print(folder)) is None
    assert before.tokenizer_changed(_print(folder)) is None


def test_dtype_shape_and_name_count_beside_the_bytes(tmp_path: Path) -> None:
    kinds = {
        "f32": {"w": torch.zeros(2, 3)},
        "i32": {"w": torch.zeros(2, 3, dtype=torch.int32)},
        "shape": {"w": torch.zeros(3, 2)},
        "name": {"v": torch.zeros(2, 3)},
    }
    found = set()
    for name, tensors in kinds.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        found |= set(weights.tensor_hashes(tmp_path / name).values())
    assert len(found) == len(kinds)


def test_the_same_model_in_shards_and_in_one_file_is_the_same(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert weights.tensor_hashes(tmp_path / "shards") == weights.tensor_hashes(folder)
    (tmp_path / "shards" / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert of_weights(str(tmp_path / "shards")) == of_weights(str(folder))


def test_tensors_are_hashed_as_their_bytes_lie(tmp_path: Path) -> None:
    """More than one block of bytes, and a tensor of none."""
    torch.manual_seed(0)
    tensors = {"large": torch.randn(1500, 1000), "empty": torch.zeros(0, 3), "one": torch.ones(())}
    save_file(tensors, tmp_path / "model.safetensors")
    head = b"large\0F32\0[1500, 1000]\0"
    wanted = hashlib.blake2b(head + tensors["large"].numpy().tobytes(), digest_size=8).hexdigest()
    assert weights.tensor_hashes(tmp_path)["large"] == wanted


def test_config_tokenizer_and_code_are_named(folder: Path) -> None:
    before = _print(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}), encoding="utf-8")
    assert before.config_changed(_print(folder)) is None  # who wrote it does not count, nor how it is laid out
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-3}), encoding="utf-8")
    assert before.config_changed(_print(folder)) == "config.json differs"
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text + " ", encoding="utf-8")
    assert before.tokenizer_changed(_print(folder)) == "tokenizer differs (tokenizer.json)"
    (folder / "modeling_own.py").write_text("x = 1", encoding="utf-8")
    assert before.code_changed(_print(folder)) == "the model's code differs (modeling_own.py)"
    assert before.weights_changed(_print(folder)) is None


def test_what_run_yaml_keeps_comes_back(folder: Path) -> None:
    found = _print(folder)
    assert ModelPrint.load(json.loads(json.dumps(found.dump()))) == found
    assert all(len(value) == 16 for value in found.tensors.values())


def test_one_digest_for_workers_on_other_nodes(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    before = of_weights(str(folder))
    assert of_weights(str(tmp_path / "elsewhere")) == before and len(before) == 32
    _weights(tmp_path / "elsewhere", ("transformer.h.0.mlp.c_fc.bias", 7.0))
    assert of_weights(str(tmp_path / "elsewhere")) != before
    assert fingerprints.digest({"a": "1", "b": "2"}) == fingerprints.digest({"b": "2", "a": "1"})
    assert fingerprints.digest({"a": "1"}, {}) != fingerprints.digest({}, {"a": "1"})


# --------------------------------------------------------------------------------------------- the cache


def test_a_file_that_did_not_change_is_read_once(folder: Path, reads: list[str]) -> None:
    before = _print(folder)
    assert "model.safetensors" in reads and "tokenizer.json" in reads
    reads.clear()
    assert _print(folder) == before and reads == []
    assert of_weights(str(folder)) and reads == []


def test_a_file_with_other_bytes_but_the_same_size_and_time_is_read_again(folder: Path, reads: list[str]) -> None:
    """Archives and copies bring the times that files had elsewhere."""
    before, facts = _print(folder), (folder / "model.safetensors").stat()
    _weights(folder, ("transformer.wte.weight", 3.0))
    now = (folder / "model.safetensors").stat()
    assert (now.st_size, now.st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)
    assert _print(folder).tensors != before.tensors


def test_a_file_that_may_still_change_is_not_cached(folder: Path, reads: list[str]) -> None:
    (folder / "model.safetensors").touch()
    _print(folder)
    reads.clear()
    _print(folder)
    assert reads == ["model.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "empty", "a hash", "a list", "binary", "pickle"])
def test_a_damaged_entry_is_computed_again(folder: Path, cache: Path, reads: list[str], damage: str) -> None:
    before = _print(folder)
    for entry in cache.iterdir():
        text = entry.read_text(encoding="utf-8")
        data = json.loads(text)
        first = next(iter(data["hashes"]))
        data["hashes"][first] = "0" * 16
        entry.write_bytes(
            {
                "cut": text[: len(text) // 2].encode(),
                "empty": b"",
                "a hash": json.dumps(data).encode(),
                "a list": b"[]",
                "binary": b"\xff\x00\xfe",
                "pickle": b"\x80\x04\x95",
            }[damage]
        )
    reads.clear()
    assert _print(folder) == before and "model.safetensors" in reads
    reads.clear()
    assert _print(folder) == before and reads == []  # mended


def test_a_cache_that_cannot_be_written_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _print(folder)
    monkeypatch.setenv("RAYLUX_CACHE", os.devnull)
    assert _print(folder) == before


def test_a_link_that_points_elsewhere_is_another_file(folder: Path, tmp_path: Path) -> None:
    """As in the hub's cache, where a model's files are links into a heap of blobs."""
    shutil.copytree(folder, tmp_path / "other")
    _weights(tmp_path / "other", ("transformer.wte.weight", 3.0))
    linked = tmp_path / "linked"
    shutil.copytree(folder, linked)
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(folder / "model.safetensors")
    before = of_weights(str(linked))
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(tmp_path / "other" / "model.safetensors")
    assert of_weights(str(linked)) != before


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "growing.jsonl"
    path.write_text("1\n", encoding="utf-8")
    usual = hashing._of_bytes

    def grow(real: Path) -> str:
        found = usual(real)
        path.write_text("1\n2\n", encoding="utf-8")
        return found

    monkeypatch.setattr(hashing, "_of_bytes", grow)
    with pytest.raises(UserError, match="changed while it was read"):
        of_file(path)


# -------------------------------------------------------------------------------------------- the corpus


def test_corpus_files_are_hashed_once_and_by_content(tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "corpus").mkdir()
    for name in ("a", "b"):
        (tmp_path / "corpus" / f"{name}.txt").write_text(name, encoding="utf-8")
    _settle(tmp_path / "corpus")
    before = of_source(str(tmp_path / "corpus"))
    assert before["files"] == 2 and sorted(reads) == ["a.txt", "b.txt"]
    reads.clear()
    assert of_source(str(tmp_path / "corpus")) == before and reads == []
    (tmp_path / "corpus" / "b.txt").write_text("c", encoding="utf-8")
    assert of_source(str(tmp_path / "corpus"))["content"] != before["content"] and reads == ["b.txt"]


# ---------------------------------------------------------------------------------------- broken weights


@pytest.mark.parametrize("spoil", ["cut", "no header", "long header", "offsets", "empty"])
def test_a_broken_safetensors_file_is_named(folder: Path, spoil: str) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [-64, 4]}}).encode()
    path.write_bytes(
        {
            "cut": data[:-9],
            "no header": data[:8] + b"x" * 50_000,
            "long header": b"\xff" * 8 + data[8:],
            "offsets": len(header).to_bytes(8, "little") + header + b"\0" * 99,
            "empty": b"",
        }[spoil]
    )
    with pytest.raises(UserError, match="a safetensors file is broken"):
        of_weights(str(folder))
