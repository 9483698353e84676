"""A model over several devices, or read from disk: equal bits, bytes by device, and what is refused."""

from __future__ import annotations

import itertools
import multiprocessing
import weakref
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import accelerate.hooks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import raylux
from raylux import models, placement, prepare
from raylux.batches import collate
from raylux.capture import Capture
from raylux.config import Config, ModelSection
from raylux.cost.fit import rooms
from raylux.cost.model import ModelShape
from raylux.cost.passes import covariance_held, split
from raylux.engine.capacity import GIB, Demand, Node, fit_nodes
from raylux.engine.demand import demand_of
from raylux.errors import UserError
from raylux.experts import split_experts
from raylux.groups import input_groups
from raylux.memory import give_back_at_once
from raylux.models import coverage
from raylux.placement import Placement, parts_of, placed, runs
from tests.architectures import build
from tests.several_devices import SECOND, halves, second_device, spread
from tests.small import contents, differing, make_inputs
from tests.test_experts import rows_of

EXACT = ("model.dtype=float64", "query.max_error=0", "corpus.limit=24", "score.unit_size=9")
BLOCKS = '{"": cpu, model.layers: disk}'
HEAD = '{"": cpu, lm_head: disk}'
SOME = "{model.embed_tokens: cpu, model.layers.0: disk, model.layers.1: cpu, model.norm: disk, lm_head: cpu}"


def section(device_map: Any = None, **more: Any) -> ModelSection:
    return ModelSection(path="model", device_map=device_map, **more)


# ------------------------------------------------------------------------------------------ which part where


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_runs_are_as_even_as_can_be(sizes: list[int], count: int) -> None:
    found = runs(sizes, count)
    assert found == sorted(found) and set(found) <= set(range(count))
    cuts = itertools.combinations_with_replacement(range(len(sizes) + 1), count - 1)
    ways = (itertools.pairwise((0, *ends, len(sizes))) for ends in cuts)
    least = min(max(sum(sizes[start:stop]) for start, stop in way) for way in ways)
    assert max(sum(size for size, at in zip(sizes, found, strict=True) if at == number) for number in found) == least


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox", "opt", "mixtral"])
def test_parts_are_blocks_and_what_stands_beside_them(architecture: str) -> None:
    model = build(architecture).to("meta")
    split_experts(model)
    parts = parts_of(model)
    assert sum(part.parameters for part in parts) == sum(p.numel() for p in model.parameters())
    blocks = [part for part in parts if part.block]
    assert len(blocks) == model.config.num_hidden_layers
    assert len({part.name.rpartition(".")[0] for part in blocks}) == 1
    for name, _ in model.named_parameters():
        assert sum(name.startswith(f"{part.name}.") for part in parts) == 1
    for layer in coverage(model).tracked:
        assert any(layer.name.startswith(f"{part.name}.") for part in blocks)


def test_bytes_of_each_device_by_hand() -> None:
    """Embedding, head 128 × 16; a norm of 16; 3 blocks of q, o 16 × 16, k, v 8 × 16, MLP 3 × 24 × 16, 2 norms."""
    model = build("llama", num_hidden_layers=3, tie_word_embeddings=False).to("meta")
    table, block = 128 * 16, 2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16 + 2 * 16
    two = placed(model, section("balanced"), "cuda", 2)
    assert two is not None and two.computing == ("cuda:0", "cuda:1")
    assert [two.held(f"cuda:{number}") for number in range(2)] == [table + 2 * block, block + 16 + table]
    assert two.held("cpu") == 0 and not two.reads
    assert two.runs_on("model.layers.1.mlp.up_proj") == "cuda:0" and two.runs_on("model.layers.2.mlp") == "cuda:1"
    disk = placed(model, section({"": "cpu", "model.layers": "disk", "lm_head": "disk"}), "cpu", 1)
    assert disk is not None and disk.computing == ("cpu",) and len(disk.reads) == 4
    # A block at a time, the head for as long as the graph is there; all of it where nothing is run twice.
    assert disk.held("cpu") == table + 16 + table + block
    assert disk.held("cpu", graph=True) == 2 * table + 16 + 3 * block
    mixed = placed(model, section({"": 1, "model.embed_tokens": 0, "model.layers.0": "cpu"}), "cuda", 2)
    assert mixed is not None and [part.name for part in mixed.reads] == ["model.layers.0"]
    assert mixed.runs_on("model.layers.0.mlp.up_proj") == "cuda:0"
    assert [mixed.held(where) for where in ("cuda:0", "cuda:1", "cpu")] == [
        table + block, 2 * block + 16 + table, block,
    ]  # fmt: skip


def test_auto_reads_as_few_blocks_as_memory_asks_for() -> None:
    model = build("llama", num_hidden_layers=4, tie_word_embeddings=False).to("meta")
    whole = sum(part.parameters for part in parts_of(model))
    block = next(part.parameters for part in parts_of(model) if part.block)
    for room, reads in ((whole, 0), (whole - 1, 2), (whole - block, 2), (whole - block - 1, 3), (0, 4)):
        found = placed(model, section("auto"), "cpu", 1, {"cpu": room})
        assert found is not None and len(found.reads) == reads
        assert [part.name for part in found.reads] == [f"model.layers.{number}" for number in range(reads)]
        assert found.held("cpu") <= max(room, whole - 3 * block)


def test_a_worker_on_the_cpu_is_sized_by_what_it_holds() -> None:
    model = build("llama", num_hidden_layers=4).to("meta")
    covered = coverage(model)
    groups = {layer.name: layer.name for layer in covered.tracked}
    disk = placed(model, section({"": "cpu", "model.layers": "disk"}), "cpu", 1)
    assert disk is not None

    def size(placement: Placement | None, iterative: bool = False) -> int:
        engine = Config.parse({"run": {"folder": "r"}, "model": {"path": "m"}, "corpus": {"path": "c"},
                               "queries": {"path": "q"}}).engine  # fmt: skip
        return demand_of(
            engine, "float64", "cpu", covered.tracked, groups, covered.parameters, 1, iterative, placement=placement
        ).worker_bytes

    assert size(None) - size(disk) == 8 * (covered.parameters - disk.held("cpu"))
    assert size(None, True) == size(disk, True)  # the products of a solver hold the whole graph


def test_the_plan_counts_each_device_by_itself() -> None:
    """By hand, in float32: two blocks, embedding and logits on the first GPU; one block and the head on the second."""
    model = build("llama", num_hidden_layers=3, tie_word_embeddings=False).to("meta")
    covered = coverage(model)
    groups = input_groups(model, covered.tracked)
    spread_over = placed(model, section("balanced"), "cuda", 2)
    shape = ModelShape.of(model, covered, groups).run_by(False, spread_over)
    table, block = 128 * 16, 2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16 + 2 * 16
    # Of a token: residual stream 8 × 16 and gate, up 3 × 48 in a block; a and g of its layers; logits, their softmax.
    activations, captured, logits = 4 * (8 * 16 + 3 * 48), 4 * (16 + 24 + 24 + 24 + 16), 128 * (4 + 8)
    beside = [
        4 * (table + 2 * block) + 10 * (2 * (activations + captured) + logits),
        4 * (block + 16 + table) + 10 * (activations + captured),
    ]
    found = rooms(shape, 4, 10, 1e9, 1e6)
    assert found.of == {f"cuda:{number}": 1e9 - 1e6 - size for number, size in enumerate(beside)}
    # A of gate and up together 16 × 16, their S 24 × 24, of down 24 × 24 and 16 × 16: in float32 for each block.
    sums = 4 * (16 * 16 + 2 * 24 * 24 + 24 * 24 + 16 * 16)
    held = covariance_held(groups, 4)
    whole = split(covered.tracked, groups, 1, found.devices)
    assert found.short(whole, held) == max(beside[0] + 2 * sums, beside[1] + sums) + 1e6 - 1e9
    halves_of = split(covered.tracked, groups, 2, found.devices)
    assert [{found.devices[layer.name] for layer in run} for run in halves_of] == [{"cuda:0", "cuda:1"}] * 2
    assert sorted(layer.name for run in halves_of for layer in run) == sorted(groups)
    assert found.short(halves_of, held) < found.short(whole, held)


# ------------------------------------------------------------------------------------------ equal bits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    base = tmp_path_factory.mktemp("llama")
    inputs = make_inputs(base / "inputs", "llama", tie_word_embeddings=False)
    inputs.run(base / "plain", *EXACT)
    return inputs, contents(base / "plain")


@pytest.mark.parametrize("device_map", ["balanced", BLOCKS, SOME])
def test_a_map_changes_no_bit(llama: Any, tmp_path: Path, device_map: str) -> None:
    inputs, usual = llama
    inputs.run(tmp_path / "run", *EXACT, f"model.device_map={device_map}")
    assert differing(contents(tmp_path / "run"), usual) == []


@pytest.mark.parametrize("device_map", [BLOCKS, HEAD])
def test_a_map_changes_no_bit_in_float32(llama: Any, tmp_path: Path, device_map: str) -> None:
    """A head that is read anew is brought once more, for the gradient by what it read."""
    inputs, _ = llama
    how = ("model.dtype=float32", *EXACT[1:], "corpus.limit=12")
    inputs.run(tmp_path / "plain", *how)
    inputs.run(tmp_path / "run", *how, f"model.device_map={device_map}")
    assert differing(contents(tmp_path / "run"), contents(tmp_path / "plain")) == []


def test_a_run_goes_on_with_another_map(llama: Any, tmp_path: Path) -> None:
    inputs, usual = llama
    inputs.ask("a", "b")
    inputs.run(tmp_path / "run", *EXACT)
    inputs.ask()
    inputs.run(tmp_path / "run", *EXACT, f"model.device_map={BLOCKS}", "fit.passes=2")
    assert differing(contents(tmp_path / "run"), usual) == []


def test_workers_on_ray_read_their_blocks_from_disk(llama: Any, tmp_path: Path, ray_cluster: Any) -> None:
    inputs, usual = llama
    how = ("engine.backend=ray", "engine.workers=1", "engine.shards=1", f"model.device_map={BLOCKS}")
    inputs.run(tmp_path / "run", *EXACT, *how)
    assert differing(contents(tmp_path / "run"), usual) == []


@pytest.mark.parametrize(
    ("architecture", "sizes", "how"),
    [
        ("llama", {"tie_word_embeddings": False}, ("fit.passes=2", "score.self_influence=true", "corpus.limit=16")),
        ("mixtral", {"num_hidden_layers": 2}, ("corpus.limit=8", "engine.keep_captured=never")),
        ("llama", {"tie_word_embeddings": False}, ("curvature.solver=pcg", "curvature.iterations=2", "corpus.limit=8")),
    ],
    ids=["llama", "mixtral", "pcg"],
)
def test_a_second_device_changes_no_bit(
    architecture: str, sizes: dict[str, Any], how: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not there: whatever meets what lies elsewhere raises, as it would on a GPU."""
    inputs = make_inputs(tmp_path / "inputs", architecture, **sizes)
    inputs.ask("a")
    inputs.run(tmp_path / "plain", *EXACT, *how)
    load, found = models.load_model, []

    def placement_of(config: Config, files: models.ModelFiles, device: str) -> Placement:
        structure = models.load_structure(files)
        found.append(halves(structure))
        assert {found[-1].runs_on(layer.name) for layer in coverage(structure).tracked} == {"cpu", SECOND}
        return found[-1]

    monkeypatch.setattr(prepare, "placement_of", placement_of)
    monkeypatch.setattr(models, "load_model", lambda *args: spread(load(*args[:4]), args[4]))
    with second_device():
        inputs.run(tmp_path / "two", *EXACT, *how)
    assert len(found) == 1
    assert differing(contents(tmp_path / "two"), contents(tmp_path / "plain")) == []


def test_two_devices_that_meet_are_found_out() -> None:
    """The check of these tests can fail: nothing brings these together."""
    with second_device():
        there = torch.ones(3, device=SECOND)
        assert torch.equal((there + 1).cpu(), torch.full((3,), 2.0))
        with pytest.raises(RuntimeError, match="meet"):
            there + torch.ones(3)


# ------------------------------------------------------------------------------------------ memory


def test_no_more_than_a_block_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the weights that are alive whenever one more is read, in a forward and backward pass of a batch."""
    build("llama", num_hidden_layers=6, tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    files = models.ModelFiles(str(tmp_path / "model"), "")
    structure = models.load_structure(files)
    found = placed(structure, section({"": "cpu", "model.layers": "disk"}), "cpu", 1)
    model = models.load_model(files, "float64", "cpu", placement=found)
    alive: dict[int, int] = {}
    most = 0
    put = accelerate.hooks.set_module_tensor_to_device

    def reads(module: Any, name: str, device: Any, *args: Any, **more: Any) -> Any:
        nonlocal most
        result = put(module, name, device, *args, **more)
        tensor = module.get_parameter(name).data if name in dict(module.named_parameters(recurse=False)) else None
        if tensor is not None and not tensor.is_meta:
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            alive[place] = tensor.numel()
            weakref.finalize(module.get_parameter(name), alive.pop, place, None)
            most = max(most, sum(alive.values()))
        return result

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", reads)
    layers = coverage(structure).tracked
    block = next(part.parameters for part in parts_of(structure) if part.block)
    batch = collate(rows_of([9, 5]), [0, 1], 16)
    Capture(model, layers, checkpointing=True).run(batch)
    assert 0 < most <= block and not alive
    most = 0
    Capture(model, layers).run(batch)
    assert most >= 5 * block  # the graph would hold them all


def grown_by(folder: str, device_map: dict[str, str] | None) -> int:
    """Bytes by which a process grows that loads a model and runs a batch: weights in float64, made of float32."""
    files = models.ModelFiles(folder, "")
    structure = models.load_structure(files)
    found = placed(structure, section(device_map), "cpu", 1)
    if found is not None:
        give_back_at_once()

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in status if line.startswith("RssAnon")).split()[1])

    before = most = anonymous()

    def look(*_: Any) -> None:
        nonlocal most
        most = max(most, anonymous())

    model = models.load_model(files, "float64", "cpu", placement=found)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(look)
    Capture(model, coverage(structure).tracked, checkpointing=True).run(collate(rows_of([9, 5]), [0, 1], 16))
    return most - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory of a process")
def test_a_model_larger_than_the_memory_it_takes(tmp_path: Path) -> None:
    """126 MB of weights in 16 blocks: as a whole, and a block at a time."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 4}
    model = build("llama", torch.float32, tie_word_embeddings=False, **sizes)
    model.save_pretrained(tmp_path)
    weights = 8 * sum(parameter.numel() for parameter in model.parameters())
    found = {}
    # Processes of their own, whose memory is nobody else's, forked from one that has everything imported.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for name, device_map in (("plain", None), ("disk", {"": "cpu", "model.layers": "disk"})):
        with ProcessPoolExecutor(1, context) as pool:
            found[name] = pool.submit(grown_by, str(tmp_path), device_map).result()
    assert weights > 126e6 and found["plain"] > weights
    assert found["disk"] < weights / 3


# ------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.device_map={model.layer: cpu}"], ["no module 'model.layer'", "did you mean 'model.layers'"]),
        (["model.device_map={model.embed_tokens: cpu}"], ["leaves out 'model.layers.0'", "and 3 more"]),
        (['model.device_map={"": cpu, model.layers.0.mlp: disk}'], ["is a piece of 'model.layers.0'"]),
        (['model.device_map={"": 0}'], ["GPU 0", "model.device is cpu"]),
        (['model.device_map={"": cuda}'], ["GPU 0", "model.device is cpu"]),
        (['model.device_map={"": tpu}'], ["'' on 'tpu'", "cpu or disk"]),
        (['model.device_map={"": -1}'], ["'' on -1"]),
        (["model.device_map=spread"], ["model.device_map", "'auto' or 'balanced'"]),
        (["engine.gpus_per_worker=2"], ["model.device is cpu"]),
        (["engine.gpus_per_worker=0"], ["engine.gpus_per_worker", "greater than or equal to 1"]),
    ],
)
def test_a_map_that_cannot_be_is_refused_before_anything_is_written(
    llama: Any, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    inputs, _ = llama
    with pytest.raises(UserError) as caught:
        inputs.run(tmp_path / "run", *overrides)
    said = str(caught.value)
    assert all(word in said for word in words) and "\n" not in said, said
    assert not (tmp_path / "run").exists()


def test_a_map_of_gpus_that_cannot_be_is_refused() -> None:
    model, tied = build("llama", tie_word_embeddings=False), build("llama")

    def said(setting: ModelSection, gpus: int, of: Any = model) -> str:
        with pytest.raises(UserError) as caught:
            placed(of, setting, "cuda", gpus)
        return str(caught.value)

    beyond = said(section({"": 0, "lm_head": 3}), 2)
    assert "a worker has 2 GPUs, counted from 0; set engine.gpus_per_worker=4" in beyond
    assert "puts nothing on GPU 0" in said(section({"": 1}), 2)
    assert "set model.device_map to balanced" in said(section(), 2)
    assert "'lm_head' shares its weight with 'model.embed_tokens'" in said(section({"": 0, "lm_head": 1}), 2, tied)


def test_a_model_that_cannot_be_read_anew_is_refused() -> None:
    model = build("mixtral")
    split_experts(model)
    with pytest.raises(UserError, match="experts' weights are fused"):
        placed(model, section({"": "cpu", "model.layers": "disk"}), "cpu", 1)
    assert placed(model, section("balanced"), "cpu", 1) is not None


def test_without_accelerate_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'raylux\[devices\]'"):
        placed(build("llama"), section("balanced"), "cpu", 1)


def test_broken_weights_are_found_where_they_lie(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    files = models.ModelFiles(str(tmp_path / "model"), "")
    found = placed(models.load_structure(files), section({"": "cpu", "model.layers": "disk"}), "cpu", 1)
    with pytest.raises(UserError, match=r"NaN or infinity in the weights of model.layers.1.mlp.up_proj"):
        models.load_model(files, "float32", "cpu", placement=found)


def test_verify_wants_the_model_in_one_place(llama: Any, tmp_path: Path) -> None:
    inputs, _ = llama
    inputs.ask("a")
    run = inputs.run(tmp_path / "run", *EXACT)
    with pytest.raises(UserError, match=r"verify: measuring takes a whole copy .* set model\.device_map=null"):
        raylux.verify(run, overrides=[f"model.device_map={BLOCKS}"])


# ------------------------------------------------------------------------------------------ supply


def test_a_worker_has_its_gpus_on_one_node() -> None:
    nodes = [Node({"CPU": 8.0, "GPU": float(count), "memory": 64.0 * GIB}) for count in (3, 2, 1)]

    def demand(gpus: int, workers: int | str = "auto") -> Demand:
        return Demand(workers, "auto", 1, True, GIB, GIB, gpus=gpus)

    assert [fit_nodes(demand(gpus), nodes)[0] for gpus in (1, 2, 3)] == [6, 2, 1]
    with pytest.raises(UserError, match=r"needs 4 GPUs of one node .*, no node has more than 3"):
        fit_nodes(demand(4), nodes)
    with pytest.raises(UserError, match=r"3 workers need 6, .* 4; set engine.workers to 2 or fewer"):
        fit_nodes(demand(2, 3), nodes)
