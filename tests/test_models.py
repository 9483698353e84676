"""Finding and loading models: every kind of path, what is refused and in which words."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerFast, T5Config

import raylux.gguf
from raylux.config import ModelSection
from raylux.errors import UserError
from raylux.models import (
    ModelFiles,
    context_length,
    coverage,
    find_model,
    load_config,
    load_model,
    load_structure,
    load_tokenizer,
    on_this_node,
    resolve_device,
    vocabulary_size,
)
from tests.architectures import CONTEXT, NAMES, build

IDS = torch.tensor([[5, 9, 2, 77, 31, 8]])


def byte_vocabulary() -> dict[str, int]:
    """128 tokens: two specials, a space alone and with an exclamation mark, 124 of the byte alphabet's characters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:124]
    return {token: i for i, token in enumerate(["<s>", "</s>", "Ġ", "Ġ!", *letters])}


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYLUX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved Llama with its tokenizer."""
    return save(build("llama"), tmp_path / "llama")


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def find(path: object, **keys: object) -> ModelFiles:
    return find_model(ModelSection(path=str(path), **keys))


# --- local folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_saved_model_loads_ready_for_gradients(name: str, dtype: str, tmp_path: Path) -> None:
    original = build(name)
    model = load_model(find(save(original, tmp_path / name)), dtype, "cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache is False
    kind = getattr(torch, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {kind}
    mask = torch.ones_like(IDS)
    expected = build(name, dtype=kind)(IDS, attention_mask=mask).logits
    assert torch.equal(model(IDS, attention_mask=mask).logits, expected)
    assert coverage(model) == coverage(original)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_come_from_the_config_of_every_architecture(name: str, tmp_path: Path) -> None:
    config = load_config(find(save(build(name), tmp_path / name)))
    assert (context_length(config), vocabulary_size(config)) == (CONTEXT, 128)


def test_a_model_without_position_limit_has_no_context_length() -> None:
    from transformers import BloomConfig, FalconConfig

    assert context_length(BloomConfig()) is None
    assert context_length(FalconConfig(alibi=True)) is None
    assert context_length(FalconConfig(alibi=False)) == 2048


def test_structure_has_the_layers_and_no_data(folder: Path) -> None:
    files = find(folder)
    empty = load_structure(files)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert coverage(empty) == coverage(load_model(files, "float32", "cpu"))


def test_the_tokenizer_may_be_elsewhere(folder: Path, tmp_path: Path) -> None:
    tokens = load_tokenizer(find(folder))("ab").input_ids
    bare = tmp_path / "bare"
    build("llama").save_pretrained(bare)
    assert load_tokenizer(find(bare, tokenizer=str(folder)))("ab").input_ids == tokens
    with pytest.raises(UserError, match=r"no tokenizer could be loaded .*set model\.tokenizer"):
        load_tokenizer(find(bare))


def test_a_url_is_copied_once_and_again_when_it_changes(folder: Path, cache: Path) -> None:
    url = f"file://{folder}"
    (folder / "training.log").write_text("not of the model")
    files = find(url)
    assert Path(files.folder).is_relative_to(cache)
    assert not (Path(files.folder) / "training.log").exists()
    assert torch.equal(load_model(files, "float32", "cpu")(IDS).logits, build("llama")(IDS).logits)
    assert find(url) == files and files.source == url
    there = replace(files, folder="/of/another/host")  # a worker's node has its own cache
    assert on_this_node(there) == files == on_this_node(files)
    save(build("llama", seed=1, intermediate_size=32), folder)
    assert find(url) != files


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(UserError, match="no CUDA device"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (resolve_device("auto"), resolve_device("cpu"), resolve_device("cuda")) == ("cuda", "cpu", "cuda")


# --- GGUF ----------------------------------------------------------------------------------------------------------


def permuted(weight: torch.Tensor, heads: int) -> np.ndarray:
    """Rows of a query or key projection as llama.cpp orders them: the halves of a head's rotation interleaved."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).numpy()


def write_gguf(model: PreTrainedModel, path: Path) -> Path:
    """A float32 GGUF file of a tiny Llama with tied embeddings and a byte tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(byte_vocabulary()))
    writer.add_token_types([3, 3] + [1] * 126)
    writer.add_token_merges(["Ġ !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    state = model.state_dict()
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for block in range(config.num_hidden_layers):
        prefix = f"model.layers.{block}"
        for short, name in parts.items():
            writer.add_tensor(f"blk.{block}.{short}.weight", state[f"{prefix}.{name}.weight"].numpy())
        for short, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            weight = state[f"{prefix}.self_attn.{short}_proj.weight"]
            writer.add_tensor(f"blk.{block}.attn_{short}.weight", permuted(weight, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(build("llama"), tmp_path / "tiny.gguf")


def test_a_gguf_file_is_converted_once(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = find(gguf_file)
    assert capsys.readouterr().err.count("happens once") == 1
    assert Path(files.folder).parent == cache / "models"
    assert files.tokenizer == files.folder
    assert list(Path(files.folder).glob("*.safetensors"))

    model = load_model(files, "float32", "cpu")
    torch.testing.assert_close(model(IDS).logits, build("llama")(IDS).logits, rtol=0, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert coverage(model) == coverage(build("llama"))
    assert load_tokenizer(files)("# !!").input_ids == [byte_vocabulary()[token] for token in ("#", "Ġ!", "!")]

    monkeypatch.setattr(raylux.gguf, "read_gguf", lambda *_: pytest.fail("converted twice"))
    assert find(gguf_file) == files
    assert capsys.readouterr().err == ""


def test_a_failed_conversion_leaves_nothing_behind(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(path: Path, label: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(raylux.gguf, "read_gguf", dies)
        with pytest.raises(KeyboardInterrupt):
            find(gguf_file)
    assert [entry for entry in (cache / "models").iterdir() if entry.is_dir()] == []
    assert (Path(find(gguf_file).folder) / "config.json").is_file()


def test_conversions_side_by_side_make_one_entry(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    read = raylux.gguf.read_gguf

    def counted(path: Path, label: str) -> tuple[object, object]:
        calls.append(1)
        return read(path, label)

    monkeypatch.setattr(raylux.gguf, "read_gguf", counted)
    found: list[ModelFiles] = []
    threads = [threading.Thread(target=lambda: found.append(find(gguf_file))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(found) == 3
    assert len(set(found)) == 1


def test_bad_gguf_files(tmp_path: Path, gguf_file: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UserError, match=r"other\.gguf: not a GGUF file"):
        find(other)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:900])
    with pytest.raises(UserError, match=r"cut\.gguf: transformers cannot read this GGUF file"):
        find(cut)
    with pytest.raises(UserError, match=r"missing\.gguf': no such file or folder"):
        find(tmp_path / "missing.gguf")


def test_gguf_without_its_packages(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raylux.gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf accelerate"):
        find(gguf_file)


# --- what is refused -------------------------------------------------------------------------------------------


def test_missing_places(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path '.*/nowhere': no such file or folder"):
        find(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model\.path './nowhere': no such file or folder"):
        find("./nowhere")
    with pytest.raises(UserError, match=r"model\.tokenizer '.*/nowhere': no such file or folder"):
        find(folder, tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"file:///nowhere/at/all': cannot be read"):
        find("file:///nowhere/at/all")
    with pytest.raises(UserError, match="is a file; name the model's folder"):
        find(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["some-owner/some-model", "gpt2"])
def test_a_hub_out_of_reach_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=rf"model\.path '{name}': .*the hub cannot be reached") as caught:
        find(name)
    assert "\n" not in str(caught.value)


def test_a_name_that_no_hub_has() -> None:
    with pytest.raises(UserError, match="not a name the hub knows"):
        find("my model")


def test_a_folder_without_config(tmp_path: Path, gguf_file: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json there.*; it holds tiny\.gguf: name that file"):
        find(tmp_path)
    gguf_file.unlink()
    with pytest.raises(UserError, match=r"no config\.json there"):
        find(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        find(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="names no model_type"):
        find(tmp_path)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors weights there"):
        find(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a format that can run code .*save_pretrained") as caught:
        find(folder)
    assert "\n" not in str(caught.value)


def test_code_in_the_model_folder_runs_only_on_request(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise ImportError('own code')\n")
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    with pytest.raises(UserError, match=r"ships its own code; set model\.trust_remote_code=true"):
        find(folder)
    with pytest.raises(UserError):
        load_config(ModelFiles(str(folder), str(folder)))
    assert not marker.exists()


def test_unknown_model_type(folder: Path) -> None:
    edit_config(folder, model_type="llamma")
    with pytest.raises(UserError, match="does not know model type 'llamma'"):
        find(folder)


def test_models_that_are_no_causal_language_models(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="'BertModel' is not a causal language model"):
        find(tmp_path / "bert")
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="'t5' is not a causal language model"):
        find(tmp_path / "t5")


def test_quantised_weights(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match=r"quantised \(gptq\)"):
        find(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    model = build("neox")
    model.gpt_neox.layers[1].mlp.dense_h_to_4h.weight[3, 5] = value
    files = find(save(model, tmp_path / "broken"))
    message = r"NaN or infinity in the weights of gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.weight$"
    with pytest.raises(UserError, match=message):
        load_model(files, "float32", "cpu")


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(find(folder), "float32", "cpu")


def test_weights_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=20)
    with pytest.raises(UserError, match="llama: the"):
        load_model(find(folder), "float32", "cpu")


def test_a_truncated_safetensors_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="a safetensors file is broken"):
        load_model(find(folder), "float32", "cpu")
